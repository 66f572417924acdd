"""Help on one screen: a line for each of the options that people use most. --help-all has all of them, in full."""

from __future__ import annotations

import functools
import re
import textwrap
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, Union

from rich.text import Text

from upstep_fast.cli.tyro_class import field_docs, split_default
from upstep_fast.config.flat import dashed, defaults, groups, paths
from upstep_fast.config.value_types import field_kinds
from upstep_fast.runtime import terminal

WIDTH = 100
FLAG_WIDTH = 26
_METAVARS = {int: "N", float: "X", str: "TEXT"}


def print_short(config_class: type, prog: str, shown: Sequence[str]) -> None:
    """Print usage, summary and a line for each of the flags `shown`."""
    required = [name for name in shown if name not in defaults(config_class)]
    usage = " ".join(f"--{dashed(name)} {dashed(name).upper()}" for name in required)
    summary = (config_class.__doc__ or "").split("\n\n")
    lines = [Text(f"usage: {prog} {usage} [options]\n"), *(Text(" ".join(part.split())) for part in summary), Text("")]
    for name in [*required, *(name for name in shown if name not in required)]:
        flag, text = _flag(name, config_class), _text(name, config_class)
        line = Text(f"  {flag} " if len(flag) >= FLAG_WIDTH else f"  {flag:<{FLAG_WIDTH}}")
        line.stylize("cyan", 2, 2 + len(flag.split()[0]))
        lines.append(line.append(textwrap.shorten(text, WIDTH - len(line), placeholder=" ...")))
    console = terminal.console()
    for line in lines:
        console.print(line, soft_wrap=True)
    print()


def _flag(name: str, config_class: type) -> str:
    kind, several = _kind(name, config_class)
    metavar = "" if kind is bool else f" {_METAVARS.get(kind, 'NAME')}{' ...' if several else ''}"
    return f"--{dashed(name)}{metavar}"


def _text(name: str, config_class: type) -> str:
    """Return the choices of an option, the first sentence of its help, and its default."""
    kind, _ = _kind(name, config_class)
    *group, field = paths(config_class)[name]
    doc = field_docs(groups(config_class)[group[0]] if group else config_class).get(field, "")
    default = defaults(config_class).get(name)
    doc, described = split_default(doc, default)
    text = re.split(r"(?<=\w)\. |\.$|; ", doc, maxsplit=1)[0]
    if typing.get_origin(kind) is Literal:
        text = f"{', '.join(typing.get_args(kind))}: {text[:1].lower()}{text[1:]}"
    if name not in defaults(config_class):
        value = "required"
    elif described or default not in (None, False, ()):
        value = described or (" ".join(map(str, default)) if isinstance(default, tuple) else str(default))
    else:
        return text
    room = WIDTH - FLAG_WIDTH - 5 - len(value)
    return f"{textwrap.shorten(text, room, placeholder=' ...')} ({value})"


@functools.cache
def _kind(name: str, config_class: type) -> tuple[Any, bool]:
    """Return the type of one value of an option, and whether it takes several."""
    kind, several = field_kinds(config_class)[name], False
    while typing.get_origin(kind) in (Union, types.UnionType, tuple):
        several = several or typing.get_origin(kind) is tuple
        kind = typing.get_args(kind)[0]
    return kind, several
