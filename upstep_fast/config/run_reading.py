"""What a command takes of the way in which a run read its images, in one line of the log."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upstep_fast.config.adapter_folder import REFUSED, is_refused, reading_flags
from upstep_fast.config.base import DataConfig
from upstep_fast.config.reading import NONE

log = logging.getLogger("upstep_fast")

_OF_FILE = ("auto", "full", NONE)  # values that leave a file as it is


def log_of_adapter(adapter: str | None, config: DataConfig) -> None:
    """Log which flags of `config` are those of the training of `adapter`, a folder of an adapter or refused run."""
    if adapter is not None and (folder := Path(adapter)).exists():
        log_taken(reading_flags(folder / REFUSED if is_refused(folder) else folder), config, folder)


def log_taken(recorded: Mapping[str, Any], config: DataConfig, folder: str | Path) -> None:
    """Log which flags of `config` are those `recorded` in `folder`; nothing if none are."""
    taken = [name for name, value in recorded.items() if value not in _OF_FILE and getattr(config, name) == value]
    if taken:
        flags = " ".join(f"--{name} {recorded[name]}" for name in taken)
        log.info("data: read as in training: %s (recorded in %s; a flag of another value overrides it)", flags, folder)
