"""Exact nearest neighbors: one product over all rows, in blocks, and the order of float64.

    s(i) = x_i . q                     cosine of unit vectors x_i, q
    |fl(s) - s| <= g,  g = D u         of an fp32 product of D terms in any order, u = 2^-24, since |x| = |q| = 1

In each block of rows the product is computed in fp32. A row whose fp32 score is below the k-th best score so far by
more than g cannot be among the k best; the few others are scored again in float64. So the result is that of a stable
sort of all float64 scores, equal scores by lower index, whatever the block or the BLAS.
"""

from __future__ import annotations

import numpy as np

from upstep_fast.errors import DataError

BLOCK = 1 << 14  # rows: their scores for one query, 64 KB, stay in the cache
QUERIES = 64  # of one product
_ROWS_AT_ONCE = 1 << 15  # scored again in float64 at a time: 50 MB at D = 192


def unit_rows(x: np.ndarray, field: str = "features") -> np.ndarray:
    """Return the rows of x [N, D] as unit vectors, fp32, C-contiguous; norms are taken in float64.

    field: what the message starts with. Raises DataError for other shapes and for rows that are not finite or are 0.
    """
    x = np.asarray(x)
    if x.ndim != 2 or not np.issubdtype(x.dtype, np.floating):
        raise DataError(f"{field}: got {x.dtype} {list(x.shape)}, must be floating-point [N, D]")
    unit = np.empty(x.shape, np.float32)
    for start in range(0, len(x), BLOCK):
        rows = x[start : start + BLOCK].astype(np.float64)
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        bad = ~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0)
        if bad.any():
            raise DataError(f"{field}: row {start + int(bad.argmax())} is not finite or is 0; embed its image again")
        unit[start : start + BLOCK] = rows / norms
    return unit


def top_k(x: np.ndarray, queries: np.ndarray, k: int, block: int = BLOCK) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores [Q, K], float64, and numbers [Q, K], int64, of the rows nearest to each query, K = min(k, N).

    x: [N, D], queries: [Q, D], unit vectors in fp32. Largest scores first; of equal ones the lower row.
    """
    k = min(k, len(x))
    groups = [_top_k(x, queries[i : i + QUERIES], k, block) for i in range(0, len(queries), QUERIES)]
    if k == 0 or not groups:
        return np.zeros((len(queries), k)), np.zeros((len(queries), k), np.int64)
    return np.concatenate([scores for scores, _ in groups]), np.concatenate([rows for _, rows in groups])


def score_again(x: np.ndarray, queries: np.ndarray, which: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the float64 scores [M] of pairs, query which[m] and row rows[m]; each depends on its pair alone."""
    scores = np.empty(len(rows))
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        part = slice(start, start + _ROWS_AT_ONCE)
        scores[part] = (x[rows[part]].astype(np.float64) * queries[which[part]]).sum(axis=1)
    return scores


def merged(
    which: np.ndarray, scores: np.ndarray, rows: np.ndarray, num_queries: int, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best pairs of each query as scores and rows [Q, k]; every query needs at least k pairs."""
    order = np.lexsort((rows, -scores, which))
    first = np.searchsorted(which[order], np.arange(num_queries))
    best = order[first[:, None] + np.arange(k)]
    return scores[best], rows[best]


def _top_k(x: np.ndarray, queries: np.ndarray, k: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    num, bound = len(queries), 2.0**-24 * x.shape[1] * 1.01
    exact = queries.astype(np.float64)
    best, found = np.full((num, k), -np.inf), np.full((num, k), len(x), np.int64)
    if k == 0:
        return best, found
    for start in range(0, len(x), block):
        rows = x[start : start + block]
        scores = (rows @ queries[0])[None] if num == 1 else queries @ rows.T
        least = best[:, -1] - bound
        if len(rows) >= k and np.isneginf(least).any():  # before k rows are known: the block's own k-th best
            least = np.maximum(least, np.partition(scores, len(rows) - k, axis=1)[:, -k] - 2 * bound)
        which, columns = np.nonzero(scores >= least[:, None])
        if not len(which):
            continue
        again = score_again(rows, exact, which, columns)
        which = np.concatenate([np.repeat(np.arange(num), k), which])
        both = np.concatenate([best.ravel(), again]), np.concatenate([found.ravel(), columns + start])
        best, found = merged(which, *both, num, k)
    return best, found
