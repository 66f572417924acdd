"""A configuration as tyro parses it: one argument per field, named by its flag."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Collection
from typing import Annotated, Any

import tyro

from upstep_fast.config.flat import dashed, flag_of, groups


def for_tyro(config_class: type, shown: Collection[str] | None = None) -> Any:
    """Return a subclass whose fields tyro names by their flags; shown: flags to list in --help (None: all)."""
    hints, fields = typing.get_type_hints(config_class), []
    for field in dataclasses.fields(config_class):
        default, name = field.default, flag_of(config_class, field.name)
        if group := groups(config_class).get(field.name):
            kind: Any = for_tyro(group, shown)
            default = default if default is dataclasses.MISSING else kind(**vars(default))
        elif shown is None or name in shown:
            kind = Annotated[hints[field.name], tyro.conf.arg(name=dashed(name))]
        else:
            kind = Annotated[hints[field.name], tyro.conf.Suppress]
        fields.append((field.name, kind, dataclasses.field(default=default, metadata=field.metadata)))
    named = dataclasses.make_dataclass(config_class.__name__, fields, bases=(config_class,), frozen=True, kw_only=True)
    named.__doc__ = config_class.__doc__
    return named
