"""Self-attention on packed qkv."""

from .op import attention, attention_backward, attention_backward_reference, attention_forward, attention_reference

__all__ = [
    "attention",
    "attention_backward",
    "attention_backward_reference",
    "attention_forward",
    "attention_reference",
]
