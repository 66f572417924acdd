"""A ViT in two parts: together they are the whole, and the tokens of a view do not depend on the views beside it."""

import pytest
import torch
from engine_models import ROTARY, gradients, model, relative

from upstep_fast.engine import vit as engine
from upstep_fast.engine.split import ROWS, split

VARIANTS = [
    "class token",
    "registers, LayerScale",
    "QuickGELU, norm_pre",
    "attention pooling",
    "mean of patches",
    "qk-norm",
]


def parts_of(dtype=torch.float32, variant="class token", frozen=2, depth=3):
    vit, images = model(variant, depth=depth, frozen=frozen)
    whole = engine.build(vit, dtype)
    return vit, images, whole, split(whole)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)], ids=["fp32", "bf16"])
def test_both_parts_are_the_whole(variant, dtype, limit):
    vit, images, whole, parts = parts_of(dtype, variant)
    assert parts.frozen == 2
    truth, true_gradients = gradients(vit, whole.features, images)
    tokens = parts.tokens(images)
    assert tokens.dtype == dtype and not tokens.requires_grad
    got, found = gradients(vit, parts.rest.features, tokens)
    assert relative(got, truth) < limit
    for ours, theirs in zip(found, true_gradients, strict=True):
        assert relative(ours, theirs) < 10 * limit
    with torch.no_grad():
        assert relative(parts.rest.features(tokens), truth) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["class token", "registers, LayerScale"])
def test_the_tokens_of_a_view_are_the_same_bits_beside_any_others(variant, dtype):
    _, images, _, parts = parts_of(dtype, variant)
    torch.manual_seed(3)
    views = torch.randn(2 * ROWS + 5, *images.shape[1:])
    together = parts.tokens(views)
    for chosen in ([7], [0, 7], [*range(ROWS - 1, -1, -1)], [*range(1, len(views))], [36, 3, 36, 20, 11]):
        assert torch.equal(parts.tokens(views[chosen]), together[chosen])


def test_a_changed_adapter_changes_the_second_part_alone():
    vit, images, whole, parts = parts_of()
    before, tokens = parts.rest.features(parts.tokens(images)), parts.tokens(images)
    with torch.no_grad():
        for name, parameter in vit.named_parameters():
            if "lora_b" in name:
                parameter += 0.1
    assert torch.equal(parts.tokens(images), tokens)
    after = parts.rest.features(tokens)
    assert relative(after, before) > 1e-2 and relative(after, whole.features(images)) < 1e-5


def test_what_cannot_be_split():
    assert parts_of(frozen=0)[3] is None  # all blocks train
    vit, _ = model("class token", depth=2, targets=())
    assert split(engine.build(vit, torch.float32)) is None  # nothing trains
    for variant in ROTARY[:2]:  # the tables follow the image
        assert parts_of(variant=variant)[3] is None
    vit, _, whole, _ = parts_of()
    vit.blocks[0].train()
    assert split(whole) is None  # what it drops would differ from pass to pass


def test_a_frozen_weight_that_was_written_to_is_an_error():
    vit, images, _, parts = parts_of()
    with torch.no_grad():
        vit.blocks[0].mlp.fc1.weight.mul_(2)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.mlp\.fc1\.weight was changed"):
        parts.tokens(images)
