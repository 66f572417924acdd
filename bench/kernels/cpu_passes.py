"""The compiled passes of a block on a CPU against the library's ops, in turns, by processor time on one thread.

    python bench/kernels/cpu_passes.py --json bench/results/cpu_passes_avx512.json
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python bench/kernels/cpu_passes.py --json FILE

Results are compared before a time is given. Shapes: base_tiny with 32 views of 64 pixels, ViT-S/16 with 4 of 224.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from upstep_fast.kernels import adapter_gradients, block_passes
from upstep_fast.kernels.attention import cpp
from upstep_fast.kernels.attention.op import _backward_sdpa, _forward_sdpa
from upstep_fast.kernels.layer_norm import eager

Case = tuple[str, Callable[[], torch.Tensor], Callable[[], torch.Tensor]]  # op, the library's form, ours
MODELS = {"base_tiny, 32 views": (32, 65, 3), "ViT-S/16, 4 views": (4, 197, 6)}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def cases(batch: int, tokens: int, heads: int, dtype: torch.dtype) -> Iterator[Case]:
    """Yield each op on the tensors of one block of width 64 `heads`."""
    width, scale = 64 * heads, 0.125
    x, delta, d, skip = (torch.randn(batch * tokens, width).to(dtype) for _ in range(4))
    x_hat, _, rstd = block_passes._norm_cpp(x, delta, 1e-6)
    yield (
        "norm",
        lambda: block_passes._norm_library(x, delta, 1e-6)[0],
        lambda: block_passes._norm_cpp(x, delta, 1e-6)[0],
    )
    args = d, x_hat, rstd, skip
    yield "norm backward", lambda: eager.backward(*args), lambda: block_passes._norm_backward_cpp(*args)
    u, dg = (torch.randn(batch * tokens, 4 * width).to(dtype) for _ in range(2))
    slope = torch.empty_like(u)

    def library_gelu() -> torch.Tensor:
        F.gelu(u)
        return torch.ops.aten.gelu_backward(dg, u)

    def our_gelu() -> torch.Tensor:
        block_passes._gelu_cpp(u, "none", slope)
        return dg * slope

    yield "GELU, both directions", library_gelu, our_gelu
    r = 8
    a, shift, b = (0.1 * torch.randn(size).to(dtype) for size in ((3 * r, width), (3 * r,), (3, width, r)))
    adapter = torch.randn(batch * tokens, 3 * width).to(dtype), x, a, shift, b, (0, width, 2 * width)
    yield (
        "adapter gradients of q, k, v",
        lambda: adapter_gradients.library(*adapter)[0],
        lambda: adapter_gradients._cpp(*adapter)[0],
    )
    qkv, grad = torch.randn(batch, tokens, 3, heads, 64).to(dtype), torch.randn(batch, tokens, heads, 64).to(dtype)
    out, lse = cpp.forward(qkv, scale)
    yield "attention", lambda: _forward_sdpa(qkv, scale)[0], lambda: cpp.forward(qkv, scale)[0]
    back = grad, qkv, out, lse, scale
    yield "attention backward", lambda: _backward_sdpa(*back), lambda: cpp.backward(*back)


def milliseconds(call: Callable[[], torch.Tensor]) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    call()
    return 1e3 * (time.process_time() - start)


def row(case: Case, runs: int) -> dict[str, object]:
    """Compare and time one op; the forms take turns."""
    op, library, ours = case
    expected, got = library().float(), ours().float()
    error = ((got - expected).norm() / expected.norm()).item()
    pairs = [(milliseconds(library), milliseconds(ours)) for _ in range(runs)]
    before, after = (statistics.median(times) for times in zip(*pairs, strict=True))
    return {"op": op, "library_ms": before, "cpp_ms": after, "ratio": before / after, "difference": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    if missing := block_passes.unsupported_reason(torch.zeros(1)):  # loads the compiled ops
        raise SystemExit(missing)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for model, shape in MODELS.items():
        for dtype, tolerance in TOLERANCE.items():
            for case in cases(*shape, dtype):
                found = row(case, args.runs)
                if not float(str(found["difference"])) < tolerance:
                    raise SystemExit(f"{found['op']}, {model}, {dtype}: differs by {found['difference']}: not timed")
                rows.append({"shape": model, "dtype": str(dtype).removeprefix("torch."), **found})
                print(rows[-1])
    card = {"capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__, "threads": 1}
    args.json.write_text(json.dumps({**card, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
