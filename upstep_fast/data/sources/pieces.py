"""Files that hold several pictures, slices, frames or tiles: a part with one image for each of them.

Headers are read once, when a source is opened. A file that cannot be read is left out with its reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np

from upstep_fast.config.reading import Reading
from upstep_fast.data.decode.piece import stored_piece
from upstep_fast.data.formats import kinds
from upstep_fast.data.formats.kinds import Kind
from upstep_fast.data.formats.slides import OF_FILES, companions
from upstep_fast.data.reading import axes, tiles
from upstep_fast.data.reading.out_of_memory import is_out_of_memory
from upstep_fast.data.reading.regular import LARGE, read_at
from upstep_fast.data.reading.retries import with_retries
from upstep_fast.data.reading.stored import WHOLE, File, Layout, Piece
from upstep_fast.data.reading.tiles import Grid
from upstep_fast.data.reading.transient import may_pass
from upstep_fast.data.sources.file_kinds import digest_of_folder, file_of, in_place, kinds_in
from upstep_fast.data.sources.part import Digest, Item, Listing, Part, shown_suffix
from upstep_fast.data.sources.series import gaps
from upstep_fast.errors import BadImage, DataError, RunFailedError, first_line
from upstep_fast.runtime.progress import track

THREADS = 8  # that read headers
_PHOTOGRAPH: tuple[Layout | None, Sequence[Piece]] = (None, (WHOLE,))
LAYOUTS = 3  # that are described, the most frequent ones


@dataclass(frozen=True, eq=False)
class Pieces(Part):
    """Part whose images are pictures of another part's files."""

    inner: Part
    files: np.ndarray  # [F] int64, indices into `inner`
    kinds: tuple[Kind | None, ...]  # of each file; None: a photograph
    layouts: tuple[Layout | None, ...]  # of each file that has a kind
    pieces: tuple[Sequence[Piece], ...]  # of each file; equal layouts share one sequence
    ends: np.ndarray  # [F] int64: number of images up to and with each file
    digests: dict[int, Digest] = field(default_factory=dict)  # of files, once they are known

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def name(self, index: int) -> str:
        """Return the file's label, with the place of the picture in it: scan.nii.gz#z=12."""
        file, piece = self._locate(index)
        place = axes.label(piece)
        return self.inner.name(int(self.files[file])) + (f"#{place}" if place else "")

    def read(self, index: int) -> bytes:
        """Return the encoded file that holds the picture. Raises OSError."""
        return self.inner.read(int(self.files[self._locate(index)[0]]))

    def item(self, index: int) -> Item:
        """Return the file, and which picture of it. Raises OSError."""
        file, piece = self._locate(index)
        at, kind = int(self.files[file]), self.kinds[file]
        by_path = kind in kinds.BY_PATH or (kind is not None and len(self.pieces[file]) > 1)
        path = self.inner.file_path(at) if by_path else None
        return Item(self.inner.read(at) if path is None else in_place(path), kind, piece, self.layouts[file])

    def digest(self, index: int) -> Digest:
        """Return the file's size, and BLAKE2b of the file and the place in it. Raises OSError."""
        file, piece = self._locate(index)
        at, place = int(self.files[file]), axes.label(piece)
        if (of_file := self.digests.get(at)) is None:
            of_file = self.digests[at] = self._digest(at)
        if not place:
            return of_file
        return of_file[0], hashlib.blake2b(of_file[1] + place.encode(), digest_size=8).digest()

    def _digest(self, at: int) -> Digest:
        """Return size and hash of a file; of a large one that is read by offset, the hash of its start and end."""
        path = self.inner.file_path(at)
        if path is not None and os.path.isdir(path):
            return digest_of_folder(path)
        if path is None or (size := os.path.getsize(path)) <= LARGE:
            return self.inner.digest(at)
        ends = b"".join(bytes(read_at(path, start, LARGE >> 6)) for start in (0, size - (LARGE >> 6)))
        return size, hashlib.blake2b(ends, digest_size=8).digest()

    def suffixes(self) -> Counter[str]:
        """Return the number of files of each suffix."""
        return Counter(shown_suffix(self.inner.file_name(at)) for at in self.files.tolist())

    def labels(self) -> list[str] | None:
        """Return the class of each image, its file's; None when not all files have one."""
        labels = self.inner.labels()
        return None if labels is None else [labels[at] for at in self.files[self._file_of_each()]]

    def unlabeled(self) -> str:
        """Return why `labels` is None."""
        return self.inner.unlabeled()

    def groups(self) -> np.ndarray:
        """Return the number of each image's file, or of the first file of its series, [N] int64."""
        first: dict[str, int] = {}
        of_series = [layout.series if layout else "" for layout in self.layouts]
        of_files = [first.setdefault(series, file) if series else file for file, series in enumerate(of_series)]
        return np.array(of_files, np.int64)[self._file_of_each()]

    def _file_of_each(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.files)), np.diff(self.ends, prepend=0))

    def sizes_in_bytes(self) -> np.ndarray:
        """Return the sizes of the images' files, [N] int64."""
        return self.inner.sizes_in_bytes()[self.files][self._file_of_each()]

    def identity(self) -> Iterator[bytes]:
        """Yield the files' identity, and which pictures of them are read."""
        yield from self.inner.identity()
        yield self.files.tobytes()
        known: dict[int, bytes] = {}
        for pieces in self.pieces:
            if id(pieces) not in known:
                known[id(pieces)] = pieces.digest() if isinstance(pieces, Grid) else _digest_of(pieces)
            yield known[id(pieces)]

    def _locate(self, index: int) -> tuple[int, Piece]:
        file = int(np.searchsorted(self.ends, index, side="right"))
        return file, self.pieces[file][index - int(self.ends[file]) + len(self.pieces[file])]


def _digest_of(pieces: Sequence[Piece]) -> bytes:
    return hashlib.sha256("\n".join(map(repr, pieces)).encode()).digest()


def expand(part: Part, reading: Reading, listing: Listing) -> Part:
    """Return a part with one image for each picture of the files of `part`; itself where each file is one photograph.

    Files whose header cannot be read, or whose reader is not installed, go to `listing`.
    """
    kinds_of = kinds_in(part, reading)
    if not any(kinds_of):
        return part
    owned = _owned(part, listing)
    special = [index for index, kind in enumerate(kinds_of) if kind and index not in owned and not kinds.missing(kind)]
    absent = (index for index, kind in enumerate(kinds_of) if kind is not None and kinds.missing(kind))
    for index in absent:
        listing.add_other(os.fsencode(part.file_name(index)))

    def pieces_of(index: int) -> tuple[Layout, Sequence[Piece]] | str:
        return _pieces(part, index, kinds_of[index], reading)

    found: dict[int, tuple[Layout, Sequence[Piece]]] = {}
    seen: Counter[str] = Counter()
    with ThreadPoolExecutor(THREADS) as pool, track("reading headers", len(special), "files") as task:
        for index, result in zip(special, pool.map(pieces_of, special), strict=True):
            task.advance()
            if isinstance(result, str):
                listing.problems.append((part.name(index), result))
                continue
            seen[_described(result[0], reading, len(result[1]))] += 1
            found[index] = result
    _note(seen, listing)
    listing.add_note(gaps([layout for layout, _ in found.values()]))
    kept = [i for i, kind in enumerate(kinds_of) if i in found or (kind is None and i not in owned)]
    layouts, pieces = zip(*(found.get(i, _PHOTOGRAPH) for i in kept), strict=True) if kept else ((), ())
    ends = np.cumsum([len(of_file) for of_file in pieces], dtype=np.int64)
    return Pieces(part, np.array(kept, np.int64), tuple(kinds_of[i] for i in kept), layouts, pieces, ends)


def only_picture(part: Part, reading: Reading) -> Part:
    """Return a part of one file with its only picture, by the reader that `expand` gives it.

    Raises BadImage, also for a file of several pictures.
    """
    (kind,) = kinds_in(part, reading)
    if kind is None:
        return part
    found = _pieces(part, 0, kind, reading)
    if isinstance(found, str):
        raise BadImage(found)
    layout, pieces = found
    if len(pieces) != 1:
        raise BadImage(f"{axes.described(layout, reading)} holds {len(pieces):,} images, one was asked for")
    return Pieces(part, np.zeros(1, np.int64), (kind,), (layout,), (pieces,), np.ones(1, np.int64))


def _owned(part: Part, listing: Listing) -> set[int]:
    """Return the images that are files of a slide beside them (.vms), and say how many they are."""
    paths = (part.file_path(index) for index in range(len(part)) if part.file_name(index).lower().endswith(OF_FILES))
    files: set[str] = set()
    for path in paths:
        with contextlib.suppress(BadImage, OSError):  # whoever opens the slide says why
            files |= {os.path.join(os.path.dirname(path), name) for name in companions(path)} if path else set()
    owned = {index for index in range(len(part)) if part.file_path(index) in files} if files else set()
    if owned:
        listing.add_note(f"{len(owned):,} files of slides beside them are no images of their own")
    return owned


def _pieces(part: Part, index: int, kind: Kind | None, reading: Reading) -> tuple[Layout, Sequence[Piece]] | str:
    """Return a file's layout and its pictures, or why it cannot be used."""
    assert kind is not None
    try:
        file = with_retries(lambda: file_of(part, index), lambda: part.name(index))
        layout = kinds.layout(kind, file)
        pictures: Sequence[Piece] = axes.pieces(layout, reading)  # equal layouts share one sequence
        if reading.is_windowed:
            pictures = _windows(kind, file, layout, reading, pictures)
        if pictures and pictures[0].scale == 1:
            layout.window(replace(pictures[0], at=()))  # refuses pictures that are too large to be read as a whole
        return layout, pictures
    except BadImage as error:
        return error.reason
    except OSError as error:
        if may_pass(error):  # the file would be missing from this run alone
            raise DataError(
                f"data: cannot read {part.name(index)}: {error.strerror}; mend the disk or network"
            ) from error
        return f"cannot be read: {error.strerror or error}"
    except Exception as error:  # libraries raise many kinds for damaged files
        if is_out_of_memory(error):
            raise RunFailedError(f"data: no memory for the header of {part.name(index)}; free memory") from error
        return f"cannot be opened: {type(error).__name__}: {first_line(error)[:120]}"


def _windows(kind: Kind, file: File, layout: Layout, reading: Reading, pictures: Sequence[Piece]) -> Sequence[Piece]:
    """Return the tiles of each picture that are not blank, or the pictures at another level. Raises as the reader."""
    if reading.tile is None:
        return [tiles.at_level(layout, reading, picture) for picture in pictures]
    has_data = getattr(kinds.module(kind), "has_data", None)
    grids = [
        tiles.without_blank(
            tiles.grid(layout, reading, picture),
            layout,
            lambda piece: stored_piece(kind, file, piece, layout),
            None if has_data is None else lambda piece: has_data(file, tiles.outer(piece, layout)),
        )
        for picture in pictures
    ]
    if not any(map(len, grids)):
        raise BadImage("all its tiles are blank: no band varies by more than 1 of 255 levels")
    return grids[0] if len(grids) == 1 else [piece for grid in grids for piece in grid]


def _described(layout: Layout, reading: Reading, count: int) -> str:
    bands = layout.size("C") if reading.axes is None else axes.renamed(layout, reading.axes).size("C")
    images = f"{count:,} image{'s' * (count != 1)}"
    return f"{axes.described(layout, reading)}: {images} of {bands} channel{'s' * (bands != 1)}"


def _note(seen: Counter[str], listing: Listing) -> None:
    """Say once for each layout what was made of its files, the most frequent ones first."""
    for text, count in seen.most_common(LAYOUTS):
        listing.add_note(text if count == 1 else f"{count:,} files of {text} each")
    if (rest := len(seen) - LAYOUTS) > 0:
        listing.add_note(f"{rest:,} other layout{'s' * (rest != 1)}")
