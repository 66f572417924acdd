"""The bare layer norm for a backward written by hand: op.py has the formulas."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._define import call
from .._transforms import REASON, is_transformed
from ..quantize import E4M3
from .op import _backward_op, _gradients, _normalize


class Normalized(NamedTuple):
    """Results of one pass over x [..., K]; None where not requested."""

    y: Tensor | None
    h: Tensor
    mean: Tensor
    rstd: Tensor
    s: Tensor | None
    q: Tensor | None
    scale: Tensor | None


def layer_norm_forward(
    x: Tensor,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    lora_a: Tensor | None = None,
    save_y: bool = True,
    fp8: bool = False,
) -> Normalized:
    """Compute the bare form and all results of its pass; gradients reach x, residual and lora_a.

    x, residual: [..., K]; lora_a: [R, K] in the dtype of x: also s = y lora_a^T [..., R].
    save_y: whether to return y (`layer_norm_backward` takes it). fp8: also q [..., K] in e4m3 with scale [..., 1].
    Raises ValueError for arguments that do not fit, NotImplementedError inside torch.func or forward-mode AD.
    """
    if is_transformed("layer_norm_forward", x, residual, lora_a):
        raise NotImplementedError(f"layer_norm_forward: has no derivative {REASON}; take layer_norm")
    y, h, mean, rstd, s, q, scale = _normalize(
        "layer_norm_forward", x, residual, None, None, lora_a, eps, save_y=save_y, fp8=fp8
    )
    assert h is not None
    codes, scales = (q.view(E4M3), scale) if fp8 and q is not None else (None, None)
    return Normalized(y if save_y else None, h, mean, rstd, None if lora_a is None else s, codes, scales)


def layer_norm_backward(
    grad: Tensor, x_hat: Tensor, rstd: Tensor, grad_h: Tensor | None = None, *, fp8: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return (dx, q, scale) of the bare form, for a backward written by hand.

    grad: of x_hat, [..., K]; x_hat and rstd [...] as `layer_norm_forward` gave them; grad_h: of the residual stream,
    added in the same pass. fp8: also dx in e4m3 with row scales; else q and scale are None.
    """
    for name, t, shape in (
        ("x_hat", x_hat, grad.shape),
        ("rstd", rstd, grad.shape[:-1]),
        ("grad_h", grad_h, grad.shape),
    ):
        if t is not None and (t.shape != shape or t.device != grad.device):
            want, got = f"{list(shape)} on {grad.device}", f"{list(t.shape)} on {t.device}"
            raise ValueError(f"layer_norm_backward: {name} must be {want} to fit grad, got {got}")
    grad, x_hat, rstd = (t.detach() for t in (grad, x_hat, rstd))
    grad_h = None if grad_h is None else grad_h.detach()
    dx, _, _, q, scale = call(_backward_op, _gradients, grad, x_hat, rstd, rstd, None, grad_h, False, fp8)
    return (dx, q.view(E4M3), scale) if fp8 else (dx, None, None)
