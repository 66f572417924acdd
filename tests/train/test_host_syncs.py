"""How often a step makes the host wait for the device: once, at the gate."""

import pytest
import timm
import torch
from adapt_configs import upstep_config
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from upstep_fast.data.views.types import Views
from upstep_fast.engine import vit as engine
from upstep_fast.model import backbone, lora
from upstep_fast.runtime.device import resolve
from upstep_fast.train import loop as trainer
from upstep_fast.train.state import fresh_state
from upstep_fast.train.step import flush, step

READS = {"item", "tolist", "__bool__", "__float__", "__int__", "__index__", "cpu", "numpy"}
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero", "aten::equal", "aten::masked_select")


COPIES = {"tensor", "as_tensor", "from_numpy"}


def _has_list(index):
    return any(isinstance(part, list) for part in (index if isinstance(index, tuple) else (index,)))


class Waits(TorchFunctionMode):
    """Notes what would make a host wait for its device: values that Python reads, and sizes that depend on them."""

    def __init__(self):
        super().__init__()
        self.found, self._inside = [], False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in COPIES or (name == "__getitem__" and _has_list(args[1])):
            self.found.append(f"{name} from the host")  # a blocking copy, which capture as a CUDA graph refuses
        if name in READS:
            self.found.append(name)
            self._inside = True  # what it is made of is no second wait
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self._inside = False

    def below(self):
        """The same for what C++ asks for."""
        outer = self

        class Below(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                name = func._schema.name
                by_mask = name == "aten::index" and any(i is not None and i.dtype == torch.bool for i in args[1])
                if (name in WAITS or by_mask) and not outer._inside:
                    outer.found.append(name)
                return func(*args, **(kwargs or {}))

        return Below()


def waits(work):
    mode = Waits()
    with mode, mode.below():
        work()
    return mode.found


def build(model, **changes):
    sizes = dict(batch_size=8, prototypes=8, head_hidden=32, head_dim=16, lora_r=2, memory="fast")
    config = upstep_config(**{"model": model, "data": ("d",), "out": "o", "steps": 9, **sizes, **changes})
    compute = resolve("cpu", "fp32")
    return config, compute, fresh_state(config, compute, backbone.load(model))


@pytest.mark.parametrize("layout", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("rule", ["none", "ema", "alternate"])
@pytest.mark.parametrize("cvr", ["sq", "ema"])
def test_a_step_waits_once(model, layout, rule, cvr):
    config, compute, state = build(model, layout=layout, gate=rule, cvr=cvr, clip=1.0)
    images = Views.of(torch.randn(2, 8, 3, 32, 32))
    for _ in range(5):  # the last one updates, by `alternate` too
        assert waits(lambda: step(state, images, trainer.gate_rule(config), config, compute)) == ["tolist"]
    assert state.gate.num_updates and state.pending is not None
    assert waits(lambda: flush(state)) == ["tolist"] and state.pending is None


def test_engine_copies_nothing_from_the_host():
    # LayerScale and adapters on every projection; the engine's passes are what CUDA graphs capture
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=48, depth=2, num_heads=3, init_values=0.1,
        num_classes=0, weight_init="skip",
    )  # fmt: skip
    vit.eval().requires_grad_(False)
    lora.inject(vit, lora.LoraSpec(r=2, alpha=2, targets=("q", "v", "proj", "fc1", "fc2")))
    built, images = engine.build(vit, torch.float32), torch.randn(2, 3, 32, 32)

    def work():
        built.features(images).square().mean().backward()

    work()
    assert waits(work) == []


def test_a_wait_is_seen():
    x = torch.ones(3)
    assert waits(lambda: x.sum().item()) == ["item"]
    assert waits(lambda: bool(x.any())) == ["__bool__"]
    assert waits(lambda: x.nonzero()) and waits(lambda: x[x > 0])
    assert waits(lambda: x[[0, 2]]) == ["__getitem__ from the host"]
    assert waits(lambda: x * torch.tensor(2.0)) == ["tensor from the host"]
    assert waits(lambda: x * 2) == []


def test_results_of_a_step_come_with_the_next_step(model):
    config, compute, state = build(model)
    images, rule = Views.of(torch.randn(2, 8, 3, 32, 32)), trainer.gate_rule(config)
    first = step(state, images, rule, config, compute)
    assert first["open"] and first["loss"] is None and first["center"] is None
    step(state, images, rule, config, compute)
    assert first["loss"] > 0 and 0 < first["center"] <= 1 and first["bad"] is None and first["forward_s"] > 0
