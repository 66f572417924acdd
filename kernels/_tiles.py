"""Tile sizes by op and GPU, with a default for every GPU.

A row is `op: {compute capability or None: {constexpr: value}}`; None is the default, used on any GPU without a row
of its own, so an unknown GPU never raises. Rows for a capability carry the measurement that chose them.
`tests/test_aot.py` compiles every row for sm_80, sm_90 and sm_100 and checks it against their limits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

Tile = Mapping[str, int]

TILES: dict[str, dict[tuple[int, int] | None, Tile]] = {}


def tile(op: str, device: torch.device) -> Tile:
    """Tile sizes (and num_warps, num_stages) of `op` for this device."""
    rows = TILES[op]
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return rows.get(capability, rows[None])
