"""Exact search: against a stable sort of float64 scores and against FAISS's flat index."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from upstep_fast.errors import DataError
from upstep_fast.evaluation.search.exact import top_k, unit_rows


def oracle(x: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """A stable sort of all scores; each is an exactly rounded sum of products that float64 holds exactly."""
    scores = (x.astype(np.float64)[None] * queries.astype(np.float64)[:, None]).sum(-1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, 1), order


def vectors(count: int, width: int, seed: int = 0, spread: float = 1.0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return unit_rows(random.standard_normal(width) + spread * random.standard_normal((count, width)))


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 14])
@pytest.mark.parametrize("num", [1, 3, 70])
@pytest.mark.parametrize(("count", "k"), [(500, 20), (500, 1), (12, 20), (1, 5), (64, 64)])
def test_equals_a_stable_sort_in_float64(count, k, num, block):
    x, queries = vectors(count, 24), vectors(num, 24, seed=1)
    scores, rows = top_k(x, queries, k, block)
    expected = oracle(x, queries, k)
    assert np.array_equal(rows, expected[1])
    assert np.array_equal(scores, expected[0])


@pytest.mark.parametrize("spread", [1e-7, 1e-5, 1e-3])
def test_scores_that_fp32_cannot_tell_apart(spread):
    x = vectors(3000, 64, spread=spread)
    queries = x[:5]
    scores, rows = top_k(x, queries, 20, block=256)
    expected = oracle(x, queries, 20)
    assert np.array_equal(rows, expected[1]) and np.array_equal(scores, expected[0])


def test_equal_rows_are_returned_by_number():
    x = vectors(300, 16)
    x[[7, 250, 13, 199, 64]] = x[100]
    assert top_k(x, x[100:101], 6, block=32)[1].tolist() == [[7, 13, 64, 100, 199, 250]]
    same = np.repeat(x[:1], 1000, axis=0)
    assert top_k(same, x[:3], 5, block=64)[1].tolist() == [[0, 1, 2, 3, 4]] * 3


def test_agrees_with_a_flat_index_of_faiss():
    x, queries = vectors(5000, 96), vectors(40, 96, seed=3)
    index = faiss.IndexFlatIP(96)
    index.add(x)
    expected = index.search(queries, 10)
    scores, rows = top_k(x, queries, 10)
    assert np.abs(scores - expected[0]).max() < 1e-6
    assert (rows == expected[1]).mean() > 0.99  # FAISS rounds to fp32


def test_nothing_to_search():
    x = vectors(5, 8)
    assert top_k(x[:0], x, 3)[1].shape == (5, 0)
    assert top_k(x, x[:0], 3)[1].shape == (0, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_unit_rows(dtype):
    """Slices and other types, which FAISS's own normalize_L2 refuses, and norms beyond fp32."""
    x = np.random.default_rng(0).standard_normal((40, 6)).astype(dtype)[::2, ::2]
    unit = unit_rows(x)
    wide = x.astype(np.float64)
    assert unit.dtype == np.float32 and unit.flags.c_contiguous
    assert np.array_equal(unit, (wide / np.linalg.norm(wide, axis=1, keepdims=True)).astype(np.float32))
    if dtype != np.float16:
        assert np.allclose(unit_rows(x.astype(dtype) * dtype(1e25)), unit, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_rows_without_a_direction_are_refused(value):
    x = vectors(9, 4)
    x[3] = value
    with pytest.raises(DataError, match="row 3 is not finite or is 0"):
        unit_rows(x)
    for other in (x[0], np.ones((3, 4), int), np.ones((3, 4), object)):
        with pytest.raises(DataError, match="must be floating-point"):
            unit_rows(other)
