"""Types of the values that a Python call gives, checked before anything runs."""

from __future__ import annotations

import functools
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union

from upstep_fast.config.flat import groups, paths
from upstep_fast.errors import ConfigError

_WANTED: dict[Any, str] = {int: "an integer", float: "a number", bool: "True or False", str: "text", type(None): "None"}
_PLACES = {
    "model": "a model's name: a timm name, local-dir:PATH, hf-hub:NAME, a checkpoint file or demo",
    "data": "a path or several: folders, .tar files, text lists or hf:NAME",
    "out": "a path",
}


def check_types(options: Mapping[str, Any], config_class: type, where: str) -> None:
    """Raise ConfigError naming the first keyword whose value has a wrong type, with what it got and may be."""
    kinds = field_kinds(config_class)
    for name, value in options.items():
        if not _fits(value, kinds[name]):
            wanted = _PLACES.get(name) or describe_kind(kinds[name])
            raise ConfigError(f"{where}: {name}: got {_described(value)}, must be {wanted}")


@functools.cache
def field_kinds(config_class: Any) -> dict[str, Any]:
    """Return {flag: annotated type} of every field."""
    hints = {holder: typing.get_type_hints(holder) for holder in (config_class, *groups(config_class).values())}
    kinds = {}
    for name, (*group, field) in paths(config_class).items():
        kinds[name] = hints[groups(config_class)[group[0]] if group else config_class][field]
    return kinds


def _fits(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in arguments)
    if origin is Literal:
        return isinstance(value, str) and value in arguments
    if origin is tuple:
        return isinstance(value, (tuple, list)) and _fit_all(value, arguments)
    if isinstance(value, bool):  # which is an integer to Python
        return kind is bool
    accepted: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real, str: (str, Path)}
    return isinstance(value, accepted.get(kind, kind))


def _fit_all(values: Sequence[Any], kinds: tuple[Any, ...]) -> bool:
    if kinds[-1] is Ellipsis:
        return all(_fits(value, kinds[0]) for value in values)
    return len(values) == len(kinds) and all(map(_fits, values, kinds))


def describe_kind(kind: Any) -> str:
    """Return what a field of this type takes, in words."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_kind(part) for part in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}" if len(arguments) > 1 else repr(arguments[0])
    if origin is tuple:
        several = {str: "texts", int: "integers", float: "numbers"}[arguments[0]]
        return f"a list of {several}" if arguments[-1] is Ellipsis else f"{len(arguments)} {several}"
    return _WANTED.get(kind, str(kind))


def _described(value: Any) -> str:
    if isinstance(value, (str, int, float, type(None))):
        return repr(value)
    if isinstance(value, (list, tuple)):
        if all(isinstance(item, (str, int, float)) for item in value):
            return repr(list(value))
        return f"a list with an object of type {next(type(i).__name__ for i in value if not isinstance(i, (str, int)))}"
    return f"an object of type {type(value).__name__}"
