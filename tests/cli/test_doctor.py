"""doctor: every kernel is checked, a broken one is found, and what it prints is what it found."""

import json
import logging
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch

from upstep_fast.cli import doctor
from upstep_fast.cli.commands import main
from upstep_fast.engine import block as blocks
from upstep_fast.kernels import _dispatch as dispatch
from upstep_fast.kernels import _self_check as self_check
from upstep_fast.kernels._sample_inputs import MODULES
from upstep_fast.kernels._self_check import SAMPLE_INPUTS, check, check_all, relative_error, sample_inputs

CPU = torch.device("cpu")
KERNELS = Path(dispatch.__file__).parent


@pytest.fixture(scope="module")
def on_cpu():
    return check_all(CPU)


def of(outcomes, op):
    return {outcome.implementation: outcome for outcome in outcomes if outcome.op == op}


def test_every_file_with_an_op_has_a_check():
    # an op's name is registered under the namespace of its copy of the folder
    defines = re.compile(r'\(f"{NAMESPACE}::|^from ..?_define import|library.define\(', re.M)
    files = [path for path in KERNELS.rglob("[a-z]*.py") if defines.search(path.read_text())]
    names = (".".join(path.relative_to(KERNELS).with_suffix("").parts) for path in files)
    modules = {re.sub(r"[.](op|bare)$", "", name) for name in names}
    assert modules == {MODULES.get(name, name) for name in SAMPLE_INPUTS}


def test_all_is_well_here(on_cpu):
    outcomes, choices = on_cpu
    assert {outcome.op for outcome in outcomes} == SAMPLE_INPUTS.keys()
    for outcome in outcomes:
        assert outcome.passed is not False, outcome
        assert (outcome.forward is None) == (outcome.passed is None)
    for op in SAMPLE_INPUTS:
        # the way that is chosen, and the reference, were both tried
        assert sum("(chosen)" in name for name in of(outcomes, op)) == 1
        assert any("reference" in name for name in of(outcomes, op)), op
    assert all(choice.device == "cpu" and choice.reason for choice in choices)
    assert not any(choice.reason == "requested" for choice in choices)
    assert {"center_vector", "sinkhorn", "gelu_backward", "lora_linear"} <= {choice.op for choice in choices}


def test_what_cannot_run_is_said_and_fails_nothing(on_cpu):
    cuda = of(on_cpu[0], "center_vector")["cuda"]
    assert cuda.passed is None and "needs CUDA tensors" in cuda.note


@pytest.mark.parametrize("name", SAMPLE_INPUTS)
def test_a_kernel_that_is_wrong_is_found(name, monkeypatch):
    make = SAMPLE_INPUTS[name]

    def wrong(result):
        def changed(ops):
            problem = make(ops)
            return replace(problem, call=lambda *inputs: result(problem.call(*inputs), inputs, problem.wrt))

        monkeypatch.setitem(SAMPLE_INPUTS, name, changed)
        return check(name, CPU, torch.float32)[0]

    assert wrong(lambda y, *_: y).passed is True
    assert wrong(lambda y, *_: y * 0.99).passed is False
    assert wrong(lambda y, *_: torch.zeros_like(y) * y).passed is False
    assert wrong(lambda y, *_: y + math.nan).passed is False
    # the value is right and the gradient of one input is not
    for i in sample_inputs(name).wrt:
        outcome = wrong(lambda y, inputs, _, i=i: y + 0.1 * (inputs[i] - inputs[i].detach()).sum())
        assert outcome.passed is False and outcome.forward <= outcome.limit < outcome.backward


def test_a_kernel_that_raises_fails_alone(monkeypatch):
    def raises(ops):
        raise RuntimeError("no such symbol\nand more")

    monkeypatch.setitem(SAMPLE_INPUTS, "gelu", raises)
    monkeypatch.setitem(SAMPLE_INPUTS, "no_such_module", SAMPLE_INPUTS["sinkhorn"])
    outcome, _ = check("gelu", CPU, torch.float32)
    assert outcome.passed is False and outcome.note == "no such symbol"
    assert "no_such_module" in check("no_such_module", CPU, torch.float32)[0].note
    assert check("sinkhorn", CPU, torch.float32)[0].passed


def test_relative_error():
    x = torch.randn(100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert relative_error(x * (1 + 1e-6), x) == pytest.approx(1e-6, rel=1e-6)
    assert relative_error(x, x) == 0 and relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert math.isnan(relative_error(torch.full((3,), math.nan), torch.ones(3)))


def call(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--device", "cpu", *args])
    out, err = capsys.readouterr()
    return stop.value.code, out, err


@pytest.fixture
def quick(monkeypatch):
    """Two ops instead of all, and little time for the speeds."""
    for name in SAMPLE_INPUTS.keys() - {"sinkhorn", "center_vector"}:
        monkeypatch.delitem(SAMPLE_INPUTS, name)
    speed = doctor.loading_speed
    monkeypatch.setattr(doctor, "loading_speed", lambda device: speed(device, 0.02))
    logger = logging.getLogger("upstep_fast")
    before = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


def test_json_is_all_that_is_printed(capsys, quick):
    code, out, err = call(capsys, "--json")
    found = json.loads(out, parse_constant=pytest.fail)
    assert code == 0 and err == "" and found["ok"] is True
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__.startswith(
        found["versions"]["torch"]
    )
    assert {row["op"] for row in found["kernels"]} >= {"sinkhorn", "center_vector"}
    assert all(row["reason"] for row in found["kernels"])
    assert found["free_disk_bytes"] > 0 and found["data"]["decoded_per_s"] > 0
    assert found["data"]["made_into_two_views_per_s"] > 0
    assert found["native"]["compiled ops"]


def test_tables(capsys, quick):
    code, out, err = call(capsys)
    assert code == 0 and err == "" and "\x1b[" not in out  # no colors into a pipe
    for text in ("torch", "GPU", "C++ compiler", "free disk", "sinkhorn", "center_vector", "what runs", "ok"):
        assert text in out
    assert "not here: cuda: needs CUDA tensors" in out and "FAILED" not in out


BASE_TINY = f"local-dir:{Path(doctor.__file__).parents[1] / 'assets' / 'base_tiny'}"


def test_a_model_of_the_engine(capsys, quick):
    code, out, _ = call(capsys, "--json", "--model", BASE_TINY)
    found = json.loads(out, parse_constant=pytest.fail)["model"]
    assert code == 0 and (found["runs"], found["reason"], found["blocks_by_timm"]) == ("engine", None, {})
    assert 0 < found["gradient"] < 5e-2 and found["features"] < 5e-2  # bf16 on some CPUs
    _, out, _ = call(capsys, "--model", BASE_TINY)
    assert "runs on the engine" in out and "gradient: difference" in out


@pytest.mark.parametrize("planted", [False, True])
def test_a_model_that_the_engine_leaves_to_timm(planted, capsys, quick, monkeypatch, tmp_path):
    from timm.models import save_for_hf

    attn = {} if planted else {"attn_layer": "diff"}
    args = {"img_size": 32, "embed_dim": 48, "num_heads": 2, "depth": 2, "num_classes": 0, **attn}
    save_for_hf(timm.create_model("vit_tiny_patch16_224", **args), tmp_path, model_args=args)
    if planted:
        attend = blocks.attend
        monkeypatch.setattr(blocks, "attend", lambda y, heads, sizes: attend(-y, heads, sizes))
    code, out, _ = call(capsys, "--json", "--model", f"local-dir:{tmp_path}")
    found = json.loads(out, parse_constant=pytest.fail)["model"]
    assert code == 0 and found["runs"] == "plain model"
    wanted = "features differ from the plain model's" if planted else "block 0 has a DiffAttention for attention"
    assert wanted in found["reason"]
    _, out, _ = call(capsys, "--model", f"local-dir:{tmp_path}")
    assert "runs on the plain model" in out and found["reason"][:30] in out


def test_an_architecture_alone_is_refused(capsys):
    code, _, err = call(capsys, "--arch", "vit_tiny_patch16_224")
    assert code == 2 and "name the file with --model" in err


def test_a_failed_check_is_exit_code_1(capsys, quick, monkeypatch):
    make = SAMPLE_INPUTS["sinkhorn"]
    monkeypatch.setitem(
        SAMPLE_INPUTS, "sinkhorn", lambda ops: replace(make(ops), call=lambda x: torch.full_like(x, math.nan))
    )
    for flags in ((), ("--json",)):
        code, out, err = call(capsys, *flags)
        assert code == 1 and err.count("\n") == 1 and "sinkhorn" in err and "self-checks failed" in err
        if flags:
            found = json.loads(out, parse_constant=pytest.fail)
            assert found["ok"] is False and {"nan"} == {c["forward"] for c in found["checks"] if c["passed"] is False}
        else:
            assert "FAILED" in out and " nan " in out


def test_a_device_that_is_not_there(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--device", "cuda:99"])
    assert stop.value.code == 2 and "cuda:99" in capsys.readouterr().err


def test_speeds_take_the_time_they_are_given():
    start = time.monotonic()
    speed = doctor.loading_speed(CPU, 0.05)
    assert all(value > 0 for value in speed.values())
    # making the images and one batch of views on a busy machine included
    assert time.monotonic() - start < 30


def test_log_level_is_put_back(quick):
    logger = logging.getLogger(dispatch.__name__)
    before = logger.level
    doctor.examine("cpu")
    assert logger.level == before and dispatch.requested() is None


def test_what_is_asked_for_in_the_environment_is_what_is_reported(quick, monkeypatch):
    monkeypatch.setenv("UPSTEP_FAST_KERNELS", "reference")
    found = doctor.examine("cpu")
    assert found["asked_for"] == "reference"
    assert {(row["op"], row["implementation"]) for row in found["kernels"]} >= {("center_vector", "reference")}


@pytest.mark.gpu
def test_every_kernel_on_this_gpu():
    outcomes, choices = check_all(torch.device("cuda"))
    for outcome in outcomes:
        assert outcome.passed is not False, outcome
    for op in SAMPLE_INPUTS:
        run = {(o.implementation.removesuffix(" (chosen)"), o.dtype) for o in outcomes if o.op == op and o.passed}
        kind = "cuda" if op == "center_vector" else "triton"
        assert {(kind, "float32"), (kind, "bfloat16")} <= run, (op, run)
    assert all(choice.device == "cuda" for choice in choices)
    assert self_check.LIMITS[torch.float32] < self_check.LIMITS[torch.bfloat16]
