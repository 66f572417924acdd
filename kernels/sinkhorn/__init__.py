"""Sinkhorn-Knopp targets."""

from .op import sinkhorn, sinkhorn_reference
from .scored import scored_sinkhorn, scored_sinkhorn_reference

__all__ = ["scored_sinkhorn", "scored_sinkhorn_reference", "sinkhorn", "sinkhorn_reference"]
