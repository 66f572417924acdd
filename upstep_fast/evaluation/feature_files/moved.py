"""Names of images whose folder has moved since their features were written: --moved OLD=NEW."""

from __future__ import annotations

import os
from collections.abc import Sequence

from upstep_fast.errors import ConfigError


def moved(name: str, places: Sequence[tuple[str, str]]) -> str:
    """Return the name of an image whose folder has moved; places: of --moved, as `parse_moved` gives them."""
    for old, new in places:
        if name == old or (name.startswith(old) and (old.endswith("/") or name[len(old)] in "/#")):
            return new + name[len(old) :]
    return name


def parse_moved(texts: Sequence[str]) -> list[tuple[str, str]]:
    """Return the (old, new) folders of OLD=NEW. Raises ConfigError."""
    pairs = []
    for text in texts:
        old, new = _places(text)
        pairs.append((old.rstrip("/") or "/", new.rstrip("/") or "/"))
    return pairs


def _places(text: str) -> tuple[str, str]:
    """Return OLD and NEW; of several `=`, which names of folders may hold, the one before a folder that is there."""
    pairs = [(text[:i], text[i + 1 :]) for i in range(1, len(text) - 1) if text[i] == "="]
    if not pairs:
        raise ConfigError(f"moved: got {text}, must be OLD=NEW, the folders as they were and are now")
    if len(pairs) > 1:
        pairs = [(old, new) for old, new in pairs if os.path.exists(new)]
    if len(pairs) != 1:
        found = "more than one" if pairs else "none"
        raise ConfigError(f"moved: got {text}, which has several =, and {found} is before a folder that is there")
    return pairs[0]
