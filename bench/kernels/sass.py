"""Machine code of NVIDIA GPUs as cuobjdump prints it, and the registers of one lane that executes it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

WORD = 1 << 32

_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.M)


class Operand(NamedTuple):
    """Operand of an instruction; kind: register, constant bank, immediate, special, predicate, memory: the initial."""

    kind: str
    key: str | int
    sign: str  # "", "-", "~" or "!"


class Instruction(NamedTuple):
    """Line of machine code."""

    guard: Operand | None
    name: str  # IMAD
    kinds: tuple[str, ...]  # ("WIDE", "U32")
    operands: tuple[Operand, ...]
    full: str  # IMAD.WIDE.U32


def parse(text: str) -> dict[int, Instruction]:
    """Return the instructions of a file with one kernel by address; text: of `cuobjdump --dump-sass`."""
    found = {}
    for address, guard, full, rest in _LINE.findall(text):
        name, *kinds = full.split(".")
        # "RET.REL.NODEC R4 0x0": the address is in R4
        operands = tuple(_operand(part.split()[0]) for part in rest.split(",") if part.strip())
        found[int(address, 16)] = Instruction(_operand(guard) if guard else None, name, tuple(kinds), operands, full)
    return found


def _operand(text: str) -> Operand:
    sign = text[0] if text[:1] in ("-", "~", "!") else ""
    text = text.removeprefix(sign).removesuffix(".reuse")
    if re.fullmatch(r"U?P(\d|T)", text):
        return Operand("p", text, sign)
    if found := re.fullmatch(r"(U?R(?:\d+|Z)|SRZ)(\.64|\.U32|\.H0_H0|\.X4|\.X8|\.X16)?", text):
        return Operand("r", found[1], sign)
    if found := re.fullmatch(r"c\[0x0\]\[0x([0-9a-f]+)\]", text):
        return Operand("c", int(found[1], 16), sign)
    if re.fullmatch(r"0x[0-9a-f]+|\d+", text):
        return Operand("i", int(text, 0) % WORD, sign)
    return Operand("s" if text.startswith("SR_") else "m", text, sign)


@dataclass
class Lane:
    """Registers and predicates of one lane; what is missing or None is unknown."""

    constants: Mapping[int, int]  # offset of a word of constant bank 0 -> its value
    special: Mapping[str, int]  # "SR_CTAID.X" -> 3
    at: dict[str | int, int | None] = field(default_factory=dict)

    def read(self, operand: Operand, shift: int = 0) -> int | None:
        """Return a 32-bit value; shift 1: of the register, or the constant, behind it."""
        kind, key, sign = operand
        if kind == "r":
            assert isinstance(key, str)
            if key[-1] == "Z":
                value: int | None = 0
            elif shift:
                prefix = "UR" if key[0] == "U" else "R"
                value = self.at.get(f"{prefix}{int(key[len(prefix) :]) + 1}")
            else:
                value = self.at.get(key)
        elif kind == "i":
            value = 0 if shift else int(key)
        elif kind == "c":
            value = self.constants.get(int(key) + 4 * shift)
        else:
            value = self.special.get(str(key)) if kind == "s" else None
        if value is None or not sign:
            return value
        return (-value if sign == "-" else ~value) % WORD

    def pair(self, operand: Operand) -> int | None:
        """Return a 64-bit value."""
        low, high = self.read(operand), self.read(operand, 1)
        return None if low is None or high is None else high << 32 | low

    def test(self, operand: Operand) -> bool | None:
        """Return a predicate."""
        value = 1 if str(operand.key)[-1] == "T" else self.at.get(operand.key)
        return None if value is None else bool(value) != (operand.sign == "!")

    def write(self, operand: Operand, value: int | None, words: int = 1) -> None:
        """Set a register, `words` of them, or a predicate."""
        key = str(operand.key)
        if operand.kind == "p" and key[-1] != "T":
            self.at[key] = value
        elif operand.kind == "r" and key[-1] != "Z":
            prefix = "UR" if key[0] == "U" else "R"
            for i in range(words):
                name = f"{prefix}{int(key[len(prefix) :]) + i}"
                self.at[name] = None if value is None else value >> 32 * i & WORD - 1
