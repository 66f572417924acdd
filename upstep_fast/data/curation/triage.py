"""A look at every image before a run: what should not be trained on, and what its owner may want to know.

    exact copy    its decoded pixels are those of an earlier image            left out
    blank         standard deviation below 1 of 255 levels in every channel   left out
    near copy     its perceptual hash differs in at most 2 of 64 bits         listed (phash.py)
    bit depth     16-bit values that never reach 4096: nearly black           listed
    odd one out   gray among colored images, transparent, CMYK ...           listed, if under 5 % are
    odd shape     a side below 16 pixels, or more than 8 times the other      listed

Nothing is decided on what cannot be seen in the image itself and those before it, so the same images give the same
verdicts anywhere, with any number of threads. Unreadable images are left to the loader, which replaces and counts them.
Time: one decoding of every image; the search for near copies takes at most half a minute for a million. Memory: about
50 bytes an image.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from upstep_fast.data.curation.perceptual_hash import near, perceptual_hash
from upstep_fast.data.decode.arrays import NPY, npy_header, tiff_bits
from upstep_fast.data.decode.image import FORMATS, BadImage, decode
from upstep_fast.data.loading.ordered_map import ordered_map
from upstep_fast.data.loading.skipped import check_bad
from upstep_fast.data.sources.source import Source

VERSION = 1  # of the rules: another one makes cached verdicts stale
BLANK_STD = 1.0  # of 255 levels
RARE = 0.05  # a kind of image that fewer are of is listed
MIN_SIDE, MAX_ASPECT = 16, 8
AHEAD = 256  # images in flight
LEFT_OUT = ("exact copies", "blank")
LISTED = ("near copies", "wrong bit depth", "odd ones out", "odd shapes")


@dataclass(frozen=True)
class Verdict:
    """index -> reason of what is left out and of what is only listed, and how many of each kind there are."""

    left_out: dict[int, str]
    listed: dict[int, str]
    counts: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        rows = [{str(i): reason for i, reason in part.items()} for part in (self.left_out, self.listed)]
        return {"left_out": rows[0], "listed": rows[1], "counts": self.counts}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Verdict:
        """Raise KeyError, TypeError, ValueError or AttributeError for what is no verdict."""
        parts = [{int(i): str(reason) for i, reason in values[name].items()} for name in ("left_out", "listed")]
        return cls(parts[0], parts[1], {str(k): int(v) for k, v in values["counts"].items()})

    def problems(self, source: Source) -> list[tuple[str, str]]:
        """(name, reason) of all of them, for skipped.csv."""
        rows = {
            **self.left_out,
            **{i: f"kept: {reason}" for i, reason in self.listed.items() if i not in self.left_out},
        }
        return [(source.name(i), rows[i]) for i in sorted(rows)]

    def kept(self, count: int) -> np.ndarray:
        """[N] int64, ascending: which of `count` images are not left out."""
        return np.setdiff1d(np.arange(count), np.fromiter(self.left_out, np.int64, len(self.left_out)))

    def __str__(self) -> str:
        words = {name: f"{self.counts[name]:,} {name}" for name in (*LEFT_OUT, *LISTED)}
        left, listed = (", ".join(words[name] for name in names) for names in (LEFT_OUT, LISTED))
        return f"{self.counts['images']:,} images; left out: {left}; listed in skipped.csv: {listed}"


@dataclass
class _Seen:
    """What is kept of the images, in order."""

    digests: dict[bytes, int] = field(default_factory=dict)  # pixels -> the first image of them
    indices: list[int] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)


def triage(source: Source, *, channels: int = 3, num_workers: int = 0, max_bad_fraction: float = 0.01) -> Verdict:
    """Look at every image. Raises DataError when more than `max_bad_fraction` cannot be read."""
    seen = _Seen()
    left_out: dict[int, str] = {}
    listed: dict[int, list[str]] = {}
    counts = {"images": len(source), **dict.fromkeys((*LEFT_OUT, *LISTED, "unreadable"), 0)}

    def list_it(index: int, kind: str, reason: str) -> None:
        counts[kind] += 1
        listed.setdefault(index, []).append(reason)

    def leave_out(index: int, kind: str, reason: str) -> None:
        counts[kind] += 1
        left_out[index] = reason

    with contextlib.closing(_looks(source, channels, num_workers)) as looks:
        for index, look in enumerate(looks):
            if isinstance(look, str):
                seen.bad[source.name(index)] = look
                check_bad(seen.bad, len(source), max_bad_fraction)
                counts["unreadable"] += 1
                continue
            first = seen.digests.setdefault(look.digest, index)
            if look.std < BLANK_STD and not look.depth:
                leave_out(index, "blank", f"blank: no channel varies by more than {BLANK_STD:g} of 255 levels")
            elif first != index:
                leave_out(index, "exact copies", f"the same pixels as {source.name(first)}")
            else:
                seen.indices.append(index)
                seen.hashes.append(look.hash)
                seen.kinds.append(look.kind)
                if look.depth:
                    list_it(index, "wrong bit depth", look.depth)
                if look.shape:
                    list_it(index, "odd shapes", look.shape)
    firsts, bits = near(np.array(seen.hashes, np.uint64))
    for at in np.flatnonzero(firsts >= 0):
        name = source.name(seen.indices[firsts[at]])
        list_it(
            seen.indices[at], "near copies", f"nearly the picture {name} ({bits[at]} of 64 bits of its hash differ)"
        )
    kinds, of = np.unique(np.array(seen.kinds, dtype=str), return_inverse=True)
    number = np.bincount(of, minlength=len(kinds))
    most = int(number.argmax()) if len(kinds) else 0
    for at in np.flatnonzero(number[of] < RARE * len(of)):
        share = f"{number[most] / len(of):.0%} of the images are {kinds[most]}"
        list_it(seen.indices[at], "odd ones out", f"{kinds[of[at]]}, where {share}")
    return Verdict(left_out, {i: "; ".join(listed[i]) for i in sorted(listed)}, counts)


@dataclass(frozen=True)
class _Look:
    digest: bytes
    hash: int
    std: float  # the largest of the channels, levels
    kind: str
    depth: str | None
    shape: str | None


def _looks(source: Source, channels: int, num_workers: int) -> Generator[_Look | str]:
    def look(index: int) -> _Look | str:
        try:
            data = source.read(index)
            return _look(data, decode(data, channels=channels))
        except BadImage as error:
            return error.reason
        except OSError as error:
            return f"cannot be read: {error.strerror or error}"

    return ordered_map(look, range(len(source)), num_workers, AHEAD)


def _look(data: bytes, image: Tensor) -> _Look:
    kind, bits = _header(data)
    one = image[:1] if image.stride(0) == 0 else image
    _, height, width = image.shape
    pixels = image.contiguous().numpy()
    digest = hashlib.blake2b(f"{tuple(image.shape)}".encode() + pixels.tobytes(), digest_size=16).digest()
    brightest = int(one.max())
    low = f"{bits}-bit values, none above {(brightest + 1) * 256 - 1}: nearly black as 8 bits"
    shape = f"{width} x {height} pixels"
    is_odd = min(height, width) < MIN_SIDE or max(height, width) > MAX_ASPECT * min(height, width)
    return _Look(
        digest=digest,
        hash=perceptual_hash(image),
        std=float(one.flatten(1).float().std(1, correction=0).max()),
        kind=kind,
        depth=low if bits == 16 and 0 < brightest < 16 else None,
        shape=shape if is_odd else None,
    )


def _header(data: bytes) -> tuple[str, int]:
    """What kind of image this is, and its bits a channel, from its header; the file is known to be readable."""
    if data[:6] == NPY:
        return "an array", 8 * npy_header(io.BytesIO(data))[2].itemsize
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            mode, kind, is_transparent = image.mode, image.format, image.has_transparency_data
    except UnidentifiedImageError:  # a TIFF of many bands
        return "an array", tiff_bits(data)
    bits = data[24] if kind == "PNG" else tiff_bits(data) if kind == "TIFF" else 16 if mode.startswith("I") else 8
    if is_transparent:
        return "transparent", bits
    kinds = {"1": "gray", "L": "gray", "CMYK": "CMYK"}
    return "16-bit gray" if mode.startswith("I") else kinds.get(mode, "color"), bits
