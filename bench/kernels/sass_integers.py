"""What the integer instructions of sm_80 and sm_90 compute; sources: cuobjdump's names, and the manual of PTX."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Callable

from sass import WORD, Instruction, Lane, Operand

Operands = tuple[Operand, ...]
Rule = Callable[[Lane, Instruction, Operands, Operands], None]


def step(lane: Lane, instruction: Instruction, known: bool) -> None:
    """Execute an instruction that is no jump; if it is not known to execute, its results become unknown."""
    operands = instruction.operands
    name = instruction.name.removeprefix("U") if instruction.name[:2] != "UT" else instruction.name
    rule = _RULES.get(name) if known else None
    # "IADD3 R6, P0, R2, UR4, RZ": a result, predicates with carries, sources
    results = {"ISETP": 2, "PLOP3": 2, "VOTE": 1, "VOTEU": 1, "R2P": 0}.get(name, 1)
    while name[:3] in ("IAD", "IMA", "LEA") and operands[results].kind == "p" and not operands[results].sign:
        results += 1
    if rule is not None:
        rule(lane, instruction, operands[:results], operands[results:])
    elif operands and name not in _NO_RESULT:
        words = 4 if "128" in instruction.kinds else 2 if {"64", "WIDE"} & set(instruction.kinds) else 1
        first = next((i for i, operand in enumerate(operands) if operand.kind != "p"), 0)
        for operand in (*operands[:results], *operands[:first], *(operands[first : first + 1])):
            lane.write(operand, None, words)


_NO_RESULT = ("BAR", "WARPSYNC", "BSSY", "BSYNC", "DEPBAR", "STS", "STG", "RED", "NOP", "ERRBAR", "MEMBAR", "CCTL")


def _signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> bits - 1 & 1 else value


def _values(lane: Lane, operands: Operands) -> list[int] | None:
    """Return the operands that are no predicates, or None if one is unknown."""
    values = [lane.read(operand) for operand in operands if operand.kind != "p"]
    return None if None in values else [value for value in values if value is not None]


def _carry(lane: Lane, instruction: Instruction, operands: Operands) -> int | None:
    """Return the carry into an instruction of kind X."""
    if "X" not in instruction.kinds:
        return 0
    values = [lane.test(operand) for operand in operands if operand.kind == "p"]
    return None if None in values else sum(map(bool, values))


def _give(lane: Lane, results: Operands, total: int | None, words: int = 1) -> None:
    """Write a sum, and its carries to the predicates behind it."""
    lane.write(results[0], total, words)
    for i, result in enumerate(results[1:], 1):
        lane.write(result, None if total is None else int(total >> 32 * words >= i))


def _move(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    if "64" in instruction.kinds or (instruction.name == "CS2R" and "32" not in instruction.kinds):
        lane.write(results[0], lane.pair(operands[0]), 2)
    else:
        lane.write(results[0], lane.read(operands[0]))


def _add(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    words = 2 if "64" in instruction.kinds else 1
    sources = [operand for operand in operands if operand.kind != "p"]
    values = [(lane.pair if words == 2 else lane.read)(source._replace(sign="")) for source in sources]
    carry = _carry(lane, instruction, operands)
    if carry is None or None in values:
        return _give(lane, results, None, words)
    limit = WORD**words
    total = carry
    for source, value in zip(sources, values, strict=True):
        # -x is ~x + 1, with its carry
        total += {"": value or 0, "-": limit - (value or 0), "~": limit - 1 - (value or 0)}[source.sign]
    return _give(lane, results, total, words)


def _multiply(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    a, b = (lane.read(operand) for operand in operands[:2])
    carry, kinds = _carry(lane, instruction, operands), instruction.kinds
    words, wide = 2 if "WIDE" in kinds else 1, bool({"WIDE", "HI"} & set(kinds))
    c = lane.pair(operands[2]) if wide else lane.read(operands[2])
    if carry is None or c is None or (None in (a, b) and 0 not in (a, b)):
        return _give(lane, results, None, words)
    a, b = a or 0, b or 0
    if wide and "U32" not in kinds:
        a, b = _signed(a), _signed(b)
    total = a * b + c + carry
    return _give(lane, results, total >> 32 if "HI" in kinds else total, words)


def _shift_add(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    """Compute (a << s) + b; HI: with the upper word of {c, a} << s, where SX32 makes c of a's sign."""
    values, carry = _values(lane, operands), _carry(lane, instruction, operands)
    if values is None or carry is None:
        return _give(lane, results, None)
    a, b, *middle, shift = values
    if "HI" in instruction.kinds:
        upper = _signed(a) >> 31 if "SX32" in instruction.kinds else middle[0]
        a = ((upper % WORD) << 32 | a) << shift >> 32
    else:
        a <<= shift
    return _give(lane, results, a % WORD + b + carry)


def _shift(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    """Shift one word, or with U64 or S64 the two words {c, a}."""
    kinds = set(instruction.kinds)
    a, s, c = (lane.read(operand) for operand in operands[:3])
    high, long = "HI" in kinds, bool({"U64", "S64"} & kinds) or "L" in kinds
    if not long:
        a, c = (0, c) if high else (a, 0)
    if a is None or s is None or c is None:
        lane.write(results[0], None)
    elif not long:
        value = c if high else a
        lane.write(results[0], (_signed(value) if "S32" in kinds else value) >> s)
    else:
        value = c << 32 | a
        value = value << s if "L" in kinds else (_signed(value, 64) if "S64" in kinds else value) >> s
        lane.write(results[0], value >> 32 if high else value)


def _logic(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    """Look three words up in a truth table; a predicate among the results tells whether a bit is set."""
    if results[0].kind == "p":  # "LOP3.LUT P0, RZ, R3, 0x1f, RZ, 0xc0, !PT"
        results, operands = (operands[0], *results), operands[1:]
    values, table = _values(lane, operands[:3]), lane.read(operands[3])
    value = None
    if values is not None and table is not None:
        value = 0
        for i in range(8):
            a, b, c = (v if i >> bit & 1 else ~v for v, bit in zip(values, (2, 1, 0), strict=True))
            value |= a & b & c & WORD - 1 if table >> i & 1 else 0
    lane.write(results[0], value)
    for result in results[1:]:
        lane.write(result, None if value is None else int(value != 0))


def _compare(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    """Compare, and combine with a predicate; EX: upper words, with the lower words' result behind it."""
    kinds, pair, holds = instruction.kinds, _values(lane, operands[:2]), None
    if pair is not None:
        a, b = pair if "U32" in kinds else map(_signed, pair)
        order = {"LT": a < b, "LE": a <= b, "GT": a > b, "GE": a >= b, "EQ": a == b, "NE": a != b}
        holds = lane.test(operands[3]) if "EX" in kinds and a == b else order[kinds[0]]
    other = lane.test(operands[2])
    for result, value in zip(results, (holds, None if holds is None else not holds), strict=False):
        combined = _combine(kinds, value, other)
        lane.write(result, None if combined is None else int(combined))


def _combine(kinds: tuple[str, ...], a: bool | None, b: bool | None) -> bool | None:
    if "AND" in kinds:
        return False if False in (a, b) else None if None in (a, b) else True
    if "OR" in kinds:
        return True if True in (a, b) else None if None in (a, b) else False
    return None if None in (a, b) else a != b


def _predicates(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    """Look three predicates up in a truth table; the second result has its own."""
    inputs = [lane.test(operand) for operand in operands[:3]]
    for result, source in zip(results, operands[3:5], strict=True):
        table = lane.read(source) or 0
        outcomes = {
            table >> i & 1
            for i in range(8)
            if all(value is None or value == bool(i >> bit & 1) for value, bit in zip(inputs, (2, 1, 0), strict=True))
        }
        lane.write(result, outcomes.pop() if len(outcomes) == 1 else None)


def _select(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    first = lane.test(operands[2])
    lane.write(results[0], None if first is None else lane.read(operands[0 if first else 1]))


def _least(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    values, least = _values(lane, operands[:2]), lane.test(operands[2])
    if values is None or least is None:
        return lane.write(results[0], None)
    return lane.write(results[0], (min if least else max)(values, key=int if "U32" in instruction.kinds else _signed))


def _absolute(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    value = lane.read(operands[0])
    lane.write(results[0], None if value is None else abs(_signed(value)))


def _extend(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    values = _values(lane, operands)
    if values is None:
        return lane.write(results[0], None)
    value, bits = values[0] & (1 << values[1]) - 1, values[1]
    return lane.write(results[0], value if "U32" in instruction.kinds else _signed(value, bits))


def _permute(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    values = _values(lane, operands)
    if values is None or len(values) < 3 or len(instruction.kinds):
        return lane.write(results[0], None)
    a, chosen, c = values
    both, value = c << 32 | a, 0
    for i in range(4):
        nibble = chosen >> 4 * i & 0xF
        byte = both >> 8 * (nibble & 7) & 0xFF
        value |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return lane.write(results[0], value)


def _float(bits: int) -> float:
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def _bits(value: float) -> int:
    return struct.unpack("<I", struct.pack("<f", value))[0]


def _to_float(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    """Convert, rounded up for RP: the first step of a division of integers."""
    value = lane.read(operands[0])
    if value is None:
        return lane.write(results[0], None)
    value = value if "U32" in instruction.kinds else _signed(value)
    bits = _bits(value)
    return lane.write(results[0], bits + ("RP" in instruction.kinds and _float(bits) < value))


def _reciprocal(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    value = lane.read(operands[0])
    known = "RCP" in instruction.kinds and value is not None and value & 0x7FFFFFFF
    lane.write(results[0], _bits(1 / _float(value or 0)) if known else None)


def _to_integer(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    bits = lane.read(operands[0])
    value = None if bits is None else _float(bits)
    if value is None or not math.isfinite(value) or "TRUNC" not in instruction.kinds:
        return lane.write(results[0], None)
    least, most = (0, WORD - 1) if "U32" in instruction.kinds else (-WORD // 2, WORD // 2 - 1)
    return lane.write(results[0], min(max(int(value), least), most))


def _vote(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    value = lane.test(operands[-1]) if results[0].kind == "p" else None
    lane.write(results[0], None if value is None else int(value))


def _elect(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    lane.write(results[0], 1)


def _shuffle(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    """Read lane 0 if it is asked for; other lanes are unknown."""
    own = "IDX" in instruction.kinds and lane.read(operands[2]) == 0
    lane.write(results[0], 1)
    lane.write(operands[0], lane.read(operands[1]) if own else None)


def _unpack(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    """R2P PR, R3, 0x7f: the predicates of a mask from bits."""
    value, mask = lane.read(operands[1]), lane.read(operands[2]) or 0
    byte = next((int(kind[1]) for kind in instruction.kinds if re.fullmatch(r"B\d", kind)), 0)
    for i in range(7):
        if mask >> i & 1:
            lane.at[f"P{i}"] = None if value is None else value >> 8 * byte + i & 1


def _pack(lane: Lane, instruction: Instruction, results: Operands, operands: Operands) -> None:
    """P2R R0, PR, R1, 0x7f: bits of a mask from predicates, the others from a register."""
    rest, mask = lane.read(operands[1]), lane.read(operands[2]) or 0
    bits = [lane.at.get(f"P{i}") for i in range(7) if mask >> i & 1]
    if rest is None or None in bits or instruction.kinds:
        return lane.write(results[0], None)
    value = rest & ~mask
    for i in range(7):
        value |= (lane.at[f"P{i}"] or 0) << i if mask >> i & 1 else 0
    return lane.write(results[0], value)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(("MOV", "LDC", "R2UR", "S2R", "S2UR", "CS2R"), _move),
    **dict.fromkeys(("IADD3", "VIADD", "IADD"), _add), "IMAD": _multiply, "LEA": _shift_add, "SHF": _shift,
    "LOP3": _logic, "PRMT": _permute, "SGXT": _extend, "IABS": _absolute, "IMNMX": _least, "VIMNMX": _least,
    "SEL": _select, "ISETP": _compare, "PLOP3": _predicates, "R2P": _unpack, "P2R": _pack,
    "I2F": _to_float, "MUFU": _reciprocal, "F2I": _to_integer,
    "VOTE": _vote, "VOTEU": _vote, "ELECT": _elect, "SHFL": _shuffle,
}  # fmt: skip
