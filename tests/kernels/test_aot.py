"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 and keeps within their limits. Needs no GPU.

A case calls a launcher, or a public function, on meta tensors. What it launches is compiled as that GPU would get it
(arguments, their alignment, the row of TILES, the options of the launch) and not run. To add an op write
tests/aot/<op>.py:

    CASES = {"forward bf16": forward, ...}       a representative tile per kernel; in make test
    LONG = {...}                                 the other dtypes, tiles and variants; in make long

    def forward(capability):                     (8, 0), (9, 0) or (10, 0)
        launcher(torch.empty(4096, 1024, dtype=torch.bfloat16, device="meta"), tma=capability >= (9, 0))

Where a launcher asks the device, a meta tensor is "no CUDA device": pass such choices in, as tma above.
`test_every_kernel_has_a_case` fails while a top-level kernel of kernels/ is launched by no case of CASES.
Triton caches what it compiles (~/.triton/cache), so a second run takes seconds.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from upstep_fast import kernels

triton = pytest.importorskip("triton")
from kernel_launches import Capability, Case, cuobjdump, launches, resources  # noqa: E402  (imports triton)

pytestmark = pytest.mark.aot

# bytes of shared memory that one program may have
SHARED = {(8, 0): 166_912, (9, 0): 232_448, (10, 0): 232_448}
# GPUs without a row of TILES and with less of it: the representative cases, in make long
OTHERS = {(8, 9): 101_376, (12, 0): 101_376}
PROGRAM_SHARED = 1024  # that the driver adds to each program's
TENSOR_MEMORY = 512
# a call frame of a few words is not a spill
STACK = 16


def load(path: Path) -> SimpleNamespace:
    spec = importlib.util.spec_from_file_location(f"aot_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return SimpleNamespace(CASES=module.CASES, LONG=getattr(module, "LONG", {}))


OPS = {path.stem: load(path) for path in sorted(Path(__file__).with_name("aot").glob("*.py"))}


def parameters() -> Iterator[object]:
    for op, cases in OPS.items():
        for capability in SHARED:
            sm = f"sm_{capability[0]}{capability[1]}"
            for name, case in cases.CASES.items():
                yield pytest.param(case, capability, id=f"{op}-{name}-{sm}")
            for name, case in cases.LONG.items():
                yield pytest.param(case, capability, id=f"{op}-{name}-{sm}", marks=pytest.mark.long)
        for capability in OTHERS:
            for name, case in cases.CASES.items():
                sm = f"sm_{capability[0]}{capability[1]}"
                yield pytest.param(case, capability, id=f"{op}-{name}-{sm}", marks=pytest.mark.long)


@pytest.mark.parametrize(("case", "capability"), list(parameters()))
def test_compiles_within_limits(case: Case, capability: Capability, tmp_path: Path):
    compiled = launches(case, capability)
    assert compiled, "the case launched no kernel"
    limit = (SHARED | OTHERS)[capability]
    for kernel in dict.fromkeys(launch.kernel for launch in compiled):
        name = kernel.metadata.name
        assert kernel.metadata.shared <= limit, f"{name}: {kernel.metadata.shared} bytes of shared memory"
        if kernel.metadata.launch_cooperative_grid:
            # programs that wait for one another must all be resident: sinkhorn/triton.py has 16 warps a processor
            assert kernel.metadata.maxnreg == 128, f"{name}: a resident grid wants maxnreg=128"
            of_processor = 16 // kernel.metadata.num_warps * (kernel.metadata.shared + PROGRAM_SHARED)
            assert of_processor <= limit + PROGRAM_SHARED, f"{name}: {of_processor} bytes a processor, not resident"
        assert (getattr(kernel.metadata, "tmem_size", None) or 0) <= TENSOR_MEMORY, f"{name}: tensor memory"
        cubin = tmp_path / f"{name}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = resources(cubin)
        assert usage["STACK"] <= STACK and usage["LOCAL"] <= STACK, f"{name} spills registers: {usage}"
        # ptxas makes a lone trap of what a target cannot do; a real kernel writes somewhere
        sass = cuobjdump("--dump-sass", cubin)
        assert re.search(r"\b(ST|STG|ATOMG?|RED|REDG|UTMASTG|UBLKCP)\b", sass), f"{name} stores nothing"


@pytest.mark.parametrize("op", OPS)
def test_cases_name_what_they_launch(op: str):
    for name, case in OPS[op].CASES.items():
        assert launches(case, (9, 0), compiles=False), f"{name} launches nothing"


def test_every_kernel_has_a_case():
    names = {
        m.name for m in pkgutil.walk_packages(kernels.__path__, f"{kernels.__name__}.") if "__main__" not in m.name
    }
    functions = {
        function
        for module in map(importlib.import_module, sorted(names))
        for function in vars(module).values()
        if isinstance(function, triton.JITFunction) and function.fn.__module__.startswith(kernels.__name__)
    }
    calls = (node for f in functions for node in ast.walk(ast.parse(f.src)) if isinstance(node, ast.Call))
    called = {ast.unparse(call.func).split(".")[-1] for call in calls}
    top_level = {function for function in functions if function.fn.__name__ not in called}
    assert top_level, "found no kernels: the search itself is broken"
    covered = {function for op in OPS.values() for case in op.CASES.values() for function in kernels_of(case)}
    missing = sorted(f"{f.fn.__module__}.{f.fn.__name__}" for f in top_level - covered)
    assert not missing, f"no case in tests/aot compiles {', '.join(missing)}"


def kernels_of(case: Case) -> set:
    return {launch.function for launch in launches(case, (9, 0), compiles=False)}
