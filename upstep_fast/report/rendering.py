"""The templates of report.html: jinja2 with autoescape, and strings from users made visible."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

if TYPE_CHECKING:
    from jinja2 import Environment


def visible(value: Any) -> Any:
    """Return `value`; in a string, characters that hide or reverse text are replaced by their codes, \\u{202e}."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return "".join(c if c.isprintable() else f"\\u{{{ord(c):x}}}" for c in value)


def render(template: str, **values: Any) -> Markup:
    """Return the rendered template. Every value is escaped, except Markup."""
    return Markup(_environment().get_template(template).render(**values))


@functools.cache
def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined  # not before the first step of a run

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=visible,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
