"""integrations.peft.patch: the same outputs and gradients as PEFT's own forward, and nothing left behind."""

from __future__ import annotations

import copy
import io
import logging

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.utils.flop_counter import FlopCounterMode

from upstep_fast.integrations.peft import patch


def timm_vit() -> tuple[nn.Module, list[str], torch.Tensor]:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5
    )
    return model, ["qkv", "fc1"], torch.randn(2, 3, 32, 32)


def hf_vit() -> tuple[nn.Module, str, torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=32, patch_size=8
    )
    # transformers 5 renamed the projections
    return transformers.ViTModel(config), r".*\.(query|value|q_proj|v_proj)", torch.randn(2, 3, 32, 32)


def llama() -> tuple[nn.Module, list[str], torch.Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=3, intermediate_size=40,
        vocab_size=50,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), ["q_proj", "v_proj", "down_proj"], torch.randint(50, (2, 7))


MODELS = {"timm": timm_vit, "hf_vit": hf_vit, "llama": llama}


def adapted(make=timm_vit, **config) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, targets, x = make()
    config = {"r": 4, "lora_alpha": 8, "target_modules": targets, "lora_dropout": 0.0, **config}
    model = get_peft_model(model, LoraConfig(**config))
    randomize(model)
    return model, x


def randomize(model: nn.Module) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.2)


def run(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The output, and the gradient of a fixed function of it for each trained parameter."""
    y = model(x)
    y = y if isinstance(y, torch.Tensor) else y[0]
    model.zero_grad()
    (y.float() * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return y.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(model: nn.Module, x: torch.Tensor, wanted, **close) -> None:
    y, grads = run(model, x)
    torch.testing.assert_close(y, wanted[0], **close)
    assert grads.keys() == wanted[1].keys()
    for name in grads:
        torch.testing.assert_close(grads[name], wanted[1][name], **close, msg=lambda m, n=name: f"{n}: {m}")


def assert_runs_ours(model: nn.Module, x: torch.Tensor, times: int) -> None:
    with torch.profiler.profile() as profile:
        model(x)
    ours = [e for e in profile.events() if e.name.endswith("::lora_linear")]
    assert len(ours) == times


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_outputs_gradients_and_exact_revert(make):
    model, x = adapted(make)
    keys = list(model.state_dict())
    wanted = run(model, x)
    handle = patch(model)
    assert handle.unsupported == ()
    assert len(handle.patched) == sum(name.endswith(".lora_A.default") for name, _ in model.named_modules()) > 0
    assert_runs_ours(model, x, len(handle.patched))
    assert_same(model, x, wanted)
    assert list(model.state_dict()) == keys
    handle.revert()
    handle.revert()
    assert not any("forward" in vars(m) for m in model.modules())
    assert_same(model, x, wanted, rtol=0, atol=0)
    assert_runs_ours(model, x, 0)


def test_context_manager_reverts_on_an_error():
    model, x = adapted()
    wanted = run(model, x)
    with pytest.raises(ZeroDivisionError), patch(model):
        raise ZeroDivisionError
    assert_same(model, x, wanted, rtol=0, atol=0)


def test_merge_and_unmerge_while_patched():
    model, x = adapted()
    wanted = run(model, x)[0]
    base = model.get_base_model()
    with patch(model):
        model.merge_adapter()
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
        assert_runs_ours(model, x, 0)
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)
        assert_runs_ours(model, x, 4)
        with model.disable_adapter():
            disabled = model(x)
    assert base is model.get_base_model()
    with model.disable_adapter():
        assert torch.equal(disabled, model(x))


def test_merge_and_unload_while_patched():
    model, x = adapted()
    wanted = model(x)
    patch(model)
    torch.testing.assert_close(model.merge_and_unload()(x), wanted, rtol=1e-4, atol=1e-5)


def test_second_adapter_switched_and_joined(caplog):
    model, x = adapted()
    model.add_adapter("other", LoraConfig(r=3, target_modules=["qkv"]))
    randomize(model)
    model.set_adapter("other")
    other = model(x)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    model.set_adapter("default")
    with patch(model), caplog.at_level(logging.WARNING):
        model.set_adapter("other")
        torch.testing.assert_close(model(x), other)
        model.base_model.set_adapter(["default", "other"])
        torch.testing.assert_close(model(x), both)
    said = [r.getMessage() for r in caplog.records if "own forward" in r.getMessage()]
    assert len(said) == len(set(said)) and any("2 adapters are active" in s for s in said)


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"use_dora": True}, "variant"),
        ({"lora_bias": True}, "has a bias"),
        ({"target_modules": ["qkv", "patch_embed.proj"]}, "Conv2d"),
        ({"bias": "lora_only"}, "base is trained"),
    ],
)
def test_unsupported_layers_with_the_reason(config, why):
    model, x = adapted(**config)
    wanted = run(model, x)
    with patch(model) as handle:
        assert handle.unsupported and all(why in reason for _, reason in handle.unsupported)
        assert len(handle.unsupported) + len(handle.patched) == sum(
            name.endswith("lora_A") for name, _ in model.named_modules()
        )
        assert_same(model, x, wanted)


def test_patching_twice_leaves_the_layers_to_the_first():
    model, _ = adapted()
    first = patch(model)
    second = patch(model)
    assert second.patched == () and {why for _, why in second.unsupported} == {"its forward is already replaced"}
    second.revert()
    assert all("forward" in vars(model.get_submodule(name)) for name in first.patched)


def test_hooks_inside_a_layer_still_run():
    model, x = adapted()
    with patch(model) as handle:
        seen = []
        layer = model.get_submodule(handle.patched[0])
        layer.lora_A["default"].register_forward_hook(lambda *_: seen.append(1))
        model(x)
        assert seen == [1]


def doubled(module: nn.Module) -> None:
    forward = module.forward
    module.forward = lambda *args: 2 * forward(*args)


ALTERED = {
    "forward": (doubled, "a forward of its own"),
    "forward hook": (lambda m: m.register_forward_hook(lambda m, args, y: 2 * y), "hooks"),
    "pre-hook": (lambda m: m.register_forward_pre_hook(lambda m, args: (2 * args[0],)), "hooks"),
    "backward hook": (lambda m: m.register_full_backward_hook(lambda m, gi, go: tuple(2 * g for g in gi)), "hooks"),
    "backward pre-hook": (lambda m: m.register_full_backward_pre_hook(lambda m, go: tuple(2 * g for g in go)), "hooks"),
    "parametrization": (lambda m: nn.utils.parametrize.register_parametrization(m, "weight", Doubled()), "plain"),
    "a Linear of its own": (lambda m: setattr(m, "__class__", OwnLinear), "plain"),
}


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class OwnLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("part", ["base_layer", "lora_A", "lora_B"])
@pytest.mark.parametrize("change", ALTERED)
def test_what_stands_around_a_part_is_left_to_peft(change, part, when):
    model, x = adapted()
    name = "base_model.model.blocks.1.attn.qkv"
    apply, why = ALTERED[change]
    twin = copy.deepcopy(model)
    layers = [m.get_submodule(name) for m in (model, twin)]
    modules = [layer.base_layer if part == "base_layer" else getattr(layer, part)["default"] for layer in layers]
    if when == "after":
        handle = patch(model)
    for module in modules:
        apply(module)
        if change == "parametrization" and part == "base_layer":
            module.requires_grad_(False)
    if when == "before":
        handle = patch(model)
        assert [(left, why in reason) for left, reason in handle.unsupported] == [(name, True)]
    assert_same(model, x, run(twin, x))
    assert_runs_ours(model, x, 3)


def test_offloaded_weights_are_loaded_by_their_hooks():
    accelerate = pytest.importorskip("accelerate")
    for before in (True, False):
        model, x = adapted()
        wanted = model(x).detach()
        if before:
            accelerate.cpu_offload(model, torch.device("cpu"))
        with patch(model) as handle:
            if not before:
                accelerate.cpu_offload(model, torch.device("cpu"))
            assert model.get_submodule("base_model.model.blocks.0.attn.qkv.base_layer").weight.is_meta
            assert torch.equal(model(x), wanted)
        assert not before or all("forward of its own" in reason for _, reason in handle.unsupported)


@pytest.mark.parametrize("strategy", ["merged", "wide_k"])
def test_dropout_without_a_form_runs_pefts_own(strategy, caplog):
    model, x = adapted(lora_dropout=0.5)
    torch.manual_seed(1)
    wanted = run(model, x)
    with patch(model, strategy=strategy), caplog.at_level(logging.WARNING):
        torch.manual_seed(1)
        assert_same(model, x, wanted)
        model.eval()
        assert_runs_ours(model, x, 4)
    assert f"strategy '{strategy}' has no dropout" in caplog.text


def test_a_dropout_of_everything_runs_pefts_own():
    model, x = adapted(lora_dropout=1.0)
    wanted = run(model, x)
    with patch(model):
        assert_same(model, x, wanted)


def test_flops_are_counted_as_pefts():
    def flops() -> int:
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        return counter.get_total_flops()

    model, x = adapted()
    wanted = flops()
    with patch(model):
        assert flops() == wanted > 0


def test_jit_trace_records_pefts_own():
    model, x = adapted()
    wanted = model(x)
    with patch(model):
        traced = torch.jit.trace(model.eval(), x)
    assert "upstep" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), wanted)


def test_a_compiled_hotswap_is_one_graph():
    model, _ = adapted()
    layer, x = model.get_submodule("base_model.model.blocks.0.attn.qkv"), torch.randn(2, 5, 24)
    wanted = layer(x)
    # as peft.utils.hotswap.prepare_model_for_compiled_hotswap leaves it
    layer.scaling = {name: torch.tensor(value) for name, value in layer.scaling.items()}
    torch._dynamo.reset()
    with patch(model):
        torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), wanted)
        torch.testing.assert_close(layer(x), wanted)
    torch._dynamo.reset()


def test_a_patched_model_has_pefts_forward_mode():
    model, x = adapted()
    for block in model.get_base_model().blocks:
        block.attn.fused_attn = False  # PyTorch's own has no forward mode on a CPU
    wanted = torch.func.jvp(model, (x,), (x.cos(),))[1]
    with patch(model):
        torch.testing.assert_close(torch.func.jvp(model, (x,), (x.cos(),))[1], wanted)
        per_image = torch.func.vmap(lambda x: model(x[None])[0])(x)
    torch.testing.assert_close(per_image, model(x))


@pytest.mark.parametrize("saved_as", ["pissa", "weighted", "some layers", "a second"])
def test_other_ways_to_an_adapter(saved_as):
    if saved_as == "pissa":
        model, x = adapted(init_lora_weights="pissa")
    elif saved_as == "some layers":
        model, x = adapted(layers_to_transform=[1], layers_pattern="blocks")
    else:
        model, x = adapted()
        model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=["qkv", "fc1"]))
        randomize(model)
    if saved_as == "weighted":
        model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "both", combination_type="cat")
        model.set_adapter("both")
    if saved_as == "a second":
        model.set_adapter("other")
    wanted = run(model, x)
    with patch(model) as handle:
        assert handle.unsupported == ()
        assert_same(model, x, wanted)
        assert_runs_ours(model, x, 2 if saved_as == "some layers" else 4)


def test_dropout_acts_in_training_only_and_follows_the_seed():
    model, x = adapted(lora_dropout=0.5)
    model.eval()
    wanted = run(model, x)
    with patch(model):
        assert_same(model, x, wanted)
        model.train()
        outputs = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            outputs.append(model(x).detach())
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2])
    assert not torch.allclose(outputs[0], wanted[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast(dtype):
    model, x = adapted()
    model.to(dtype) if dtype != torch.float32 else None
    x = x.to(dtype)
    exact, _ = adapted()
    exact = exact.to(dtype).double()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(x)
        with patch(model):
            got = model(x)
    truth = exact(x.double())
    assert got.dtype == wanted.dtype
    assert (got - truth).abs().max() <= 2 * (wanted - truth).abs().max()


def test_a_copy_and_a_pickle_of_a_patched_model_run_alone():
    model, x = adapted()
    wanted = run(model, x)
    with patch(model) as handle:
        twin = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_same(twin, x, wanted)
    assert_same(loaded, x, wanted)
    assert_runs_ours(twin, x, len(handle.patched))


def test_peft_saves_the_same_adapter():
    model, _ = adapted()
    wanted = get_peft_model_state_dict(model)
    with patch(model):
        got = get_peft_model_state_dict(model)
    assert got.keys() == wanted.keys() and all(torch.equal(got[k], wanted[k]) for k in got)


def test_trains_under_compile():
    model, x = adapted()
    wanted = run(model, x)
    with patch(model):
        assert_same(torch.compile(model, backend="aot_eager", fullgraph=True), x, renamed(wanted))


def renamed(result):
    y, grads = result
    return y, {f"_orig_mod.{name}": g for name, g in grads.items()}
