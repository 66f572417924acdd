"""The engine runs no block that it only guesses at, and is compared with the plain model where it is built."""

import copy

import pytest
import timm
import torch
from engine_models import ROTARY, VARIANTS, model, relative, same_as_timm
from timm.layers import Attention, LayerScale, Mlp
from torch import nn

from upstep_fast.engine import block as blocks
from upstep_fast.engine import fold, self_check
from upstep_fast.engine import vit as engine
from upstep_fast.methods.explora.tokens import Encoder
from upstep_fast.methods.supervised.losa import make_stream, stream_plain
from upstep_fast.model import lora, registry
from upstep_fast.model.pooling import features

# what the engine leaves to the plain model, by the end of its reason; a new kind in a new timm appears here
REFUSED = {
    "its rotary positions differ from block to block": {"rope_mixed"},
    "block 0 is a": {"EvaBlockPostNorm", "ResPostBlock"},
    "block 0 has a DiffAttention for attention": {"dlittle", "dwee"},
    "block 0 shares k and v among heads": {"sapiens2"},
    "block 0 has gated attention": {"genlip"},
}


def doubled(function):
    return lambda *args, **kwargs: 2 * function(*args, **kwargs)


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class SharperAttention(Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return 2 * super().forward(x, attn_mask, is_causal)


class SquaredScale(LayerScale):
    def forward(self, x):
        return x * self.gamma**2


class OtherMlp(Mlp):
    def forward(self, x):
        return 2 * super().forward(x)


class GELU(nn.Module):
    def forward(self, x):
        return x.relu()


class OtherNorm(nn.LayerNorm):
    def forward(self, x):
        return 2 * super().forward(x)


class BackwardVit(timm.models.VisionTransformer):
    def forward_features(self, x):
        x = self.norm_pre(self._pos_embed(self.patch_embed(x)))
        for block in reversed(self.blocks):
            x = block(x)
        return self.norm(x)


def of_class(kind):
    def change(module):
        module.__class__ = kind

    return change


def set_to(name, value):
    return lambda module: setattr(module, name, value)


CHANGES = {
    "attention of a subclass": ("blocks.1.attn", of_class(SharperAttention)),
    "attention at another scale": ("blocks.1.attn", set_to("scale", 1.0)),
    "LayerScale of a subclass": ("blocks.1.ls1", of_class(SquaredScale)),
    "a module for LayerScale": ("blocks.1", set_to("ls2", nn.Tanh())),
    "MLP of a subclass": ("blocks.1.mlp", of_class(OtherMlp)),
    "activation of a known name": ("blocks.1.mlp", set_to("act", GELU())),
    "norm of a subclass": ("blocks.1.norm1", of_class(OtherNorm)),
    "Linear of a subclass": ("blocks.1.mlp.fc2", of_class(Doubled)),
    "convolution in the MLP": ("blocks.1.mlp", lambda mlp: setattr(mlp, "fc2", nn.Sequential(mlp.fc2))),
    "a forward on the instance": (
        "blocks.1.mlp",
        lambda mlp: setattr(mlp, "forward", doubled(mlp.forward)),
    ),
    "a hook": ("blocks.1.attn.proj", lambda proj: proj.register_forward_hook(lambda m, args, y: 2 * y)),
    "a hook before": ("blocks.1", lambda block: block.register_forward_pre_hook(lambda m, args: (2 * args[0],))),
    "dropout": ("blocks.1.mlp", set_to("drop1", nn.Dropout(0.5))),
    "a parametrization": (
        "blocks.1.attn.proj",
        lambda proj: nn.utils.parametrizations.weight_norm(proj).requires_grad_(False),
    ),
    "a model of a subclass": ("", of_class(BackwardVit)),
    "features on the instance": (
        "",
        lambda vit: setattr(vit, "forward_features", doubled(vit.forward_features)),
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_known_runs_as_the_plain_model(change):
    vit, images = model("registers, LayerScale", ("q", "v"))
    path, apply = CHANGES[change]
    apply(vit.get_submodule(path))
    torch.manual_seed(1)
    expected = features(vit, images).detach()
    run, _ = engine.make_features(vit, torch.float32, "fast", lambda x: features(vit, x))
    for mode in (torch.enable_grad, torch.no_grad):
        torch.manual_seed(1)
        with mode():
            assert relative(run(images).detach(), expected) < 1e-5


def test_torchs_gelu_has_two_forms_under_one_name():
    vit, images = model()
    for block in vit.blocks:
        block.mlp.act = nn.GELU(approximate="tanh")
    assert fold.unsupported_blocks(vit) == {}
    same_as_timm(vit, images)


@pytest.mark.parametrize(
    "apply",
    [
        lambda conv: conv.register_forward_hook(lambda module, args, y: 2 * y),
        lambda conv: setattr(conv, "forward", doubled(conv.forward)),
        lambda conv: setattr(conv, "dilation", (2, 2)),
    ],
)
def test_a_patch_embedding_that_is_no_plain_convolution_runs_as_it_is(apply):
    vit, images = model()
    vit.patch_embed.strict_img_size = False
    apply(vit.patch_embed.proj)
    assert torch.equal(engine.patch_embed(vit, images), vit.patch_embed(images))
    assert engine.patch_side(vit) == 0


def test_a_hook_after_folding_is_noticed():
    vit, images = model()
    run = engine.build(vit, torch.float32).features
    handle = vit.blocks[1].mlp.fc1.register_forward_hook(lambda module, args, y: 2 * y)
    with pytest.raises(RuntimeError, match="block 1 has hooks on a Linear since it was folded"):
        run(images)
    handle.remove()
    run(images)


def test_every_listed_model_is_of_known_kinds():
    for name, _ in registry.names():
        reason = fold.unsupported_reason(registry.blueprint(name))
        if reason is not None:
            found = [part for start, part in REFUSED.items() if reason.startswith(start)]
            assert any(word in name or word in reason for words in found for word in words), (name, reason)


# the self-check


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", ["class token", "registers, LayerScale", *ROTARY[:3]])
def test_the_engine_agrees_with_the_plain_model_and_nothing_else_moves(variant, dtype):
    vit, _ = model(variant)
    vit.train()
    vit.blocks[0].eval()
    modes = [module.training for module in vit.modules()]
    before, random = copy.deepcopy(vit.state_dict()), torch.get_rng_state()
    found = self_check.compare(engine.build(vit, dtype))
    assert found.mismatch is None
    rounding = 1e-5 if dtype == torch.float32 else 2e-2
    assert max(found.tokens, found.features, found.features_forward_only) < rounding and 0 < found.gradient < rounding
    assert torch.equal(random, torch.get_rng_state()) and modes == [module.training for module in vit.modules()]
    assert all(torch.equal(value, before[key]) for key, value in vit.state_dict().items())
    assert all(p.grad is None for p in vit.parameters())


def wrong_attention(monkeypatch):
    attend = blocks.attend
    monkeypatch.setattr(blocks, "attend", lambda y, heads, sizes: attend(y.flip(-1), heads, sizes))


def wrong_backward(monkeypatch):
    backward = blocks.attend_backward
    monkeypatch.setattr(blocks, "attend_backward", lambda *args: -backward(*args))


def wrong_embedding(monkeypatch):
    monkeypatch.setattr(engine, "patch_embed", lambda vit, images: 1.5 * vit.patch_embed(images))


PLANTED = {
    wrong_attention: "its features",
    wrong_backward: "its gradients",
    wrong_embedding: "its tokens",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("plant", PLANTED)
def test_a_wrong_engine_is_not_used(plant, dtype, monkeypatch, caplog):
    vit, images = model("registers, LayerScale")
    plant(monkeypatch)
    expected = features(vit, images).detach()
    with caplog.at_level("WARNING", "upstep_fast"):
        run, patch = engine.make_features(vit, dtype, "fast", lambda x: features(vit, x))
    (message,) = caplog.messages
    assert message.startswith(f"engine: running the plain model instead, since {PLANTED[plant]} differ from the plain")
    assert patch == 0 and torch.equal(run(images).detach(), expected)
    assert Encoder(vit).accelerate(dtype, "fast").startswith(PLANTED[plant])
    assert make_stream(vit, dtype).func is stream_plain


def test_patches_of_another_network_are_a_reason():
    vit = timm.create_model("vit_tiny_r_s16_p8_224", img_size=32, depth=1, num_classes=0)
    assert engine.try_build(vit, torch.float32) == "its patches come from a HybridEmbed"


def test_nothing_is_compared_without_data():
    vit = registry.blueprint("vit_tiny_patch16_224")
    assert self_check.compare(engine.build(vit, torch.float32)) is None


def test_losa_gives_rotary_positions_to_a_block_that_is_not_folded():
    name, args = VARIANTS["rotary, qk-norm"]
    vit, images = model("rotary, qk-norm", (), depth=3)
    grouped = timm.create_model(name, depth=1, num_classes=0, **(args | {"num_kv_heads": 1}))
    vit.blocks[1] = grouped.blocks[0].eval().requires_grad_(False)
    taps, expected = [], []
    make_stream(vit, torch.float32)(images, lambda index, b: taps.append(b))
    stream_plain(vit, torch.float32, images, lambda index, b: expected.append(b))
    for ours, theirs in zip(taps, expected, strict=True):
        assert relative(ours, theirs) < 1e-5


def test_an_adapter_of_rank_0_of_b_has_a_gradient_to_compare():
    vit = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=0).eval().requires_grad_(False)
    lora.inject(vit, lora.LoraSpec(r=2))  # B starts at 0, so A has no gradient yet
    assert 0 < self_check.compare(engine.build(vit, torch.float32)).gradient < 1e-5


# derivatives that only the plain model has


@pytest.mark.parametrize("grad", [False, True])
def test_forward_mode_is_refused(grad):
    vit, images = model()
    run = engine.build(vit, torch.float32).features
    with torch.set_grad_enabled(grad):
        for transform in (
            lambda: torch.func.jvp(run, (images,), (images,)),
            lambda: torch.func.vmap(run)(images[:, None]),
            lambda: torch.func.grad(lambda x: run(x).sum())(images),
        ):
            with pytest.raises(NotImplementedError, match="engine: has first derivatives by backward"):
                transform()


def test_a_second_derivative_is_refused():
    vit, images = model()
    f = engine.build(vit, torch.float32).features(images)
    parameters = [p for p in vit.parameters() if p.requires_grad]
    with pytest.raises(NotImplementedError, match="engine: its backward has no derivative"):
        torch.autograd.grad(f.square().sum(), parameters, create_graph=True)
