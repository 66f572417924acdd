"""Names of images whose folder has moved since their features were written: --moved OLD=NEW."""

from __future__ import annotations

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
        old, separator, new = text.partition("=")
        if not (old and separator and new):
            raise ConfigError(f"moved: got {text}, must be OLD=NEW, the folders as they were and are now")
        pairs.append((old.rstrip("/") or "/", new.rstrip("/") or "/"))
    return pairs
