"""Names of images as lines of a text file."""

from __future__ import annotations

import json
import unicodedata


def name_line(name: str) -> str:
    """Return a name as one line: itself, or a JSON string if it holds a control character or begins with a quote."""
    plain = not name.startswith('"') and all(
        unicodedata.category(char) not in ("Cc", "Cs", "Zl", "Zp") for char in name
    )
    return name if plain else json.dumps(name)


def name_of_line(line: str) -> str:
    """Return the name in a line of `name_line`. Raises ValueError."""
    return json.loads(line) if line.startswith('"') else line
