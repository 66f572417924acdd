"""Approximate search: FAISS's inverted file (IVF), with its recall measured on the vectors themselves.

    c_1 .. c_L             centroids by spherical k-means on a sample, L = sqrt(N)
    list(i) = argmax c . x_i
    a query is compared only with the rows of the `nprobe` lists whose centroids are nearest to it

What FAISS returns is scored again as in exact.py, so scores are those of the exact search. The recall is the part of
the 20 nearest rows of a row (itself left out) that the index returns, over a sample of rows; nprobe is the smallest
power of two that reaches RECALL. Where that is half of the lists or more, the search is exact. Kept on disk are
centroids and list numbers, a few bytes a row: FAISS's structure is made from them and the vectors, and no file is
handed to FAISS's own reader.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from upstep_fast.errors import ConfigError, DataError, first_line
from upstep_fast.evaluation.search.exact import merged, score_again, top_k
from upstep_fast.input_files import require_regular
from upstep_fast.runtime.atomic_file import write_atomic
from upstep_fast.runtime.progress import track

log = logging.getLogger("upstep_fast")

EXACT_BELOW = 100_000  # vectors: an exact search of so many takes a few milliseconds
RECALL, K, SAMPLE = 0.98, 20, 256  # recall at K that is aimed at, measured on SAMPLE rows
TRAIN_PER_LIST = 64  # rows per centroid in the sample of k-means
_KIND = "upstep_fast_lists"
_BLOCK = 1 << 16


@dataclass(frozen=True, eq=False)
class InvertedLists:
    """Inverted lists: the list of each row. Made by `build` from a table's unit vectors."""

    centroids: np.ndarray  # [L, D] fp32
    list_of: np.ndarray  # [N] int64
    digest: str  # of names and vectors, see `digest_of`
    trained: int  # rows when the centroids were made
    nprobe: int = 1
    recall: float = 0.0

    @property
    def is_exact(self) -> bool:
        """Return whether all lists are to be read, for which no lists are needed."""
        return self.nprobe >= len(self.centroids)


def faiss_index(lists: InvertedLists, x: np.ndarray) -> Any:
    """Return FAISS's index of the rows x [N, D]."""
    import faiss

    index = faiss.IndexIVFFlat(_quantizer(lists), x.shape[1], len(lists.centroids), faiss.METRIC_INNER_PRODUCT)
    index.is_trained = True
    for start in range(0, len(x), _BLOCK):
        rows, list_of = x[start : start + _BLOCK], lists.list_of[start : start + _BLOCK]
        index.add_core(len(rows), faiss.swig_ptr(rows), None, faiss.swig_ptr(list_of))
    return index


def search(index: Any, nprobe: int, x: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores and rows [Q, min(k, N)] as `top_k` does, of the rows in the nearest `nprobe` lists.

    index: of `faiss_index`, of the rows x. A query whose nearest lists hold fewer than k rows is searched exactly.
    """
    import faiss

    k = min(k, len(x))
    if k == 0 or len(queries) == 0:
        return top_k(x, queries, k)
    # nprobe is named in every search: parameters without it mean 1
    how: Any = faiss.SearchParametersIVF()
    how.nprobe = nprobe
    # faiss.contrib.torch_utils, which pytorch-metric-learning imports, replaces `search` by one without parameters
    find = getattr(index, "search_numpy", index.search)
    _, rows = find(np.ascontiguousarray(queries), k, params=how)
    which = np.repeat(np.arange(len(queries)), k)
    scores, best = merged(which, score_again(x, queries, which, rows.ravel()), rows.ravel(), len(queries), k)
    short = (rows < 0).any(axis=1)
    if short.any():
        scores[short], best[short] = top_k(x, queries[short], k)
    return scores, best


def is_installed() -> bool:
    """Return whether FAISS is there."""
    return importlib.util.find_spec("faiss") is not None


def is_used(num: int) -> bool:
    """Return whether an index of `num` vectors is to be approximate; logs which extra is missing for one."""
    if num < EXACT_BELOW:
        return False
    if not is_installed():
        log.info('search: exact; `pip install "upstep_fast[search]"` adds an index that reads a part of the images')
    return is_installed()


def build(names: Sequence[str], x: np.ndarray) -> InvertedLists:
    """Return the lists of unit vectors x [N, D], with their recall measured."""
    import faiss

    num = max(1, round(len(x) ** 0.5))
    picked = np.random.default_rng(0).permutation(len(x))[: TRAIN_PER_LIST * num]
    options = dict(niter=10, spherical=True, seed=1, max_points_per_centroid=TRAIN_PER_LIST, min_points_per_centroid=1)
    with track("index: k-means"):
        kmeans = faiss.Kmeans(x.shape[1], num, **options)
        kmeans.train(np.ascontiguousarray(x[np.sort(picked)]))
    lists = InvertedLists(np.array(kmeans.centroids), np.empty(0, np.int64), "", len(x))
    return extend(lists, names, x)


def extend(lists: InvertedLists, names: Sequence[str], x: np.ndarray) -> InvertedLists:
    """Return the lists with the rows of x behind those that they hold; the recall is measured again."""
    parts, quantizer = [lists.list_of], _quantizer(lists)
    with track("index", len(x), done=len(lists.list_of)) as task:
        for start in range(len(lists.list_of), len(x), _BLOCK):
            parts.append(quantizer.search(x[start : start + _BLOCK], 1)[1][:, 0].astype(np.int64))
            task.advance(len(parts[-1]))
    list_of = np.concatenate(parts)
    return _tuned(replace(lists, list_of=list_of, digest=digest_of(names, x)), x)


def fitting(lists: InvertedLists, names: Sequence[str], x: np.ndarray) -> InvertedLists | None:
    """Return the lists for a table: these, extended by its new rows, or None if they are of other vectors.

    None too once the table has twice the rows that the centroids were made of.
    """
    num = len(lists.list_of)
    is_prefix = num <= len(x) <= 2 * lists.trained and lists.centroids.shape[1] == x.shape[1]
    if not is_prefix or digest_of(names[:num], x[:num]) != lists.digest:
        return None
    return lists if num == len(x) else extend(lists, names, x)


def digest_of(names: Sequence[str], x: np.ndarray) -> str:
    """Return the sha256 of names and rows."""
    digest = hashlib.sha256("\0".join(names).encode("utf-8", "surrogatepass"))
    digest.update(np.ascontiguousarray(x, "<f4").data)
    return digest.hexdigest()


def write(lists: InvertedLists, path: Path) -> None:
    """Write the lists to a file atomically. Raises OSError."""
    from safetensors.numpy import save

    tensors = {"centroids": lists.centroids, "list_of": lists.list_of.astype(np.int32)}
    facts = {"digest": lists.digest, "trained": lists.trained, "nprobe": lists.nprobe, "recall": lists.recall}
    facts["tensors"] = _sha256(tensors)
    write_atomic(path, save(tensors, {_KIND: json.dumps(facts)}))


def read(path: Path) -> InvertedLists:
    """Read what `write` wrote. Raises DataError if it is damaged, or no such file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(require_regular(path, "index"), "np") as file:
            facts = json.loads((file.metadata() or {})[_KIND])
            tensors = {name: file.get_tensor(name) for name in ("centroids", "list_of")}
            if facts["tensors"] != _sha256(tensors):
                raise ValueError("its checksum is another")
            return _checked(facts, tensors["centroids"], tensors["list_of"])
    except (ConfigError, OSError, SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else first_line(error).removeprefix("index: ")
        raise DataError(f"index: cannot use {path} ({reason}); delete it, and it is made again") from error


def _checked(facts: dict[str, Any], centroids: np.ndarray, list_of: np.ndarray) -> InvertedLists:
    num = len(centroids)
    if centroids.dtype != np.float32 or centroids.ndim != 2 or not np.isfinite(centroids).all():
        raise ValueError("its centroids are not finite fp32 [L, D]")
    if list_of.dtype != np.int32 or list_of.ndim != 1 or not len(list_of):
        raise ValueError("its list numbers are not int32 [N]")
    if not 0 <= list_of.min() <= list_of.max() < num:
        raise ValueError("its list numbers are out of range")
    nprobe, trained = int(facts["nprobe"]), int(facts["trained"])
    if not 1 <= nprobe <= num or trained < 1:
        raise ValueError("its facts are out of range")
    return InvertedLists(
        centroids, list_of.astype(np.int64), str(facts["digest"]), trained, nprobe, float(facts["recall"])
    )


def _sha256(tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def _quantizer(lists: InvertedLists) -> Any:
    import faiss

    quantizer = faiss.IndexFlatIP(lists.centroids.shape[1])
    quantizer.add(lists.centroids)
    return quantizer


def _tuned(lists: InvertedLists, x: np.ndarray) -> InvertedLists:
    """Return the lists with the smallest nprobe, from the present one on, that reaches RECALL, and that recall.

    If that takes half of the lists or more, nprobe is their number, and the index is searched exactly.
    """
    with track("index: recall"):
        sample = np.sort(np.random.default_rng(1).permutation(len(x))[:SAMPLE])
        truth, itself = top_k(x, x[sample], K + 1), sample[:, None]
        nprobe, index = lists.nprobe, faiss_index(lists, x)
        while (reached := recall(truth, search(index, nprobe, x, x[sample], K + 1), itself)) < RECALL:
            if 4 * nprobe >= len(lists.centroids):
                nprobe, reached = len(lists.centroids), 1.0
                break
            nprobe *= 2
    return replace(lists, nprobe=nprobe, recall=reached)


def recall(truth: tuple[np.ndarray, np.ndarray], answer: tuple[np.ndarray, np.ndarray], itself: np.ndarray) -> float:
    """Return the part of the nearest rows that `answer` holds, the query's own row (`itself` [Q, 1]) left out.

    truth, answer: scores and rows [Q, K + 1]. A row as near as the last true one counts, so ties cost nothing.
    """
    scores = np.where(truth[1] == itself, -np.inf, truth[0])
    num = min(K, scores.shape[1] - 1)
    if num < 1:
        return 1.0
    least = -np.sort(-scores, axis=1)[:, num - 1 : num]
    hits = ((answer[0] >= least) & (answer[1] != itself)).sum(axis=1)
    return float(np.minimum(hits, num).mean() / num)
