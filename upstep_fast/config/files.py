"""Configurations from and to TOML files and Python keywords."""

from __future__ import annotations

import difflib
import json
import numbers
import sys
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from upstep_fast import input_files
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.adapter_folder import with_adapter
from upstep_fast.config.flat import defaults, flat, from_flat, groups, paths, undashed
from upstep_fast.config.presets import with_preset
from upstep_fast.config.value_types import check_types
from upstep_fast.errors import ConfigError

RENAMED_FLAGS = {"grey": "gray"}  # old name: new name; accepted on the command line, in TOML files and as keywords


def read_toml(path: str | Path, config_class: type) -> dict[str, Any]:
    """Return {flag: value} of a TOML file, with a table for each group or with flags at the top.

    Raises ConfigError for a missing or broken file and for unknown keys.
    """
    values = input_files.read_toml(Path(path), "config")
    flags = flatten_tables(values, config_class)
    config_class = of_method(config_class, flags.get("method"), flags.get("objective"))
    return {known_flag(key, config_class, f"config {path}"): value for key, value in flags.items()}


def flatten_tables(values: Mapping[str, Any], config_class: type) -> dict[str, Any]:
    """Return {flag: value} of a TOML file's values, whose tables are groups; unknown keys are kept as they are."""
    explora = values.get("explora")
    objective = explora.get("objective") if isinstance(explora, dict) else values.get("objective")
    config_class = of_method(config_class, values.get("method"), objective)
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and key in groups(config_class):
            found |= _flags_of_table(key, value, config_class)
        else:
            found[key] = value
    return found


def _flags_of_table(table: str, values: Mapping[str, Any], config_class: type) -> dict[str, Any]:
    """Return {flag: value} of a group's table. Raises ConfigError for a key that is no field of the group."""
    names: dict[str, str] = {}
    for flag, path in paths(config_class).items():
        if path[0] == table:
            names |= {path[-1]: flag, flag: flag}
    names |= {old: new for old, new in RENAMED_FLAGS.items() if new in names}
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in names:
            raise ConfigError(f"config: [{table}] has no key {key!r}{_nearest(name, list(names))}")
        if name in RENAMED_FLAGS:
            notice_renamed(name)
        found[names[name]] = value
    return found


def of_method(config_class: type, method: Any, objective: Any = None) -> type:
    """Return the class with the defaults and flags of a method of `adapt`; `config_class` itself for UpStep."""
    if config_class is AdaptConfig and method == "explora":
        from upstep_fast.config.explora import Dinov2Config, MaeConfig

        return MaeConfig if objective == "mae" else Dinov2Config
    if config_class is AdaptConfig and method == "diet":
        from upstep_fast.config.diet import DietConfig

        return DietConfig
    return config_class


def from_options(config_class: type, options: Mapping[str, Any], where: str) -> Any:
    """Return the configuration from a Python call's keywords; paths may be Path, and `data` one path or several.

    Raises ConfigError for unknown keywords and for missing ones of model, data and out.
    """
    options = {known_flag(name, config_class, where): value for name, value in options.items()}
    options = with_adapter(options, config_class)
    options = with_preset(options) if "preset" in paths(config_class) else options
    required = [name for name in ("model", "data", "out") if name in paths(config_class)]
    required = [name for name in required if name not in defaults(config_class)]
    if missing := [name for name in required if name not in options]:
        raise ConfigError(f"{where}: {', '.join(missing)} must be given")
    if isinstance(options.get("data"), (str, Path)):
        options["data"] = (options["data"],)
    elif isinstance(options.get("data"), (Iterator, Set)):
        options["data"] = tuple(options["data"])
    check_types(options, config_class, where)
    # a TOML file's lists are the tuples of the fields
    fields = {name: tuple(map(_plain, v)) if isinstance(v, (list, tuple)) else _plain(v) for name, v in options.items()}
    return from_flat(config_class, **fields)


def _plain(value: Any) -> Any:
    """Return a value that TOML and JSON can hold."""
    if isinstance(value, (bool, str)) or value is None:
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) else str(value) if isinstance(value, Path) else value


def known_flag(key: str, config_class: type, where: str) -> str:
    """Return `key` as a flag of `config_class`, with dashes as underscores and the new name of a renamed flag.

    Raises ConfigError with the nearest name for an unknown key.
    """
    names = list(paths(config_class))
    name = undashed(key)
    if name in RENAMED_FLAGS and RENAMED_FLAGS[name] in names:
        notice_renamed(name)
        return RENAMED_FLAGS[name]
    if name in names:
        return name
    raise ConfigError(f"{where}: unknown key {key!r}{_nearest(name, names)}")


def notice_renamed(name: str) -> None:
    """Print one line on stderr about an old name."""
    print(f"upstep-fast: {name} is now called {RENAMED_FLAGS[name]}; the old name still works", file=sys.stderr)


def _nearest(name: str, names: list[str]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else f"; the fields are {', '.join(names)}"


def renamed(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return `flags` of an older version's file under the names of today."""
    return {RENAMED_FLAGS.get(name, name): value for name, value in flags.items()}


def to_toml(config: Any) -> str:
    """Return the configuration as TOML, one table per group; fields that are None are left out.

    Raises ConfigError for a text that is not Unicode, such as a path of other bytes than UTF-8.
    """
    flags, tables = flat(config), {name: list[str]() for name in ("", *groups(config.__class__))}
    for name, path in paths(config.__class__).items():
        if flags[name] is not None:
            line = f"{path[-1]} = {_toml_value(name, flags[name])}"
            tables[path[0] if len(path) == 2 else ""].append(line)
    parts = ["\n".join([f"[{name}]", *lines] if name else lines) for name, lines in tables.items() if lines]
    return "\n\n".join(parts) + "\n"


def _toml_value(name: str, value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007F")  # which JSON leaves as it is
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{name}: {value!a} is not UTF-8, so config.toml cannot hold it; rename it") from error
    return text
