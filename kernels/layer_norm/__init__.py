"""LayerNorm, with a residual and the adapter's first product."""

from .bare import layer_norm_backward, layer_norm_forward
from .op import add_layer_norm, layer_norm, layer_norm_backward_reference, layer_norm_reference

__all__ = [
    "add_layer_norm",
    "layer_norm",
    "layer_norm_backward",
    "layer_norm_backward_reference",
    "layer_norm_forward",
    "layer_norm_reference",
]
