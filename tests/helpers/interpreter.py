"""Makes Triton's interpreter patch `triton.language` once a launch.

It does so again at every call of a jitted function by another one, which takes milliseconds of looking through modules
for nothing new: most of the time of a test whose kernel has helpers (triton 3.6 and 3.9).
"""

from __future__ import annotations

from typing import Any


def patch_language_once() -> None:
    """Replace the interpreter's patching; call it once in a process that interprets."""
    from triton.runtime import interpreter

    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    done: set[tuple[int, ...]] = set()

    def once(function: Any) -> Any:
        seen = tuple(id(v) for v in function.__globals__.values() if v is interpreter.tl or v is interpreter.tl.core)
        if seen in done:
            return None
        done.add(seen)
        return patch(function)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        return launch(self, *args, **kwargs)

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launched
