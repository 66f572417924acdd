"""Counts the instructions that a warp of a compiled kernel executes, from its machine code; nothing runs on a GPU.

A kernel's loops and branches depend on integers: arguments, the program's number, the thread's number. `executed`
interprets the integer instructions of lane 0 of warp 0; the results of all others are unknown (None). A branch on an
unknown condition falls through, as waits (for a barrier or a copy) do that have ended; one around a call is taken, as
calls are the slow paths of divisions. An instruction of a diverged warp counts once.

The end of a loop that depends on data is unknown too: such a loop is taken `repeats` times, one around another loop
`outer_repeats` times. The number of unknown branches is part of the result.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

from sass import Instruction, Lane
from sass_integers import step

LIMIT = 20_000_000  # instructions of one warp; more means a loop that does not end here
PATIENCE = 10_000  # visits of one unknown branch before it is taken
END = -1
_JUMPS = ("BRA", "EXIT", "CALL", "RET", "BRX")


def executed(
    code: Mapping[int, Instruction], constants: Mapping[int, int], special: Mapping[str, int], repeats: int = 1,
    outer_repeats: int = 1,
) -> tuple[Counter[str], int]:  # fmt: skip
    """Return (executions by the full name of an instruction, number of branches that were unknown).

    Raises RuntimeError after `LIMIT` instructions.
    """
    lane = Lane(constants, {"SR_LANEID": 0, "SR_TID.X": 0, "SR_TID.Y": 0, "SR_TID.Z": 0} | dict(special))
    addresses = sorted(code)
    after = dict(pairwise(addresses))
    visits, unknown, at = Counter[int](), Counter[int](), addresses[0]
    for _ in range(LIMIT):
        visits[at] += 1
        instruction = code[at]
        holds = lane.test(instruction.guard) if instruction.guard else True
        if instruction.name not in _JUMPS:
            if holds is not False:
                step(lane, instruction, known=holds is True)
            at = after[at]
            continue
        conditions = [holds, *(lane.test(o) for o in instruction.operands if o.kind == "p")]
        if None in conditions and False not in conditions:
            unknown[at] += 1
            conditions = [_guess(code, after, at, unknown[at], (repeats, outer_repeats))]
        at = _target(lane, instruction) if all(conditions) else after[at]
        if at == END:
            break
    else:
        raise RuntimeError(f"a warp executes more than {LIMIT} instructions")
    counts = Counter[str]()
    for address, number in visits.items():
        counts[code[address].full] += number
    return counts, len(unknown)


def _guess(
    code: Mapping[int, Instruction], after: Mapping[int, int], at: int, visits: int, repeats: tuple[int, int]
) -> bool:
    """Return whether an unknown branch is taken: loops run as often as told, and calls, which are slow paths, never.

    repeats: of a loop, of a loop around another one.
    """
    target = _goal(code[at])
    if END < target < at:
        return visits % repeats[_has_loop(code, target, at)] != 0
    ends = [address for address in code if at < address < target and END < _goal(code[address]) <= at]
    if ends:  # out of a loop that jumps back behind this branch
        return visits % repeats[_has_loop(code, _goal(code[ends[-1]]), ends[-1])] == 0
    ahead = after[at]
    while code[ahead].name not in _JUMPS:
        ahead = after[ahead]
    return code[ahead].name == "CALL" or visits % PATIENCE == 0


def _goal(instruction: Instruction) -> int:
    """Return where a branch leads; END: no branch."""
    return int(instruction.operands[-1].key) if instruction.name == "BRA" else END


def _has_loop(code: Mapping[int, Instruction], start: int, end: int) -> bool:
    """Return whether the loop from `start` to its branch at `end` has a loop inside; two ways back are one loop."""
    return any(start < _goal(code[address]) < address for address in code if start < address < end)


def _target(lane: Lane, instruction: Instruction) -> int:
    if instruction.name == "EXIT":
        return END
    where = instruction.operands[0 if instruction.name == "RET" else -1]
    target = lane.read(where)
    if target is None:
        raise RuntimeError(f"{instruction.full} to an unknown address")
    return target
