"""Center vector of a batch of embeddings, and the gate's decision from it.

    z_r = u_r / |u_r|           unit rows, fp32; a zero row stays zero, and an infinite one becomes NaN
    s   = mean_r z_r            the center vector; s_v, that of view v alone
    m   = |s|                   its magnitude, which `gate` compares with a reference: open or skip
    dL/du_r = (g_r - z_r (z_r . g_r)) / |u_r|   with g_r = dL/dz_r + dL/ds / rows: a penalty on s adds one vector to all

Shapes: rows = V views x B images, the views stacked (row v B + i is view v of image i); d width, at most 4096.
Saved for backward: z and 1/|u|. Bytes: u once in, z once out; the plain sequence reads u or z five times in eight
launches. The CUDA kernel is one launch (csrc/center_vector.cuh); sums are taken in a fixed order on every device.

On several ranks: `center_vector_partial`, an all-reduce (sum) of its `sums`, `center_vector_finish`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._dispatch import NAMESPACE, choose
from ._native import native_unsupported_reason
from ._transforms import is_transformed
from .gate import HEAD, finish_reference, gate_numbers, validate_gate, write_flag

MAX_WIDTH, MAX_VIEWS = 4096, 2
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_GATE = ("rule", "update_when", "beta", "rate", "max_skips", "center_beta")  # keywords of gate's functions, in order


class CenterVector(NamedTuple):
    """Results for one batch. Gradient flows through z and center."""

    z: Tensor  # [rows, d] fp32
    center: Tensor  # [d] fp32
    state: Tensor  # [HEAD + d] float64, the state after this step
    inv_norm: Tensor  # [rows] float64, 1/|u|, for center_vector_backward


def center_vector_reference(u: Tensor, state: Tensor, *, num_views: int = 1, **gate: Any) -> CenterVector:
    """Compute the specification of center_vector_update in float64, rounded at the end; differentiable in u."""
    z, sums, inv_norm = partial_reference(u, num_views=num_views)
    center, state = finish_reference(sums, state, num_views=num_views, **gate)
    return CenterVector(z, center.to(z.dtype), state, inv_norm)


def partial_reference(u: Tensor, *, num_views: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Compute z, sums and 1/|u| as center_vector_partial returns them."""
    # float64 holds the square of every float32, so no row is too long or too short
    x = u.contiguous().double()
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    norm = torch.where(norm.isinf(), torch.nan, norm)
    inv = torch.where(norm == 0, 0.0, 1 / torch.where(norm == 0, 1.0, norm))
    z = x * inv
    z_VBd = z.view(num_views, -1, u.shape[1])
    num_images = z.new_full((1,), z_VBd.shape[1])
    sums = torch.cat([z_VBd.sum(1).flatten(), z_VBd.mean(0).square().sum()[None].detach(), num_images])
    return z.to(torch.promote_types(u.dtype, torch.float32)), sums, inv.detach()[:, 0].clone()


def backward_reference(grad_z: Tensor | None, grad_sums: Tensor | None, scale: float, z: Tensor, inv: Tensor) -> Tensor:
    """Compute dL/du in float64; grad_sums: [views, d], equal for all rows of a view."""
    g = torch.zeros_like(z, dtype=torch.float64) if grad_z is None else grad_z.double()
    if grad_sums is not None:
        g = g + scale * grad_sums.double().repeat_interleave(len(z) // len(grad_sums), dim=0)
    return inv[:, None] * (g - z * (z * g).sum(1, keepdim=True))


def _outputs(u: Tensor, num_views: int) -> tuple[Tensor, Tensor, Tensor]:
    (rows, d), wide = u.shape, torch.promote_types(u.dtype, torch.float32)
    sums, inv_norm = (torch.empty(n, dtype=torch.float64, device=u.device) for n in (num_views * d + 2, rows))
    return torch.empty(rows, d, dtype=wide, device=u.device), sums, inv_norm


def _is_compiled(op: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether the compiled op runs; both kinds of it are one call, which torch sends to the tensors' device."""
    here, elsewhere = ("cuda", "cpp") if device.type == "cuda" else ("cpp", "cuda")
    no_form = "no float64 form" if dtype == torch.float64 else None
    reasons = {kind: native_unsupported_reason(kind, device) or no_form for kind in (here, elsewhere)}
    return choose(op, device, {here: reasons[here], "reference": None, elsewhere: reasons[elsewhere]}) != "reference"


@torch.library.custom_op(f"{NAMESPACE}::center_vector", mutates_args=())
def _op(
    u: Tensor, state: Tensor, num_views: int, rule: str, update_when: str, beta: float, rate: float, max_skips: int,
    center_beta: float, flag: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return (z, center, next state, inv_norm)."""
    if _is_compiled("center_vector", u.device, u.dtype):
        (z, sums, inv_norm), next_state = _outputs(u, num_views), torch.empty_like(state)
        center = torch.empty(u.shape[1], device=u.device)
        gate = gate_numbers(rule, update_when, beta, rate, max_skips, center_beta, flag)
        torch.ops.upstep_ops.center_vector(
            u.contiguous(), state.contiguous(), num_views, *gate, z, inv_norm, sums, center, next_state
        )
        return z, center, next_state, inv_norm
    return _by_reference(u, state, num_views, rule, update_when, beta, rate, max_skips, center_beta, flag)


def _by_reference(u: Tensor, state: Tensor, num_views: int, *gate: Any) -> CenterVector:
    found = center_vector_reference(u, state, num_views=num_views, **dict(zip(_GATE, gate, strict=False)))
    if flag := gate[-1]:
        write_flag(flag, found.state)
    return found


@_op.register_fake
def _(u: Tensor, state: Tensor, num_views: int, *gate: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    z, _, inv_norm = _outputs(u, num_views)
    return z, z.new_empty(u.shape[1]), torch.empty_like(state), inv_norm


@torch.library.custom_op(f"{NAMESPACE}::center_vector_partial", mutates_args=())
def _partial_op(u: Tensor, num_views: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (z, sums, inv_norm)."""
    if _is_compiled("center_vector_partial", u.device, u.dtype):
        z, sums, inv_norm = _outputs(u, num_views)
        torch.ops.upstep_ops.center_vector_partial(u.contiguous(), num_views, z, inv_norm, sums)
        return z, sums, inv_norm
    return partial_reference(u, num_views=num_views)


_partial_op.register_fake(_outputs)


@torch.library.custom_op(f"{NAMESPACE}::center_vector_finish", mutates_args=())
def _finish_op(
    sums: Tensor, state: Tensor, num_views: int, rule: str, update_when: str, beta: float, rate: float,
    max_skips: int, center_beta: float, flag: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return (center, next state)."""
    if _is_compiled("center_vector_finish", sums.device, torch.float32):
        center = torch.empty(len(state) - HEAD, device=sums.device)
        next_state = torch.empty_like(state)
        gate = gate_numbers(rule, update_when, beta, rate, max_skips, center_beta, flag)
        torch.ops.upstep_ops.center_vector_finish(
            sums.contiguous(), state.contiguous(), num_views, *gate, center, next_state
        )
        return center, next_state
    return _finish_by_reference(sums, state, num_views, rule, update_when, beta, rate, max_skips, center_beta, flag)


def _finish_by_reference(sums: Tensor, state: Tensor, num_views: int, *gate: Any) -> tuple[Tensor, Tensor]:
    center, next_state = finish_reference(sums, state, num_views=num_views, **dict(zip(_GATE, gate, strict=False)))
    if flag := gate[-1]:
        write_flag(flag, next_state)
    return center.float(), next_state


@_finish_op.register_fake
def _(sums: Tensor, state: Tensor, num_views: int, *gate: Any) -> tuple[Tensor, Tensor]:
    return sums.new_empty(len(state) - HEAD, dtype=torch.float32), torch.empty_like(state)


@torch.library.custom_op(f"{NAMESPACE}::center_vector_backward", mutates_args=())
def _backward_op(
    grad_z: Tensor | None, grad_sums: Tensor | None, scale: float, z: Tensor, inv_norm: Tensor, dtype: torch.dtype
) -> Tensor:
    if _is_compiled("center_vector_backward", z.device, z.dtype):
        grad_u = torch.empty(z.shape, dtype=dtype, device=z.device)
        dense = [None if g is None else g.float().contiguous() for g in (grad_z, grad_sums)]
        torch.ops.upstep_ops.center_vector_backward(*dense, scale, z.contiguous(), inv_norm.contiguous(), grad_u)
        return grad_u
    return backward_reference(grad_z, grad_sums, scale, z, inv_norm).to(dtype)


@_backward_op.register_fake
def _(
    grad_z: Tensor | None, grad_sums: Tensor | None, scale: float, z: Tensor, inv_norm: Tensor, dtype: torch.dtype
) -> Tensor:
    return torch.empty(z.shape, dtype=dtype, device=z.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    z, *rest, inv_norm = output
    ctx.mark_non_differentiable(inv_norm, *rest[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(z, inv_norm)
    ctx.dtype = inputs[0].dtype


def _rows_backward(ctx: Any, grad_z: Tensor | None, grad_sums: Tensor | None, scale: float) -> Tensor | None:
    if grad_z is None and grad_sums is None:
        return None
    return _backward_op(grad_z, grad_sums, scale, *ctx.saved_tensors, ctx.dtype)


def _backward(ctx: Any, grad_z: Tensor | None, grad_center: Tensor | None, *_: Any) -> tuple[Any, ...]:
    grad_sums = None if grad_center is None else grad_center[None]
    return _rows_backward(ctx, grad_z, grad_sums, 1 / len(ctx.saved_tensors[0])), *(None,) * 9


def _setup_partial(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _setup_context(ctx, inputs, output)
    ctx.num_views = inputs[1]


def _partial_backward(ctx: Any, grad_z: Tensor | None, grad_sums: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    by_view = None if grad_sums is None else grad_sums[:-2].view(ctx.num_views, -1)
    return _rows_backward(ctx, grad_z, by_view, 1.0), None


def _setup_finish(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.num_rows, ctx.num_views = inputs[0][-1] * inputs[2], inputs[2]


def _finish_backward(ctx: Any, grad_center: Tensor, _: Tensor) -> tuple[Any, ...]:
    grad = (grad_center.double() / ctx.num_rows).repeat(ctx.num_views)
    return torch.cat([grad, grad.new_zeros(2)]), *(None,) * 9


_op.register_autograd(_backward, setup_context=_setup_context)
_partial_op.register_autograd(_partial_backward, setup_context=_setup_partial)
_finish_op.register_autograd(_finish_backward, setup_context=_setup_finish)


def _validate(op: str, u: Tensor, views: int) -> None:
    if u.dim() != 2 or not 1 <= u.shape[1] <= MAX_WIDTH:
        raise ValueError(f"{op}: u must be [rows, d] with d from 1 to {MAX_WIDTH}, got {list(u.shape)}")
    if u.dtype not in _DTYPES:
        raise ValueError(f"{op}: u must be one of {', '.join(map(str, _DTYPES))}, got {u.dtype}")
    if not 1 <= views <= MAX_VIEWS:
        raise ValueError(f"{op}: num_views must be 1 to {MAX_VIEWS}, got {views}")
    if u.shape[0] % views:
        raise ValueError(f"{op}: u must hold {views} views of each image, a multiple of {views} rows, got {len(u)}")


def center_vector_update(
    u: Tensor, state: Tensor, *, num_views: int = 1, rule: str = "ema", update_when: str = "low", beta: float = 0.9,
    rate: float = 0.5, max_skips: int = 16, center_beta: float = 0.9, flag: int = 0,
) -> CenterVector:  # fmt: skip
    """Compute unit embeddings, their mean, its running mean and magnitude, and the gate's decision, in one launch.

    u: [rows, d], fp32, fp16, bf16 or fp64; the views stacked, rows = num_views x images; d at most 4096.
    state: float64 [HEAD + d] on u's device, from `gate.new_gate_state(d)` or the step before; left as it is. In a
        captured graph copy the new state over the old: `state.copy_(result.state)`.
    rule, update_when, beta, rate, max_skips, center_beta: see `gate`. A magnitude that is not finite closes the gate.
    flag: `address` of a `gate.new_gate_flag(u.device)`, to which the decision is written too; 0: none.
    Returns CenterVector (z and center carry gradient). Raises ValueError for arguments that do not fit.
    """
    _validate("center_vector_update", u, num_views)
    gate = (rule, update_when, float(beta), float(rate), int(max_skips), float(center_beta), int(flag))
    validate_gate("center_vector_update", u, state, u.shape[1], num_views, *gate)
    if u.shape[0] == 0:
        raise ValueError("center_vector_update: u must have at least one row, got 0 (see center_vector_partial)")
    run = _by_reference if is_transformed("center_vector", u) else _op
    return CenterVector(*run(u, state, num_views, *gate))


def center_vector_partial(u: Tensor, *, num_views: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Compute one rank's share: (z [rows, d], sums, inv_norm [rows]); u as in center_vector_update, 0 rows or more.

    sums: float64 [num_views d + 2]: sum of z over the images of each view, sum of |mean of an image's views|^2,
    number of images. Add the ranks' sums up, then call center_vector_finish. Gradient flows through z and the first
    num_views d cells of sums.
    """
    _validate("center_vector_partial", u, num_views)
    return (partial_reference if is_transformed("center_vector", u) else _partial_op)(u, num_views=num_views)


def center_vector_finish(
    sums: Tensor, state: Tensor, *, num_views: int = 1, rule: str = "ema", update_when: str = "low",
    beta: float = 0.9, rate: float = 0.5, max_skips: int = 16, center_beta: float = 0.9, flag: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Compute (center [d] fp32, with gradient; next state) from the sums over all ranks, equal on every rank.

    sums: float64 [num_views d + 2], those of center_vector_partial added up; the rest as in center_vector_update.
    """
    gate = (rule, update_when, float(beta), float(rate), int(max_skips), float(center_beta), int(flag))
    if sums.dim() != 1 or sums.dtype != torch.float64 or num_views not in (1, 2) or (len(sums) - 2) % num_views:
        got = f"{sums.dtype} {list(sums.shape)} with num_views={num_views}"
        raise ValueError(f"center_vector_finish: sums must be float64 [num_views d + 2], num_views 1 or 2, got {got}")
    validate_gate("center_vector_finish", sums, state, (len(sums) - 2) // num_views, num_views, *gate)
    run = _finish_by_reference if is_transformed("center_vector", sums) else _finish_op
    return run(sums, state, num_views, *gate)


def center_vector_backward(
    grad_z: Tensor | None, center: Tensor | None, coefficient: float, z: Tensor, inv_norm: Tensor, dtype: torch.dtype
) -> Tensor:
    """Compute dL/du [rows, d] in `dtype`, for a handwritten backward: g = grad_z + coefficient * center in every row.

    For the penalty lambda |s|^2: center = s, coefficient = 2 lambda / rows (rows of all ranks). One pass, one launch.
    grad_z: [rows, d] or None; center: [d] or None; z, inv_norm: as center_vector_update returned them.
    """
    if z.dim() != 2 or inv_norm.shape != z.shape[:1]:
        got = f"{list(z.shape)} and {list(inv_norm.shape)}"
        raise ValueError(f"center_vector_backward: z must be [rows, d] and inv_norm [rows], got {got}")
    for name, t, shape in (("grad_z", grad_z, z.shape), ("center", center, z.shape[1:])):
        if t is not None and (t.shape != shape or t.device != z.device):
            got = f"{list(t.shape)} on {t.device}"
            raise ValueError(f"center_vector_backward: {name} must be {list(shape)} on {z.device}, got {got}")
    if not math.isfinite(coefficient):
        raise ValueError(f"center_vector_backward: coefficient must be finite, got {coefficient}")
    return _backward_op(grad_z, None if center is None else center[None], float(coefficient), z, inv_norm, dtype)
