"""The checks must fail when a kernel is wrong: each fault below is one they exist to find."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_matches, guarded_outputs, laid_out, surrounded

HALF = (torch.float16, torch.bfloat16)


def product(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)
    a, b = (torch.randn(64, 64).to(dtype) for _ in range(2))
    oracle = a.double() @ b.double()
    return oracle.to(dtype), oracle, (a.to(wide) @ b.to(wide)).to(dtype)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64])
def test_rounding_passes(dtype):
    got, oracle, eager = product(dtype)
    assert_matches(got, oracle)
    assert_matches(eager, oracle, eager)


@pytest.mark.parametrize("dtype", HALF)
def test_truncation_is_found_by_its_bias(dtype):
    got, oracle, eager = product(dtype)
    too_far = got.double().abs() > oracle.abs()
    truncated = torch.where(too_far, torch.nextafter(got, torch.zeros_like(got)), got)
    with pytest.raises(AssertionError, match="mean error"):
        assert_matches(truncated, oracle, eager)


def test_one_wrong_cell_is_found():
    got, oracle, eager = product(torch.float32)
    got[3, 5] += 1e-3
    with pytest.raises(AssertionError, match="max error"):
        assert_matches(got, oracle, eager)


def test_lost_digits_are_found():
    got, oracle, eager = product(torch.float32)
    with pytest.raises(AssertionError, match=r"max error|RMS"):
        assert_matches(got.bfloat16().float(), oracle, eager)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_on_one_side_is_found(bad):
    got, oracle, eager = product(torch.float32)
    got[0, 0] = bad
    with pytest.raises(AssertionError, match="infinite on one side"):
        assert_matches(got, oracle, eager)
    oracle[0, 0] = bad
    assert_matches(got, oracle, eager.masked_fill(oracle.isnan() | oracle.isinf(), bad))


@pytest.mark.parametrize("make", ["empty", "empty_like", "empty_strided", "new_empty"])
def test_unwritten_cells_are_nan_and_overruns_are_found(make):
    x = torch.ones(3, 4)
    calls = {
        "empty": lambda: torch.empty(3, 4),
        "empty_like": lambda: torch.empty_like(x),
        "empty_strided": lambda: torch.empty_strided((3, 4), (1, 3)),
        "new_empty": lambda: x.new_empty(3, 4),
    }
    with guarded_outputs():
        y = calls[make]()
    assert y.isnan().all()
    for offset in (-1, 12):
        with pytest.raises(AssertionError, match="written outside"), guarded_outputs():
            y = calls[make]()
            y.as_strided((1,), (1,), y.storage_offset() + offset).fill_(1.0)
    assert torch.empty.__name__ == "empty"


@pytest.mark.parametrize("layout", ["contiguous", "slice", "transpose"])
def test_surrounded_keeps_values_and_strides(layout):
    x = laid_out(torch.randn(5, 7), layout)
    y = surrounded(x)
    assert torch.equal(x, y) and x.stride() == y.stride()
    for offset in (-1, 1 + 4 * y.stride(0) + 6 * y.stride(1)):
        assert y.as_strided((1,), (1,), y.storage_offset() + offset).isnan()
