"""TIFF files of every kind, written from integers tag by tag: independent of the libraries under test."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

import numpy as np

UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # SampleFormat
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8  # PhotometricInterpretation
NONE, LZW, DEFLATE, PACKBITS = 1, 5, 8, 32773  # Compression


@dataclass(frozen=True)
class Kind:
    """Kind of a TIFF: how its samples are stored."""

    bits: int = 8
    photometric: int = BLACK_IS_ZERO
    sample_format: int = UNSIGNED
    planar: bool = False
    extra: tuple[int, ...] = ()  # ExtraSamples: 0 unspecified, 1 associated alpha, 2 unassociated alpha
    order: str = "<"
    compression: int = NONE
    tile: int = 0  # side; 0: strips
    rows: int = 5  # per strip
    orientation: int = 1
    big: bool = False  # BigTIFF
    predictor: bool = False
    subfile: int = 0  # NewSubfileType


def write_tiff(pages: list[np.ndarray], kind: Kind, description: str = "", tags: dict | None = None) -> bytes:
    """Return a TIFF file. pages: integers (floats for FLOAT), [H, W, samples] each; tags: further SHORTs by number."""
    at = 16 if kind.big else 8
    body, directories = b"", []
    for page in pages:
        chunks = [_compressed(chunk, kind) for chunk in _chunks(page, kind)]
        offsets = [at + len(body) + sum(map(len, chunks[:i])) for i in range(len(chunks))]
        body += b"".join(chunks)
        entries = _entries(page, kind, offsets, [len(chunk) for chunk in chunks], description, tags or {})
        directories.append(entries)
    out, last = body, at + len(body)
    links = [last]
    for i, entries in enumerate(directories):
        data = _directory(entries, kind, last, is_last=i == len(directories) - 1)
        out += data
        last += len(data)
        links.append(last)
    mark = b"II" if kind.order == "<" else b"MM"
    if kind.big:
        return mark + struct.pack(kind.order + "HHHQ", 43, 8, 0, links[0]) + out
    return mark + struct.pack(kind.order + "HI", 42, links[0]) + out


def _entries(page, kind, offsets, counts, description, tags):
    height, width, samples = page.shape
    where = "Q" if kind.big else "I"
    entries = {
        254: ("I", [kind.subfile]),
        256: ("H", [width]),
        257: ("H", [height]),
        258: ("H", [kind.bits] * samples),
        259: ("H", [kind.compression]),
        262: ("H", [kind.photometric]),
        274: ("H", [kind.orientation]),
        277: ("H", [samples]),
        284: ("H", [2 if kind.planar else 1]),
        339: ("H", [kind.sample_format] * samples),
    }
    if description:
        entries[270] = ("s", description.encode() + b"\0")
    if kind.predictor:
        entries[317] = ("H", [2])
    if kind.extra:
        entries[338] = ("H", list(kind.extra))
    if kind.tile:
        entries |= {322: ("H", [kind.tile]), 323: ("H", [kind.tile]), 324: (where, offsets), 325: (where, counts)}
    else:
        entries |= {273: (where, offsets), 278: ("H", [kind.rows]), 279: (where, counts)}
    entries |= {tag: ("H", values) for tag, values in tags.items()}
    return dict(sorted(entries.items()))


def _directory(entries, kind, at, is_last):
    head, count_code, link = (8, "Q", "Q") if kind.big else (2, "H", "I")
    entry_size, inline = (20, 8) if kind.big else (12, 4)
    extra_at = at + head + entry_size * len(entries) + inline
    rows, extra = b"", b""
    for tag, (code, values) in entries.items():
        data = values if code == "s" else b"".join(struct.pack(kind.order + code, v) for v in values)
        number = len(values)
        rows += struct.pack(kind.order + "HH" + link, tag, {"s": 2, "H": 3, "I": 4, "Q": 16}[code], number)
        if len(data) <= inline:
            rows += data.ljust(inline, b"\0")
        else:
            rows += struct.pack(kind.order + link, extra_at + len(extra))
            extra += data + b"\0" * (len(data) % 2)
    following = 0 if is_last else extra_at + len(extra)
    return struct.pack(kind.order + count_code, len(entries)) + rows + struct.pack(kind.order + link, following) + extra


def _chunks(page, kind):
    """Yield the samples of each strip or tile, [rows, columns, samples]; planar ones plane by plane."""
    planes = [page[..., i : i + 1] for i in range(page.shape[2])] if kind.planar else [page]
    for plane in planes:
        height, width = plane.shape[:2]
        if not kind.tile:
            yield from (plane[y : y + kind.rows] for y in range(0, height, kind.rows))
            continue
        for y in range(0, height, kind.tile):
            for x in range(0, width, kind.tile):
                tile = np.zeros((kind.tile, kind.tile, plane.shape[2]), plane.dtype)
                part = plane[y : y + kind.tile, x : x + kind.tile]
                tile[: part.shape[0], : part.shape[1]] = part
                yield tile


def _compressed(chunk, kind):
    if kind.predictor:
        chunk = np.concatenate([chunk[:, :1], np.diff(chunk, axis=1)], 1) % (1 << kind.bits)
    rows = [_packed(row.reshape(-1), kind) for row in chunk]
    data = b"".join(rows)
    if kind.compression == DEFLATE:
        return zlib.compress(data)
    if kind.compression == PACKBITS:  # literal runs, ended at each row
        parts = [row[i : i + 128] for row in rows for i in range(0, len(row), 128)]
        return b"".join(bytes([len(part) - 1]) + part for part in parts)
    return _lzw(data) if kind.compression == LZW else data


def _packed(row, kind):
    """Return one row of samples as bytes; below 8 bits and at 12 the most significant bit comes first."""
    if kind.bits in (1, 2, 4, 12):
        bits = (row[:, None] >> np.arange(kind.bits - 1, -1, -1)) & 1
        return np.packbits(bits.astype(np.uint8).reshape(-1)).tobytes()
    code = {UNSIGNED: "u", SIGNED: "i", FLOAT: "f"}[kind.sample_format]
    return row.astype(f"{kind.order}{code}{kind.bits // 8}").tobytes()


def _lzw(data):
    """Return LZW data of nine-bit codes alone: the table is cleared before it grows."""
    codes = [256]
    for i in range(0, len(data), 200):
        codes += [*data[i : i + 200], 256]
    codes[-1] = 257
    bits = (np.array(codes)[:, None] >> np.arange(8, -1, -1)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1)).tobytes()
