"""Configurations from and to TOML files and Python keywords."""

from __future__ import annotations

import dataclasses
import difflib
import json
import tomllib
from pathlib import Path
from typing import Any

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.errors import ConfigError


def read_toml(path: str | Path, config_class: type) -> dict[str, Any]:
    """The fields in a TOML file. Raises ConfigError on a missing or broken file and on unknown keys."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"config: cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config: {path} is not valid TOML: {error}") from error
    config_class = of_method(config_class, values.get("method"), values.get("objective"))
    return {known_field(key, config_class, f"config {path}"): value for key, value in values.items()}


def of_method(config_class: type, method: Any, objective: Any = None) -> type:
    """The class with the defaults and flags of a method of `adapt`; `config_class` itself where there is no other."""
    if config_class is AdaptConfig and method == "explora":
        from upstep_fast.config.explora import Dinov2Config, MaeConfig

        return MaeConfig if objective == "mae" else Dinov2Config
    return config_class


def from_options(config_class: type, options: dict[str, Any], where: str) -> Any:
    """The configuration from a Python call's keywords; paths may be Path, and `data` one of them or several.

    Raises ConfigError for unknown keywords and for missing ones of model, data and out.
    """
    for name in options:
        known_field(name, config_class, where)
    if missing := [name for name in ("model", "data", "out") if name not in options]:
        raise ConfigError(f"{where}: {', '.join(missing)} must be given")
    data = options["data"]
    paths = [data] if isinstance(data, (str, Path)) else data
    # a TOML file's lists are the tuples of the fields
    fields = {
        name: str(v) if isinstance(v, Path) else tuple(v) if isinstance(v, list) else v for name, v in options.items()
    }
    return config_class(**fields | {"data": tuple(str(path) for path in paths)})


def known_field(key: str, config_class: type, where: str) -> str:
    """`key` with dashes as underscores, if it is a field. Raises ConfigError with the nearest name otherwise."""
    names = [f.name for f in dataclasses.fields(config_class)]
    name = key.replace("-", "_")
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; the fields are {', '.join(names)}"
    raise ConfigError(f"{where}: unknown key {key!r}{hint}")


def to_toml(config: Any) -> str:
    """The resolved configuration as flat TOML; fields that are None are left out."""
    lines = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value is not None:
            lines.append(f"{field.name} = {json.dumps(value, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"
