"""Autocast's dtype for an op, and contexts without it."""

from __future__ import annotations

import contextlib

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype to which autocast casts operands of products on `device`; None: off, or unknown (meta)."""
    # "meta" raises here; torch.amp.is_autocast_available, which would answer, breaks graphs of torch 2.11
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Return a context without autocast; where it is off already, an empty one, which costs the host a tenth."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
