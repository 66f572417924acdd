"""The engine's blocks beyond the plain one, against timm: where adapters sit, bf16, fp8, what is kept, PEFT."""

import peft
import pytest
import torch
from engine_models import ROTARY, SWIGLU, gradients, kept_bytes, model, relative, same_as_timm

from upstep_fast.engine import fold
from upstep_fast.engine import vit as engine
from upstep_fast.model import lora, peft_format
from upstep_fast.model.pooling import features

BEYOND = [*SWIGLU, *ROTARY, "norms before proj and fc2", "qk-norm", "qk-norm by RMSNorm"]
TARGETS = [("q", "v"), ("qkv",), ("proj", "fc2"), ("q", "v", "proj", "fc1", "fc2"), ("fc1",)]


@pytest.mark.parametrize("variant", BEYOND)
@pytest.mark.parametrize("targets", TARGETS)
def test_every_place_an_adapter_can_sit(variant, targets):
    if targets == ("qkv",) and model(variant, ())[0].blocks[0].attn.qkv is None:
        pytest.skip("q, k and v have a matrix each, to which q, k and v adapt")
    vit, images = model(variant, targets)
    assert fold.unsupported_blocks(vit) == {}
    same_as_timm(vit, images, "balanced")


@pytest.mark.parametrize("memory", ["fast", "balanced", "lean"])
@pytest.mark.parametrize("variant", BEYOND)
def test_bf16_is_as_near_to_fp32_as_eager_bf16(variant, memory):
    vit, images = model(variant, ("q", "v", "proj", "fc1", "fc2"), depth=4)
    truth, truth_grads = gradients(vit, lambda x: features(vit, x), images)

    def eager(x):
        with torch.autocast("cpu", torch.bfloat16):
            return features(vit, x)

    theirs, their_grads = gradients(vit, eager, images)
    ours, our_grads = gradients(vit, engine.build(vit, torch.bfloat16, memory).features, images)
    # eager keeps the stream in fp32, which a mean over few patches shows; issue 4 asks for features within 1e-2
    bound = 1e-2 if vit.global_pool == "avg" else 2 * relative(theirs, truth)
    assert relative(ours, truth) < bound
    joined = [torch.cat([g.flatten() for g in grads]) for grads in (our_grads, their_grads, truth_grads)]
    assert relative(joined[0], joined[2]) < 2 * relative(joined[1], joined[2])


# not EVA-02 CLIP: its norm before proj enlarges what fp8 rounds, to 6.5e-2 of the features
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("variant", [name for name in BEYOND if name != "EVA-02 CLIP"])
def test_fp8_weights_move_features_and_gradients_by_what_their_rounding_does(variant, fused):
    vit, images = model(variant, ("q", "v", "fc1", "fc2"), depth=4)
    truth, of_truth = gradients_as_one(vit, lambda x: features(vit, x), images)
    _, of_bf16 = gradients_as_one(vit, engine.build(vit, torch.bfloat16, fused=fused).features, images)
    ours, of_fp8 = gradients_as_one(vit, engine.build(vit, torch.bfloat16, fused=fused, fp8=True).features, images)
    assert relative(ours, truth) < 6e-2
    assert 1.5 * relative(of_bf16, of_truth) < relative(of_fp8, of_truth) < 1e-1


def gradients_as_one(vit, function, images):
    found, grads = gradients(vit, function, images)
    return found, torch.cat([g.flatten() for g in grads])


# in bytes a token of width D, in 16 bit; SwiGLU's input is 2 x 8/3 D in DINOv2's giant, 2 x 4 D in timm's default
@pytest.mark.parametrize(
    ("variant", "hidden"),
    [
        ("SwiGLU", 16 / 3),
        ("SwiGLU in two matrices", 8),
        ("norms before proj and fc2", 4),
        ("qk-norm", 4),
        ("DINOv3", 4),
        ("EVA-02 CLIP", 16 / 3),
        ("EVA-02", 16 / 3),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("memory", "rest"), [("fast", 12), ("balanced", 6), ("lean", 2)])
def test_what_a_block_keeps(variant, hidden, memory, rest, fused):
    vit, images = model(variant)
    tokens = len(images) * (vit.patch_embed.num_patches + vit.num_prefix_tokens)
    width, heads = vit.embed_dim, vit.blocks[0].attn.num_heads
    args = (torch.bfloat16, 5, fused, variant), (torch.bfloat16, 4, fused, variant)
    block = kept_bytes(memory, *args[0]) - kept_bytes(memory, *args[1])
    statistics = 0 if memory == "lean" else 4 * tokens * (2 + heads)
    of_gelu = 1 if fused and variant in ("qk-norm", "DINOv3") else 2  # its derivative as a byte, or its input
    most = rest if memory == "lean" else rest + of_gelu * hidden
    constants = 4 * (2 * width + 3)  # gamma, beta and the scales that the adapters are folded with
    assert block == constants + statistics + round(most * width) * tokens


@pytest.mark.parametrize("variant", BEYOND)
def test_peft_serves_what_was_trained_through_the_engine(variant, tmp_path):
    vit, images = model(variant, ("q", "v", "fc1", "fc2"))
    run = engine.build(vit, torch.float32).features
    optimizer = torch.optim.SGD([p for p in vit.parameters() if p.requires_grad], lr=0.05)
    run(images).square().mean().backward()
    optimizer.step()
    ours = run(images).detach()
    peft_format.save_adapter(tmp_path, lora.find(vit), "any")
    plain = model(variant, ("q",))[0]  # the same frozen weights
    for name, adapter in lora.find(plain).items():
        plain.set_submodule(name, adapter.base)
    served = peft.PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    assert relative(features(served.base_model.model, images).detach(), ours) < 1e-5


@pytest.mark.parametrize("variant", SWIGLU)
def test_adapters_of_several_ranks_and_strengths(variant):
    # a foreign adapter may have its own rank and alpha for every matrix; with one matrix there is nothing to join
    vit, images = model(variant, ("fc1",))
    for i, (name, adapter) in enumerate(lora.find(vit).items()):
        other = lora.LoraLinear(adapter.base, r=2 + i, scale=0.5 + i)
        torch.nn.init.normal_(other.lora_b, std=0.05)
        vit.set_submodule(name, other)
    same_as_timm(vit, images)


@pytest.mark.parametrize("variant", BEYOND)
def test_a_weight_changed_after_folding_is_noticed(variant):
    vit, images = model(variant)
    run = engine.build(vit, torch.float32).features
    with torch.no_grad():
        next(p for name, p in vit.blocks[1].named_parameters() if "fc1" in name or "norm.weight" in name).add_(1)
    with pytest.raises(RuntimeError, match="changed after folding"):
        run(images)


def test_an_adapter_changed_between_forward_and_backward_is_noticed():
    vit, images = model("SwiGLU")
    out = engine.build(vit, torch.float32).features(images).sum()
    with torch.no_grad():
        next(iter(lora.find(vit).values())).lora_b.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


def test_a_trained_inner_norm_leaves_its_block_as_it_is():
    vit, images = model("norms before proj and fc2", depth=3)
    vit.blocks[1].mlp.norm.weight.requires_grad_(True)
    assert fold.unsupported_blocks(vit) == {1: "trains a norm that the engine only folds"}
    same_as_timm(vit, images)
