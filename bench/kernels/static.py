"""Estimates of the Triton ops from their machine code, for a GPU that is not here: a step of ViT-L/14, 128 views.

    python bench/kernels/static.py [--gpu H200] [--only REGEX] [--json FILE] [--table FILE.md] [--against OLD.json]

Each launch of an op is compiled ahead of time. Its predicted time is that of its scarcest resource,

    t = max( bytes / bandwidth,
             tensor flops / tensor peak,
             waves * w * I / (clock * min(1, w / LATENCY)) )

with  bytes         of the launch's tensor arguments, each once (a cache may serve fewer reads than a kernel makes)
      tensor flops  of the tensor cores' instructions that are executed
      I             instructions that a warp executes (sass_executed.py), the mean over programs
      w             warps of one of the four schedulers of a multiprocessor: as many programs as registers, shared
                    memory and the grid allow
      waves         number of times that the multiprocessors are filled
      LATENCY       cycles between two instructions of one warp: a scheduler with fewer warps waits

and an op's is the sum over its launches plus LAUNCH_US each. The floor is max(bytes / bandwidth, flops / tensor peak)
of what the op has to move and to compute, whatever its implementation. Not seen: waits for barriers and for memory,
conflicts in shared memory, a few programs with more work than the others. Estimated, not measured.
Exit code 1 with --against: an op's prediction is more than WORSE times the old one.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests/helpers"), str(Path(__file__).parent)]

from kernel_launches import Launch, cuobjdump, launches, resources  # noqa: E402
from sass import Instruction, parse  # noqa: E402
from sass_executed import executed  # noqa: E402
from static_cases import WORK, Work  # noqa: E402

LATENCY = 8.0  # from a review's estimates, compared with one measurement: docs/performance.md
LAUNCH_US = 2.0  # from one kernel's end to the next one's start
WORSE = 1.1
SAMPLES = 16  # programs whose instructions are counted, fewer where they are ENOUGH
ENOUGH = 1_000_000


@dataclass(frozen=True)
class Gpu:
    """Facts about a GPU; times follow from what was measured on it where `measured`, else from its data sheet."""

    capability: tuple[int, int]
    processors: int
    gigahertz: float
    gigabytes_per_s: float
    teraflops: float  # of the tensor cores in 16 bit
    teraflops_fp8: float
    shared: int  # bytes of a multiprocessor
    measured: bool
    older_form: float = 1.0  # share of the peak that mma.sync reaches (Luo et al. 2024, arXiv:2402.13499, table 7)


GPUS = {
    "H200": Gpu((9, 0), 132, 1.755, 4300, 790, 1250, 233_472, True, 0.62),
    "H100": Gpu((9, 0), 132, 1.755, 3350, 989, 1979, 233_472, False, 0.62),
    "A100": Gpu((8, 0), 108, 1.41, 2039, 312, 312, 167_936, False),
}


@dataclass(frozen=True)
class Estimate:
    """Of one op; lists have an entry for each launch."""

    op: str
    kernels: list[str]
    registers: list[int]
    spilled: list[int]  # bytes a thread
    shared: list[int]  # bytes a program
    programs: list[int]
    warps: list[str]  # programs x warps on a multiprocessor
    instructions: list[float]  # of a warp
    unknown: list[int]  # branches that depend on data
    instructions_per_byte: float
    bytes: float
    limits: list[str]  # which resource is the scarcest
    launches_us: list[float]
    us: float
    floor_us: float
    ratio: float


def estimate(name: str, work: Work, gpu: Gpu) -> Estimate:
    """Compile the launches of one op and return what follows from their machine code."""
    found = launches(work.run, gpu.capability, processors=gpu.processors)
    rows = [_launch(launch, work, gpu) for launch in found]
    floor = max(work.bytes / gpu.gigabytes_per_s / 1e3, work.flops / gpu.teraflops / 1e6)
    us = sum(row["us"] for row in rows) + LAUNCH_US * len(rows)
    column = {key: [row[key] for row in rows] for key in rows[0]}
    moved = sum(column.pop("bytes"))
    issued = sum(column.pop("issued"))
    times = [round(time, 1) for time in column.pop("us")]
    return Estimate(
        op=name, **column, instructions_per_byte=round(32 * issued / moved, 2), bytes=moved, launches_us=times,
        us=round(us, 1), floor_us=round(floor, 1), ratio=round(us / floor, 2),
    )  # fmt: skip


def _launch(launch: Launch, work: Work, gpu: Gpu) -> dict[str, Any]:
    kernel = launch.kernel
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        used, code = resources(Path(file.name)), parse(cuobjdump("-sass", Path(file.name)))
        constants = _constants(launch, cuobjdump("-elf", Path(file.name)))
    warps, programs = kernel.metadata.num_warps, math.prod(launch.grid)
    fit = _resident(used["REG"], kernel.metadata.shared, warps, gpu)
    resident = min(fit, math.ceil(programs / gpu.processors))
    counts, unknown = _instructions(code, constants, launch, work)
    per_warp, moved = sum(counts.values()), _bytes(launch)
    of_scheduler = resident * warps / 4
    rate = min(1.0, of_scheduler / LATENCY)
    waves = max(1.0, programs / (resident * gpu.processors))
    times = {
        "bytes": moved / gpu.gigabytes_per_s / 1e3,
        "tensor cores": _tensor_seconds(counts, warps * programs, gpu) * 1e6,
        "instructions": waves * of_scheduler * per_warp / rate / gpu.gigahertz / 1e3,
    }
    limit = max(times, key=lambda key: times[key])
    return {
        "kernels": kernel.metadata.name, "registers": used["REG"], "spilled": max(used["STACK"], used["LOCAL"]),
        "shared": kernel.metadata.shared, "programs": programs, "warps": f"{resident} x {warps}",
        "instructions": round(per_warp, 1), "unknown": unknown, "limits": limit, "us": times[limit],
        "bytes": moved, "issued": per_warp * warps * programs,
    }  # fmt: skip


def _resident(registers: int, shared: int, warps: int, gpu: Gpu) -> int:
    """Return how many programs fit a multiprocessor: 65,536 registers, 64 warps, 32 programs, its shared memory."""
    of_warp = 256 * math.ceil(registers * 32 / 256)
    return max(1, min(65_536 // of_warp // warps, 64 // warps, 32, gpu.shared // (shared + 1024)))


def _bytes(launch: Launch) -> int:
    """Return the bytes of the tensors among the arguments, each once."""
    tensors = [getattr(value, "base", value) for value in launch.arguments.values()]
    found = {id(t): t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor)}
    return sum(found.values())


def _constants(launch: Launch, elf: str) -> dict[int, int]:
    """Return constant bank 0 of a launch as words by offset: sizes of block and grid, then the arguments."""
    ordinals = re.findall(r"Ordinal : (0x\w+)\s+Offset  : (0x\w+)\s+Size    : (0x\w+)", elf)
    places = [(int(o, 16), int(s, 16)) for _, o, s in sorted(ordinals, key=lambda row: int(row[0], 16))]
    base = int(re.findall(r"PARAM_CBANK\s+Format:\s+EIFMT_SVAL\s+Value:\s+0x\w+ (0x\w+)", elf)[0], 16) & 0xFFFF
    sizes = (32 * launch.kernel.metadata.num_warps, 1, 1, *launch.grid)
    words = {4 * i: size for i, size in enumerate(sizes)} | {0x28: 0}
    values = _values(launch)
    for i, (offset, size) in enumerate(places[: len(values)]):
        for word in range(0, size if values[i] is not None else 0, 4):
            words[base + offset + word] = (values[i] or 0) >> 8 * word & 0xFFFFFFFF
    return words


def _values(launch: Launch) -> list[int | None]:
    """Return the arguments as the driver gets them: addresses are made up; None: of no matter to control flow."""
    values: list[int | None] = []
    for i, (name, kind) in enumerate(launch.kernel.src.signature.items()):
        value = launch.arguments.get(name)
        if kind == "constexpr":
            continue
        if str(kind).startswith("tensordesc"):
            values += [None, *value.shape, *value.strides]
        elif str(kind).startswith("*"):
            values.append((i + 1) << 32)
        else:
            values.append(int(value) if isinstance(value, int) else None)
    return values


def _instructions(
    code: dict[int, Instruction], constants: dict[int, int], launch: Launch, work: Work
) -> tuple[Counter[str], int]:
    """Return the executions of each instruction by a warp, the mean over programs spread over the grid."""
    programs = math.prod(launch.grid)
    # spread by the golden section: even steps would meet the same program of every head
    chosen = dict.fromkeys(int(programs * (i * 0.6180339887 % 1)) for i in range(SAMPLES))
    total, unknown, done = Counter[str](), 0, 0
    for program in chosen:
        if total.total() > ENOUGH:
            break
        x, rest = program % launch.grid[0], program // launch.grid[0]
        place = {"SR_CTAID.X": x, "SR_CTAID.Y": rest % launch.grid[1], "SR_CTAID.Z": rest // launch.grid[1]}
        counts, guesses = executed(code, constants, place, work.repeats, work.outer_repeats)
        total.update(counts)
        unknown, done = max(unknown, guesses), done + 1
    return Counter({name: number / done for name, number in total.items()}), unknown


def _tensor_seconds(counts: Counter[str], warps: int, gpu: Gpu) -> float:
    """Return the time of the tensor cores' instructions: HGMMA and QGMMA of four warps together, HMMA of one."""
    seconds = 0.0
    for name, number in counts.items():
        if wide := re.match(r"([HQ])GMMA\.(\d+)x(\d+)x(\d+)", name):
            peak = gpu.teraflops if wide[1] == "H" else gpu.teraflops_fp8
            flops = 2 * math.prod(map(int, wide.groups()[1:])) / 4
        elif small := re.match(r"HMMA\.(16816|1688)\b", name):
            peak, flops = gpu.teraflops * gpu.older_form, {"16816": 4096, "1688": 2048}[small[1]]
        else:
            continue
        seconds += number * warps * flops / peak / 1e12
    return seconds


def table(rows: list[Estimate], old: dict[str, dict[str, Any]] | None = None) -> str:
    """Return the estimates as a table in Markdown, with the old prediction where there is one."""
    head = ["op", "registers", "spilled", "shared, KB", "programs x warps", "instructions of a warp", "MB", "floor, us",
            "predicted, us", "ratio", "limited by"]  # fmt: skip
    head += ["before, us"] if old is not None else []
    lines = [f"| {' | '.join(head)} |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for row in rows:
        cells = [
            row.op, _join(row.registers), _join(row.spilled), _join([round(s / 1024) for s in row.shared]),
            _join(row.warps), _join([f"{count:,.0f}" for count in row.instructions]), f"{row.bytes / 1e6:,.0f}",
            f"{row.floor_us:,.0f}", f"{row.us:,.0f}", f"{row.ratio:.1f}", _join(row.limits),
        ]  # fmt: skip
        if old is not None:
            cells.append(f"{old[row.op]['us']:,.0f}" if row.op in old else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _join(values: list[Any]) -> str:
    return str(values[0]) if len({str(value) for value in values}) == 1 else ", ".join(map(str, values))


def main(arguments: list[str] | None = None) -> int:
    """Print the estimates; return 1 if one is worse than in the file of --against."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", default="H200", choices=list(GPUS))
    parser.add_argument("--only", default="", help="ops whose name this regular expression finds")
    parser.add_argument("--json", type=Path, help="write the estimates there")
    parser.add_argument("--table", type=Path, help="write the table there")
    parser.add_argument("--against", type=Path, help="estimates to compare with")
    options = parser.parse_args(arguments)
    old = json.loads(options.against.read_text())["ops"] if options.against else None
    facts = {"gpu": options.gpu, "triton": triton.__version__, "torch": torch.__version__, "measured": False}
    rows: list[Estimate] = []
    for name, work in WORK.items():
        if not re.search(options.only, name):
            continue
        rows.append(estimate(name, work, GPUS[options.gpu]))
        print(f"{rows[-1].us:9.1f} us  {rows[-1].ratio:6.2f} x floor  {name}", file=sys.stderr, flush=True)
        if options.json:  # after each, as a run takes minutes
            ops = {row.op: asdict(row) for row in rows}
            options.json.write_text(json.dumps(facts | {"ops": ops}, indent=1) + "\n")
    text = table(rows, old)
    print(text)
    if options.table:
        options.table.write_text(text + "\n")
    worse = [row for row in rows if old and row.op in old and row.us > WORSE * old[row.op]["us"]]
    for row in worse:
        print(f"worse: {row.op}: {row.us} us, before {old[row.op]['us']} us" if old else "")
    return int(bool(worse))


if __name__ == "__main__":
    raise SystemExit(main())
