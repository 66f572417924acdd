"""Apple GPUs: what is refused, no float64 on the device in a step, and whole runs where there is such a GPU.

Where there is none, the meta device stands for one without float64: it runs every op of a step, forward and backward,
with the types and shapes that the device would have.
"""

import contextlib
import functools

import pytest
import torch
from adapt_configs import upstep_config
from torch.optim import optimizer as optimizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import upstep_fast
from upstep_fast import methods
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.explora import Dinov2Config, MaeConfig
from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.config.flat import from_flat
from upstep_fast.data.loading.loader import Batch
from upstep_fast.errors import ConfigError
from upstep_fast.methods import embeddings
from upstep_fast.methods.explora.teacher import averaged_pairs
from upstep_fast.model import backbone as backbones
from upstep_fast.runtime import device as devices
from upstep_fast.runtime.device import Compute, resolve
from upstep_fast.train import state as states
from upstep_fast.train.finetune import classifier
from upstep_fast.train.finetune import state as finetune_state
from upstep_fast.train.finetune import step as finetune_step
from upstep_fast.train.state import make_optimizer
from upstep_fast.train.step import forward_loss
from upstep_fast.train.update import update

HAS_MPS = torch.backends.mps.is_available()
needs_mps = pytest.mark.skipif(not HAS_MPS, reason="needs an Apple GPU")


class NoFloat64(TorchDispatchMode):
    """Refuse tensors of float64 on the meta device; what is copied from there to the CPU, forward or back, is zeros."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and kwargs.get("device") == torch.device("cpu"):
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1.0
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "meta" and leaf.dtype == torch.float64:
                raise TypeError(f"{func} makes float64 on the device")
        return result


@pytest.fixture
def fused_on_meta(monkeypatch):
    """Let fused AdamW, which MPS has, take tensors of the meta device."""
    devices_of_fused = optimizers._get_fused_kernels_supported_devices
    monkeypatch.setattr(optimizers, "_get_fused_kernels_supported_devices", lambda: [*devices_of_fused(), "meta"])
    assert "mps" in devices_of_fused()


def settings(short_run, model, **flags):
    return {**short_run, "model": model, "data": ("d",), "out": "o", **flags}


@pytest.mark.parametrize(
    ("config_class", "flags"),
    [
        (AdaptConfig, {}),
        (AdaptConfig, {"layout": "asymmetric", "distil": "relational", "cvr": "hinge"}),
        (AdaptConfig, {"implementation": "reference", "prototype_init": "learned", "local_views": 2}),
        (AdaptConfig, {"memory": "lean", "lora_targets": ("qkv", "proj", "fc1", "fc2")}),
        (MaeConfig, {"method": "explora", "objective": "mae"}),
        (Dinov2Config, {"method": "explora", "local_views": 2}),
    ],
)
def test_no_step_makes_float64_on_the_device(config_class, flags, short_run, model, monkeypatch, fused_on_meta):
    known = {name: value for name, value in short_run.items() if name not in getattr(config_class, "unused", ())}
    make = upstep_config if config_class is AdaptConfig else functools.partial(from_flat, config_class)
    config = make(**settings(known, model, **flags))
    monkeypatch.setattr(embeddings, "WITHOUT_FLOAT64", ("meta",))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # not there for meta tensors
    backbone = backbones.load_from(config.model)
    method = methods.build(backbone, config).to("meta")
    if config.runtime.implementation != "reference":
        method.accelerate(torch.float32, config.memory.level, False)
    images = [torch.randint(256, (3, 40, 40), dtype=torch.uint8) for _ in range(4)]
    views = method.views(Batch(images, torch.arange(4), 0, 0), torch.device("cpu"))
    views = tree_map(lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x, views)
    if config_class is Dinov2Config:  # Module.to("meta") has made new parameters
        modules = ("teacher", "vit"), ("teacher_head", "head"), ("teacher_patch_head", "patch_head")
        pairs = [averaged_pairs(getattr(method, teacher), getattr(method, student)) for teacher, student in modules]
        method._averaged = [pair for part in pairs for pair in part]
    state = states.RunState(
        method=method,
        optimizer=make_optimizer(method, config),
        scaler=torch.amp.GradScaler("cpu", enabled=False),
        got_grad=torch.zeros(len(method.must_receive_grad()), dtype=torch.bool, device="meta"),
    )
    with NoFloat64():
        update(forward_loss(method, views, config), state, config)
    moments = [value for values in state.optimizer.state.values() for value in values.values()]
    assert moments and all(value.dtype == torch.float32 for value in moments)


@pytest.mark.parametrize("flags", [{}, {"method": "lora"}, {"method": "linear"}, {"method": "full"}])
def test_no_step_of_finetune_makes_float64_on_the_device(flags, model, monkeypatch, fused_on_meta):
    config = from_flat(FinetuneConfig, model=model, data=("d",), out="o", lr=1e-3, batch_size=4, **flags)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    net = classifier.build(backbones.load_from(config.model), config, 3).to("meta")
    net.accelerate(torch.float32, False)
    state = finetune_state.fresh_state(net, config, Compute(torch.device("cpu"), "fp32"))
    x, y = (
        torch.zeros(4, 3, *net.vit.patch_embed.img_size, device="meta"),
        torch.zeros(4, dtype=torch.long, device="meta"),
    )
    logits = finetune_step.make_logits(net, config)
    with NoFloat64():
        row = finetune_step.train_step(state, x, y, logits, None, config, Compute(torch.device("cpu"), "fp32"), 10)
    assert row["loss"] == 1.0 and row["bad"] is None and state.optimizer.state


@pytest.mark.skipif(HAS_MPS, reason="there is an Apple GPU")
def test_a_machine_without_one_says_so():
    with pytest.raises(ConfigError, match="device: mps needs an Apple GPU, which torch does not find here"):
        resolve("mps", "auto")


def test_what_an_apple_gpu_lacks_is_refused(monkeypatch, options, short_run, model):
    monkeypatch.setattr(devices.torch.backends.mps, "is_available", lambda: True)
    assert resolve("mps", "auto") == Compute(torch.device("mps"), "fp32")
    assert resolve("mps", "bf16").dtype == torch.bfloat16
    for precision in ("fp16", "fp8"):
        with pytest.raises(ConfigError, match=f"precision: {precision} needs a"):
            resolve("mps", precision)
    for implementation in ("triton", "cuda"):
        with pytest.raises(ConfigError, match=f"implementation: {implementation} needs a CUDA GPU, the device is mps"):
            resolve("mps", "auto", implementation)
    monkeypatch.setattr(devices.distributed, "launched", lambda: True)
    with pytest.raises(ConfigError, match="device: mps runs in one process"):
        resolve("mps", "auto")
    config = upstep_config(**settings(short_run, model, adapter_ema=0.9))
    with pytest.raises(ConfigError, match="adapter_ema: counts in float64"):
        states.fresh_state(config, Compute(torch.device("mps"), "fp32"), backbones.load_from(config.model))


@needs_mps
def test_runs_on_an_apple_gpu(options, photos, tmp_path):
    result = upstep_fast.adapt(**options | {"device": "mps"})
    on_mps = upstep_fast.load(options["out"], device="mps").embed(photos)
    on_cpu = upstep_fast.load(options["out"], device="cpu").embed(photos)
    torch.testing.assert_close(torch.from_numpy(on_mps), torch.from_numpy(on_cpu), atol=1e-3, rtol=1e-3)
    assert result.steps == options["steps"]
