"""Flags of a configuration: its fields by their command-line names, whichever group holds them.

A configuration is a frozen dataclass of groups (`config.gate.rate`); on the command line, in Python keywords, in a
checkpoint's manifest and in reports each field has one flat name, its flag (`gate_rate`). A field's flag is its own
name unless its metadata says otherwise: `rate: float = field(default=0.5, metadata=flag("gate_rate"))`.
"""

from __future__ import annotations

import dataclasses
import functools
import keyword
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from upstep_fast.config.limits import check_numbers

C = TypeVar("C")


def flag(name: str) -> dict[Any, Any]:
    """Return the metadata of a field whose flag is `name` instead of the field's own name."""
    return {"flag": name}


def flag_of(config_class: type, field: str) -> str:
    """Return the flag of a field of one group or of an outer configuration."""
    found = next(f for f in dataclasses.fields(config_class) if f.name == field)
    return str(found.metadata.get("flag", found.name))


def dashed(name: str) -> str:
    """Return a flag's name as the command line writes it; from_, as Python must write it, is --from."""
    return name.rstrip("_").replace("_", "-")


def undashed(text: str) -> str:
    """Return a flag's name as fields and keywords have it."""
    name = text.replace("-", "_")
    return f"{name}_" if keyword.iskeyword(name) else name


@functools.cache
def groups(config_class: Any) -> dict[str, type]:
    """Return {field: class} of the fields that are groups."""
    hints = typing.get_type_hints(config_class)
    names = [field.name for field in dataclasses.fields(config_class)]
    return {name: hints[name] for name in names if dataclasses.is_dataclass(hints[name])}


@functools.cache
def paths(config_class: Any) -> dict[str, tuple[str, ...]]:
    """Return {flag: (field,) or (group, field)}, in order of the fields."""
    found: dict[str, tuple[str, ...]] = {}
    for field in dataclasses.fields(config_class):
        group = groups(config_class).get(field.name)
        if group is None:
            found[flag_of(config_class, field.name)] = (field.name,)
        else:
            found |= {flag_of(group, inner.name): (field.name, inner.name) for inner in dataclasses.fields(group)}
    return found


def flat(config: Any) -> dict[str, Any]:
    """Return {flag: value} of every field."""
    return {name: functools.reduce(getattr, path, config) for name, path in paths(config.__class__).items()}


def defaults(config_class: type) -> dict[str, Any]:
    """Return {flag: default} of every field that has a default."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config_class):
        group = groups(config_class).get(field.name)
        if group is None:
            found[flag_of(config_class, field.name)] = field.default
            continue
        for inner in dataclasses.fields(group):
            own = inner.default if field.default is dataclasses.MISSING else getattr(field.default, inner.name)
            found[flag_of(group, inner.name)] = own
    return {name: value for name, value in found.items() if value is not dataclasses.MISSING}


def from_flat(config_class: type, **flags: Any) -> Any:
    """Return a configuration from its flags.

    Raises KeyError for an unknown flag, TypeError for a missing one, ConfigError for a value that cannot be.
    """
    check_numbers(flags)
    fields, inner = _by_group(config_class, flags)
    for field in dataclasses.fields(config_class):
        if (group := groups(config_class).get(field.name)) is None:
            continue
        given = inner.get(field.name, {})
        is_required = field.default is dataclasses.MISSING
        fields[field.name] = group(**given) if is_required else dataclasses.replace(field.default, **given)  # type: ignore[type-var]
    return config_class(**fields)


def replace_flat(config: C, **flags: Any) -> C:
    """Return `config` with some fields, named by their flags, replaced. Raises KeyError for an unknown flag."""
    fields, inner = _by_group(type(config), flags)
    fields |= {name: dataclasses.replace(getattr(config, name), **given) for name, given in inner.items()}
    return dataclasses.replace(config, **fields)  # type: ignore[type-var]


def _by_group(config_class: type, flags: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    fields: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    for name, value in flags.items():
        *group, field = paths(config_class)[name]
        (inner.setdefault(group[0], {}) if group else fields)[field] = value
    return fields, inner
