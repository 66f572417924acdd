"""Triage: inspection of every image before a run, for images to leave out and images to report to their owner.

    exact copy    its decoded pixels are those of an earlier image            left out
    blank         standard deviation below 1 of 255 levels in every channel   left out
    near copy     its perceptual hash differs in at most 2 of 64 bits         listed (perceptual_hash.py)
    bit depth     16-bit values by their upper eight bits that never reach
                  4096: nearly black (none with a measured range)             listed
    odd one out   gray among color images, transparent, CMYK ...              listed, if under 5 % are
    odd shape     a side below 16 pixels, or more than 8 times the other      listed

A verdict depends on the image and on earlier ones only, so equal images give equal verdicts on any machine and with any
number of threads. Unreadable images are left to the loader, which replaces and counts them.
Time: one decoding of every image; the search for near copies takes at most half a minute for a million. Memory: about
50 bytes per image.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from upstep_fast.data.curation.perceptual_hash import near, perceptual_hash
from upstep_fast.data.decode.arrays import NPY, npy_header
from upstep_fast.data.decode.tiff import tiff_bits
from upstep_fast.data.formats.photographs import FORMATS
from upstep_fast.data.loading.skipped_images import SkippedImages, decode_item, map_readable, read_item
from upstep_fast.data.sources.part import Item
from upstep_fast.data.sources.source import Source

VERSION = 1  # of the rules; a change makes cached verdicts stale
BLANK_STD = 1.0  # of 255 levels
RARE = 0.05  # a kind of image is listed when less than this fraction has it
MIN_SIDE, MAX_ASPECT = 16, 8
AHEAD = 256  # images in flight
LEFT_OUT = ("exact copies", "blank")
LISTED = ("near copies", "wrong bit depth", "odd ones out", "odd shapes")
_COUNTS = ("images", *LEFT_OUT, *LISTED, "unreadable")


@dataclass(frozen=True)
class Verdict:
    """Result of a triage: images to leave out and images only listed, with reasons, and counts of each kind."""

    left_out: dict[int, str]  # index -> reason
    listed: dict[int, str]
    counts: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """Return the verdict as JSON objects."""
        rows = [{str(i): reason for i, reason in part.items()} for part in (self.left_out, self.listed)]
        return {"left_out": rows[0], "listed": rows[1], "counts": self.counts}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Verdict:
        """Return the verdict that `to_dict` wrote. Raises KeyError, TypeError, ValueError or AttributeError."""
        counts = {name: int(values["counts"][name]) for name in _COUNTS}
        parts = [{int(i): str(reason) for i, reason in values[name].items()} for name in ("left_out", "listed")]
        if odd := [i for part in parts for i in part if not 0 <= i < counts["images"]]:
            raise ValueError(f"image {odd[0]} of {counts['images']}")
        return cls(parts[0], parts[1], counts)

    def problems(self, source: Source) -> list[tuple[str, str]]:
        """Return (name, reason) of every image left out or listed, for skipped.csv."""
        rows = {
            **self.left_out,
            **{i: f"kept: {reason}" for i, reason in self.listed.items() if i not in self.left_out},
        }
        return [(source.name(i), rows[i]) for i in sorted(rows)]

    def kept(self, count: int) -> np.ndarray:
        """Return the indices of those of `count` images that are not left out, [N] int64, ascending."""
        return np.setdiff1d(np.arange(count), np.fromiter(self.left_out, np.int64, len(self.left_out)))

    def __str__(self) -> str:
        words = {name: f"{self.counts[name]:,} {name}" for name in (*LEFT_OUT, *LISTED)}
        left, listed = (", ".join(words[name] for name in names) for names in (LEFT_OUT, LISTED))
        return f"{self.counts['images']:,} images; left out: {left}; listed in skipped.csv: {listed}"


@dataclass(frozen=True)
class _Features:
    """Features of an image that the rules compare."""

    digest: bytes  # of the pixels
    hash: int  # perceptual, 64 bits
    std: float  # the largest of the channels, levels
    kind: str
    depth: str | None  # reason to list it
    shape: str | None  # reason to list it


@dataclass
class _Findings:
    """Images found so far, by the rule's name in LEFT_OUT and LISTED."""

    counts: dict[str, int]
    left_out: dict[int, str] = field(default_factory=dict)
    listed: dict[int, list[str]] = field(default_factory=dict)

    def leave_out(self, index: int, rule: str, reason: str) -> None:
        self.counts[rule] += 1
        self.left_out[index] = reason

    def list(self, index: int, rule: str, reason: str) -> None:
        self.counts[rule] += 1
        self.listed.setdefault(index, []).append(reason)


def triage(source: Source, *, channels: int = 3, num_workers: int = 0, max_bad_fraction: float = 0.01) -> Verdict:
    """Inspect every image. Raises DataError when more than `max_bad_fraction` cannot be read."""
    findings = _Findings(dict.fromkeys(_COUNTS, 0) | {"images": len(source)})
    originals: dict[bytes, int] = {}  # digest -> the first image with these pixels
    indices: list[int] = []  # of the images that are kept, with their hashes and kinds
    hashes: list[int] = []
    kinds: list[str] = []

    def read(index: int) -> _Features:
        item = read_item(source, index)
        image = decode_item(item, source.reading, channels=channels)
        return _features(item, image, by_declared_range=not source.reading.intensity.ranges)

    options: dict[str, Any] = {"num_workers": num_workers, "ahead": AHEAD, "max_bad_fraction": max_bad_fraction}
    with contextlib.closing(map_readable(read, source, range(len(source)), SkippedImages(), **options)) as readable:
        for index, image in readable:
            original = originals.setdefault(image.digest, index)
            if image.std < BLANK_STD and not image.depth:
                reason = f"blank: no channel varies by more than {BLANK_STD:g} of 255 levels"
                findings.leave_out(index, "blank", reason)
            elif original != index:
                findings.leave_out(index, "exact copies", f"the same pixels as {source.name(original)}")
            else:
                indices.append(index)
                hashes.append(image.hash)
                kinds.append(image.kind)
                if image.depth:
                    findings.list(index, "wrong bit depth", image.depth)
                if image.shape:
                    findings.list(index, "odd shapes", image.shape)
    findings.counts["unreadable"] = len(source) - len(indices) - len(findings.left_out)
    _list_near_copies(indices, hashes, source.name, findings)
    _list_rare_kinds(indices, kinds, findings)
    listed = {index: "; ".join(findings.listed[index]) for index in sorted(findings.listed)}
    return Verdict(findings.left_out, listed, findings.counts)


def _list_near_copies(indices: list[int], hashes: list[int], name: Callable[[int], str], findings: _Findings) -> None:
    firsts, bits = near(np.array(hashes, np.uint64))
    for at in np.flatnonzero(firsts >= 0):
        original = name(indices[firsts[at]])
        reason = f"nearly the picture {original} ({bits[at]} of 64 bits of its hash differ)"
        findings.list(indices[at], "near copies", reason)


def _list_rare_kinds(indices: list[int], kinds: list[str], findings: _Findings) -> None:
    names, of = np.unique(np.array(kinds, dtype=str), return_inverse=True)
    number = np.bincount(of, minlength=len(names))
    most = int(number.argmax()) if len(names) else 0
    for at in np.flatnonzero(number[of] < RARE * len(of)):
        share = f"{number[most] / len(of):.0%} of the images are {names[most]}"
        findings.list(indices[at], "odd ones out", f"{names[of[at]]}, where {share}")


def _features(item: Item, image: Tensor, by_declared_range: bool) -> _Features:
    kind, bits = _header(item)
    one = image[:1] if image.stride(0) == 0 else image
    _, height, width = image.shape
    pixels = image.contiguous().numpy()
    digest = hashlib.blake2b(f"{tuple(image.shape)}".encode(), digest_size=16)
    digest.update(pixels.data)
    brightest = int(one.max())
    low = f"{bits}-bit values, none above {(brightest + 1) * 256 - 1}: nearly black as 8 bits"
    shape = f"{width} x {height} pixels"
    is_odd = min(height, width) < MIN_SIDE or max(height, width) > MAX_ASPECT * min(height, width)
    return _Features(
        digest=digest.digest(),
        hash=perceptual_hash(image),
        std=float(_stds(one).max()),
        kind=kind,
        depth=low if by_declared_range and bits == 16 and 0 < brightest < 16 else None,
        shape=shape if is_odd else None,
    )


def level_counts(image: Tensor) -> np.ndarray:
    """Return how often each level occurs in each channel, [C, 256] int64; a float copy would take 4 to 8 times as much.

    image: uint8 [C, H, W].
    """
    return np.stack([torch.bincount(channel.flatten(), minlength=256).numpy() for channel in image])


def _stds(image: Tensor) -> np.ndarray:
    """Return the standard deviation of each channel, [C], in levels."""
    shares, levels = level_counts(image) / (image.shape[1] * image.shape[2]), np.arange(256)
    return np.sqrt(np.maximum(shares @ levels**2 - (shares @ levels) ** 2, 0))


def _header(item: Item) -> tuple[str, int]:
    """Return the kind of an image and its bits per channel, from the header of a file that can be decoded."""
    if item.kind is not None:
        return item.kind.name, 8  # its values were brought to 8 bits by their own range
    data: bytes = item.file  # type: ignore[assignment]
    if data[:6] == NPY:
        return "an array", 8 * npy_header(io.BytesIO(data))[2].itemsize
    try:
        with Image.open(io.BytesIO(data), formats=(*FORMATS, "TIFF")) as image:
            mode, kind, is_transparent = image.mode, image.format, image.has_transparency_data
    except UnidentifiedImageError:  # a TIFF of many bands
        return "an array", tiff_bits(data)
    bits = data[24] if kind == "PNG" else tiff_bits(data) if kind == "TIFF" else 16 if mode.startswith("I") else 8
    if is_transparent:
        return "transparent", bits
    kinds = {"1": "gray", "L": "gray", "CMYK": "CMYK"}
    return "16-bit gray" if mode.startswith("I") else kinds.get(mode, "color"), bits
