"""A configuration as tyro parses it: one argument per field, named by its flag."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import typing
from collections.abc import Collection
from typing import Annotated, Any

import tyro

from upstep_fast.config.flat import dashed, flag_of, groups, paths


def for_tyro(config_class: type, shown: Collection[str] | None = None, own: Collection[str] | None = None) -> Any:
    """Return a subclass whose fields tyro names by their flags.

    shown: flags to list in --help (None: all). own: flags of this class that no other group of the whole has (None:
    all).
    """
    hints, fields = typing.get_type_hints(config_class), []
    for field in dataclasses.fields(config_class):
        default, name = field.default, flag_of(config_class, field.name)
        if group := groups(config_class).get(field.name):
            kind: Any = for_tyro(group, shown, {f for f, path in paths(config_class).items() if path[0] == field.name})
            default = default if default is dataclasses.MISSING else kind(**vars(default))
        elif own is not None and name not in own:
            kind = Annotated[hints[field.name], tyro.conf.Fixed, tyro.conf.Suppress]
        elif shown is None or name in shown:
            kind = Annotated[hints[field.name], _argument(name, default, field_docs(config_class).get(field.name, ""))]
        else:
            kind = Annotated[hints[field.name], tyro.conf.Suppress]
        fields.append((field.name, kind, dataclasses.field(default=default, metadata=field.metadata)))
    named = dataclasses.make_dataclass(config_class.__name__, fields, bases=(config_class,), frozen=True, kw_only=True)
    named.__doc__ = config_class.__doc__
    return named


def _argument(name: str, default: Any, doc: str) -> Any:
    doc, described = split_default(doc, default)
    if described is None:
        return tyro.conf.arg(name=dashed(name), help=doc)
    return tyro.conf.arg(name=dashed(name), help=doc, help_behavior_hint=f"(default: {described})")


def split_default(doc: str, default: Any) -> tuple[str, str | None]:
    """Return a help text without its description of the default, and that, for a default of None: "10 epochs"."""
    described = re.search(r" Default: (.*?)\.(?= |$)", doc)
    if default is not None or not described:
        return doc, None
    return doc.replace(described[0], "", 1), described[1]


@functools.cache
def field_docs(config_class: Any) -> dict[str, str]:
    """Return {field: its docstring on one line}, those of base classes included."""
    found: dict[str, str] = {}
    for base in reversed(config_class.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, doc in zip(body.body, body.body[1:], strict=False):
            is_text = isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
            if is_text and isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                found[field.target.id] = " ".join(str(doc.value.value).split())  # type: ignore[attr-defined]
    return found
