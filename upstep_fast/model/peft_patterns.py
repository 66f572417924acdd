"""PEFT's matching of module names, with a bound on the time that a stranger's regular expressions may take.

PEFT takes keys of rank_pattern and alpha_pattern, a target_modules or exclude_modules that is one string, the names in
modules_to_save and layers_pattern as regular expressions. Python's matcher backtracks, so "(([a-z.]+)+)+!" would run
for ever. `bounded` multiplies the choices of a pattern before it runs:

    choices(ab) = choices(a) choices(b)      choices(a|b) = choices(a) + choices(b)      choices(a{m,n}) = n - m + 1

where a repeated part has no choices of its own: a choice that is repeated is refused, and so are references to groups.
The patterns that people write (".*blocks\\.[0-3]\\..*(qkv|proj)") have a few thousand choices.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from re import _constants as constants  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any, TypeVar

from upstep_fast.errors import ConfigError, first_line, printable

T = TypeVar("T")
MAX_CHARS = 1000
MAX_CHOICES = 1_000_000  # of all patterns together
_NAME_CHARS = 32  # of a module of a ViT; more repetitions than that never match
_REPEATS = (constants.MAX_REPEAT, constants.MIN_REPEAT, constants.POSSESSIVE_REPEAT)
_PLAIN = (constants.LITERAL, constants.NOT_LITERAL, constants.ANY, constants.IN, constants.AT)


def bounded(patterns: Iterable[str], where: str) -> None:
    """Raise ConfigError for a pattern that is no regular expression, or if all of them may take long to match.

    where: the file and its field, for the message.
    """
    total = 0.0
    for pattern in patterns:
        short = printable(pattern, 80)
        if len(pattern) > MAX_CHARS:
            raise ConfigError(f"{where}: the pattern {short} has more than {MAX_CHARS} characters; name the modules")
        try:
            total += _choices(parser.parse(pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise ConfigError(f"{where}: {short} is no regular expression: {first_line(error)}; mend it") from error
        if total > MAX_CHOICES:
            raise ConfigError(
                f"{where}: matching the pattern {short} may take very long (repeated groups, or many * and +); "
                "name the modules instead"
            )


def first_match(patterns: Mapping[str, T], name: str, default: T) -> T:
    """Return the value of the first pattern that matches a module's name, as PEFT's `get_pattern_key` chooses it."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def matches(targets: Sequence[str] | str, name: str) -> bool:
    """Return whether a module is one of PEFT's targets: names that end so, or one pattern for the whole name."""
    return re.fullmatch(targets, name) is not None if isinstance(targets, str) else has_suffix(name, targets)


def is_inside(name: str, modules: Sequence[str]) -> bool:
    """Return whether a module is one of modules_to_save or lies in one; PEFT takes their names as patterns."""
    return any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in modules)


def layer_index(name: str, patterns: Sequence[str]) -> int | None:
    """Return the number that follows the layer's list in a module's name, as layers_to_transform counts; None: no list.

    patterns: names of the list (layers_pattern); empty: any list inside another module.
    """
    before = r"(?:^|.*?\.)" if patterns else r".*?\."
    for pattern in patterns or (r"[^.]*",):
        match = re.match(rf"{before}{pattern}\.(?P<idx>\d+)\.", name)
        if match:
            return int(match["idx"])
    return None


def has_suffix(name: str, suffixes: Sequence[str]) -> bool:
    """Return whether `name` is one of `suffixes` or ends in a dot and one of them."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)


def _choices(parsed: Any) -> float:
    """Return an upper bound on the ways in which a parsed pattern can match at one position; inf: not bounded."""
    result = 1.0
    for op, argument in parsed:
        if op in _PLAIN:
            continue
        if op is constants.BRANCH:
            result *= sum(_choices(branch) for branch in argument[1])
        elif op is constants.SUBPATTERN:
            result *= _choices(argument[-1])
        elif op in (constants.ASSERT, constants.ASSERT_NOT):
            result *= _choices(argument[1])
        elif op is constants.ATOMIC_GROUP:
            result *= _choices(argument)
        elif op in _REPEATS:
            low, high, body = argument
            inner = _choices(body)
            result *= (
                (1 + inner) if high == 1 else (min(high, low + _NAME_CHARS) - low + 1 if inner == 1 else float("inf"))
            )
        else:  # references to groups, conditions
            return float("inf")
    return result
