"""What commands import before they work: nothing that takes long and is not used."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import threading
from importlib.metadata import version

import pytest

# imported by none of the commands before its work, whichever of them are installed
SLOW = (
    *("torch._dynamo", "torch._inductor", "sympy", "triton.compiler.code_generator", "jinja2", "wandb", "tensorboard"),
    *("scipy", "sklearn", "pandas", "pyarrow", "matplotlib", "umap", "numba", "mlflow", "peft", "transformers"),
    *("datasets", "onnx", "onnxruntime", "ray", "faiss", "tifffile", "zarr", "pydicom", "nibabel", "astropy"),
)
PROGRAM = """
import gc, json, sys
from importlib import import_module
from upstep_fast.cli.commands import COMMANDS
gc.disable()
for name, command in COMMANDS.items():
    command.config()
    if command.module and name != "export":  # torch.export needs sympy
        import_module(f"upstep_fast.{command.module}")
slow = [name for name in SLOW if name in sys.modules]
import timm, timm.utils.summary, torch
stand_ins = [name for name, module in sys.modules.items() if type(module).__name__ == "StandIn"]
from torchvision.ops import roi_align as _
roi = sys.modules["torchvision.ops.roi_align"]
asked = [roi.is_compile_supported(device) for device in ("cpu", "mps")]
from torch._dynamo import utils
same = [utils.is_compile_supported(device) for device in ("cpu", "mps")]
import torch._dynamo
real = torch._dynamo.utils is utils and sys.modules["torch._dynamo"] is torch._dynamo
model = timm.create_model("naflexvit_base_patch16_gap", depth=1, embed_dim=32, num_heads=2, num_classes=0).eval()
x = torch.rand(1, 3, 32, 32)
parts = torch._dynamo.explain(model)(x)
error = (torch.compile(model, backend="eager")(x) - model(x)).abs().max().item()
logs = getattr(timm.utils.summary, "wandb", None)
print(json.dumps([slow, stand_ins, asked, same, real, parts.graph_break_count, error, logs and logs.__version__]))
"""


def test_no_command_imports_what_it_may_not_need_and_timm_is_complete():
    program = PROGRAM.replace("SLOW", repr(SLOW))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    slow, stand_ins, asked, same, real, breaks, error, wandb = json.loads(done.stdout)
    assert slow == [] and stand_ins == []
    assert asked == same and real
    assert breaks == 0 and error < 1e-6  # as with timm imported by itself
    assert wandb == (None if importlib.util.find_spec("wandb") is None else version("wandb"))


def test_a_stand_in_gives_way_to_the_real_module(monkeypatch: pytest.MonkeyPatch):
    from upstep_fast.model import timm_import

    monkeypatch.setattr(timm_import, "STAND_INS", {"colorsys": {"given": int}})
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    threads = [threading.current_thread(), threading.Thread(name="upstep-progress")]
    monkeypatch.setattr(threading, "enumerate", lambda: threads)  # pytest has some of its own
    with timm_import.standing_in():
        import colorsys

        assert type(colorsys) is timm_import.StandIn and colorsys.given is int
        assert colorsys.rgb_to_hls(1, 0, 0) == (0.0, 0.5, 1.0)  # whatever was not given: the real one, from now on
        import colorsys as again

        assert type(again) is not timm_import.StandIn
        with pytest.raises(AttributeError):
            getattr(colorsys, "missing")  # noqa: B009
    monkeypatch.delitem(sys.modules, "colorsys")
    threads.append(threading.Thread())
    with timm_import.standing_in():  # the other thread might import a submodule, which a stand-in has not
        assert "colorsys" not in sys.modules
    threads.pop()
    with timm_import.standing_in():
        pass
    assert "colorsys" not in sys.modules
