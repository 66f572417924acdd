"""Command-line flags and TOML files to a configuration; every wrong value is one line with its flag."""

from __future__ import annotations

import itertools
import os
import sys
import types
import typing
from collections.abc import Container, Mapping, Sequence
from typing import Any, Literal, Union

from upstep_fast.config.flat import dashed, defaults, from_flat, paths, undashed
from upstep_fast.config.value_types import describe_kind, field_kinds
from upstep_fast.errors import MAX_LINE, ConfigError, printable

HELP = {"-h", "--help", "--help-all"}


def parse(config_class: type, args: Sequence[str], prog: str, positional: Sequence[str] = ()) -> Any:
    """Return the configuration from flags, over the file of --config if there is one. Prints help and exits if asked.

    positional: the fields whose flags may be left out; the help's usage shows them.
    Raises ConfigError for an unknown or missing flag and for a value that a field does not take.
    """
    from upstep_fast.cli import help as cli_help
    from upstep_fast.config.adapter_folder import with_adapter
    from upstep_fast.config.files import of_method, read_toml
    from upstep_fast.config.presets import with_preset

    args = cli_help.renamed_flags(args)
    file = _take_value(args, "--config")
    values = {} if file is None else read_toml(file, config_class)
    # a method has defaults and flags of its own
    method, objective = (_value_of(flag, args) or values.get(flag) for flag in ("method", "objective"))
    config_class = of_method(config_class, method, objective)
    if HELP & set(args):
        usage = " ".join([prog, *(_usage_of(name, config_class) for name in positional)])
        _print_help(config_class, prog, usage, show_all="--help-all" in args)
    cli_help.check_flags(args, config_class)
    kinds = field_kinds(config_class)
    from_file = {name: _from_toml(name, value, kinds[name], f"config {file}: ") for name, value in values.items()}
    own = _from_flags(args, kinds)
    for name, value in own.items():
        if value == "" or (isinstance(value, tuple) and "" in value):
            # a variable of the shell that is not set; --out "" would be the current folder
            raise ConfigError(f"{name}: got '', must not be empty; leave the option out for its default")
    flags = with_adapter(from_file | own, config_class)
    if "preset" in kinds:
        flags = with_preset(flags)
    if "preset" in own:  # the user's own goes before the file
        flags |= with_preset({"preset": own["preset"]}) | own
    for name, other in itertools.permutations(("steps", "epochs", "budget"), 2):  # config.toml and presets hold steps
        if name in own and other not in own:
            flags.pop(other, None)
    required = [name for name in paths(config_class) if name not in defaults(config_class)]
    if missing := [f"--{dashed(name)}" for name in required if name not in flags]:
        raise ConfigError(f"{prog.split()[-1]}: {_joined(missing)} must be given; {prog} --help shows an example")
    return from_flat(config_class, **flags)


def take(args: list[str], flag: str) -> bool:
    """Remove a flag without a value from `args`; return whether it was there."""
    found = flag in args
    args[:] = [arg for arg in args if arg != flag]
    return found


def _take_value(args: list[str], flag: str) -> str | None:
    """Remove --flag VALUE and --flag=VALUE from `args`; return the value, None without the flag."""
    at = [i for i, arg in enumerate(args) if arg.partition("=")[0] == flag]
    if not at:
        return None
    name = flag[2:]
    if len(at) > 1:
        raise ConfigError(f"{name}: {flag} is given {len(at)} times; give it once")
    value, used = args[at[0]].partition("=")[2], 1
    if "=" not in args[at[0]]:
        value, used = (args[at[0] + 1 : at[0] + 2] or [""])[0], 2
    if not value or (used == 2 and value.startswith("--")):
        raise ConfigError(f"{name}: {flag} needs a file")
    del args[at[0] : at[0] + used]
    return value


def _value_of(flag: str, args: Sequence[str]) -> str | None:
    values = [value for name, value in itertools.pairwise(args) if name == f"--{flag}"]
    values += [arg.partition("=")[2] for arg in args if arg.startswith(f"--{flag}=")]
    return values[-1] if values else None


def _usage_of(name: str, config_class: type) -> str:
    """Return a field as usage shows it without its flag: RUN, QUERY ..., [PATTERN]."""
    several = typing.get_origin(field_kinds(config_class)[name]) is tuple
    text = f"{name.upper()} ..." if several else name.upper()
    return text if name not in defaults(config_class) else f"[{text}]"


def _print_help(config_class: type, prog: str, usage: str, *, show_all: bool) -> None:
    import tyro

    from upstep_fast.cli import help as cli_help
    from upstep_fast.cli.short_help import print_short
    from upstep_fast.cli.tyro_class import for_tyro

    command = prog.split()[-1]
    shown = cli_help.shown_flags(config_class, command, show_all=show_all)
    if command in cli_help.COMMON and not show_all:
        print_short(config_class, prog, shown)
        raise SystemExit(0)
    cli_help.plain_help()
    tyro.cli(for_tyro(config_class, shown), args=["--help"], prog=usage, config=(tyro.conf.OmitArgPrefixes,))


def _from_flags(args: Sequence[str], kinds: Mapping[str, Any]) -> dict[str, Any]:
    """Return {flag: value} of --flag VALUE ..., --flag=VALUE, --flag and --no-flag; of several the last counts."""
    given: list[tuple[str, list[str]]] = []
    for arg in args:
        if arg.startswith("--"):
            flag, equals, value = arg.partition("=")
            given.append((undashed(flag[2:]), [value] if equals else []))
        elif given:
            given[-1][1].append(arg)
        else:
            raise ConfigError(f"{arg!r} follows no flag; {_flag_of(arg, kinds)}")
    texts_of: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for name, texts in given:
        if texts_of.setdefault(name, texts) != texts:
            texts_of[name] = texts
            text = printable(f"{name}: given more than once; the last counts: {_shown(texts)}", MAX_LINE)
            print(f"upstep-fast: {text}", file=sys.stderr)
        field = name if name in kinds else name.removeprefix("no_")
        if kinds[field] is not bool:
            if field != name:
                raise ConfigError(f"unknown option --{dashed(name)}; did you mean --{dashed(field)}?")
            values[field] = _converted(field, texts, kinds[field])
        elif texts:
            raise ConfigError(f"{field}: takes no value, got {_shown(texts)}; write --{dashed(name)} alone")
        else:
            values[field] = field == name
    return values


def _from_toml(name: str, value: Any, kind: Any, where: str) -> Any:
    """Return a TOML file's value as the field takes it; a text counts as what it spells, as on the command line."""
    if isinstance(value, bool) and kind is bool:
        return value
    values = value if isinstance(value, list) else [value]
    if kind is bool or not all(isinstance(item, (str, int, float)) and not isinstance(item, bool) for item in values):
        raise ConfigError(f"{where}{name}: got {value!r}, must be {_wanted(kind)}")
    return _converted(name, [str(item) for item in values], kind, where)


def _converted(name: str, texts: Sequence[str], kind: Any, where: str = "") -> Any:
    try:
        if any("\0" in text for text in texts):
            raise ValueError
        return _value(texts, kind)
    except ValueError:
        raise ConfigError(f"{where}{name}: got {_shown(texts)}, must be {_wanted(kind)}") from None


def _value(texts: Sequence[str], kind: Any) -> Any:
    """Return texts as a value of a field's kind. Raises ValueError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        if type(None) in arguments and list(texts) == ["None"]:
            return None
        for part in arguments:
            try:
                return _value(texts, part)
            except ValueError:
                continue
        raise ValueError
    if origin is tuple:
        if arguments[-1] is not Ellipsis and len(texts) != len(arguments):
            raise ValueError
        return tuple(_value([text], arguments[0]) for text in texts)
    if len(texts) != 1 or kind is type(None) or (origin is Literal and texts[0] not in arguments):
        raise ValueError
    return texts[0] if origin is Literal else kind(texts[0])


def _wanted(kind: Any) -> str:
    # on the command line None is the flag left out
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    is_union = typing.get_origin(kind) in (Union, types.UnionType)
    return " or ".join(map(describe_kind, parts)) if is_union else describe_kind(kind)


def _flag_of(arg: str, flags: Container[str]) -> str:
    """Return which flag a value that stands in front without one may be meant for, from what lies there."""
    from upstep_fast.config.adapter_folder import holds_adapter, is_run

    if "from_" in flags and (holds_adapter(arg) or is_run(arg)):
        return f"--from {arg} starts from the adapter of that run"
    if "data" in flags and os.path.lexists(arg):
        return f"write --data {arg}"
    return "write --flag value"


def _shown(texts: Sequence[str]) -> str:
    return " ".join(map(repr, texts)) or "nothing"


def _joined(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
