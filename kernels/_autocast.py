"""What autocast asks of an op."""

from __future__ import annotations

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """To what autocast casts the operands of products on `device`; None where it is off or unknown (meta)."""
    # asking for "meta" raises; torch.amp.is_autocast_available, which would tell, breaks graphs of torch 2.11
    if device.type != "meta" and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None
