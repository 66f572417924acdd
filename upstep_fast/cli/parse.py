"""Command-line flags and TOML files to a configuration."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from upstep_fast.config.flat import dashed
from upstep_fast.errors import ConfigError

HELP = {"-h", "--help", "--help-all"}


def parse(config_class: type, args: Sequence[str], prog: str) -> Any:
    """Return the configuration from flags, over the file of --config if there is one. Exits with 2 on a usage error."""
    import tyro

    from upstep_fast.cli import help as cli_help
    from upstep_fast.cli.tyro_class import for_tyro
    from upstep_fast.config.files import of_method, read_toml
    from upstep_fast.config.flat import flat, from_flat
    from upstep_fast.config.presets import with_preset

    cli_help.plain_help()
    args = cli_help.renamed_flags(args)
    values: dict[str, Any] = {}
    if "--config" in args:
        at = args.index("--config")
        if at + 1 == len(args):
            raise ConfigError("config: --config needs a file")
        values = read_toml(args[at + 1], config_class)
        del args[at : at + 2]
    # a method has defaults and flags of its own
    method, objective = (_value_of(flag, args) or values.get(flag) for flag in ("method", "objective"))
    config_class = of_method(config_class, method, objective)
    if HELP & set(args):
        shown = cli_help.shown_flags(config_class, prog.split()[-1], show_all="--help-all" in args)
        tyro.cli(for_tyro(config_class, shown), args=["--help"], prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    cli_help.check_flags(args, config_class)
    # a file's values become flags placed before the user's own, which win: one parser checks both
    values = with_preset(values)
    if preset := _value_of("preset", args):  # the user's own goes before the file
        values |= with_preset({"preset": preset})
    from_file = [part for key, value in values.items() for part in _as_flags(key, value)]
    config = tyro.cli(for_tyro(config_class), args=[*from_file, *args], prog=prog, config=(tyro.conf.OmitArgPrefixes,))
    return from_flat(config_class, **flat(config))


def _value_of(flag: str, args: Sequence[str]) -> str | None:
    found = [value for name, value in itertools.pairwise(args) if name == f"--{flag}"]
    found += [arg.partition("=")[2] for arg in args if arg.startswith(f"--{flag}=")]
    return found[-1] if found else None


def _take(args: list[str], flag: str) -> bool:
    # flags of every command, wherever they stand
    found = flag in args
    args[:] = [arg for arg in args if arg != flag]
    return found


def _as_flags(field: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{dashed(field)}" if value else f"--no-{dashed(field)}"]
    if isinstance(value, list):
        return [f"--{dashed(field)}", *(str(item) for item in value)]
    return [f"--{dashed(field)}", str(value)]
