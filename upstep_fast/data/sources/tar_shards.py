"""Images in tar files, webdataset shards among them: read by offset, never extracted.

webdataset's rule: the members of a sample share a key, their name up to its first dot. Here an image's label is the
member NAME.cls beside NAME.jpg, else KEY.cls; a member that has a file of its own beside it (22.05.jpg and 22.05.cls)
is a sample of its own, so that names with dots keep their labels. Of several images of one key KEY.jpg is read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from upstep_fast.data.formats.kinds import START
from upstep_fast.data.sources.archives import Members, choose_split, label_of, last_of_each_name, opened
from upstep_fast.data.sources.file_kinds import is_unnamed_dicom
from upstep_fast.data.sources.names import Names
from upstep_fast.data.sources.part import IMAGE_SUFFIXES, Columns, Listing, Part, printable, read_image_file
from upstep_fast.data.sources.tar_index import TarIndex, read_index
from upstep_fast.data.sources.tree import Tree
from upstep_fast.errors import DataError

MAX_LABEL_BYTES = 256
_NOT_THE_IMAGE = "another image is called KEY.jpg and is read; name the suffix of the images with --image-column"


@dataclass(frozen=True, eq=False)
class TarMembers(Members):
    """Images in a tar file, read by offset; the members' names are labels only."""

    path: str
    names: Names
    offsets: np.ndarray  # [N] int64, bytes
    sizes: np.ndarray  # [N] int64, bytes
    classes: tuple[str, ...] | None = None  # from .cls members, as webdataset writes them
    reason: str = ""  # why only some have classes
    address: str = ""

    def read(self, index: int) -> bytes:
        """Return the encoded image. Raises OSError."""
        return read_image_file(self.path, int(self.offsets[index]), int(self.sizes[index]))

    def start(self, index: int) -> bytes:
        """Return the member's first bytes. Raises OSError."""
        return read_image_file(self.path, int(self.offsets[index]), min(START, int(self.sizes[index])))

    def labels(self) -> list[str] | None:
        """Return the class of each image; None without classes."""
        return self.names.labels() if self.classes is None else list(self.classes)

    def unlabeled(self) -> str:
        """Return why `labels` is None."""
        return self.reason or f"{self.names.unlabeled()}, and no KEY.cls members"


def open_tars(paths: list[str], split: str | None, columns: Columns, listing: Listing) -> list[Part]:
    """Return one part per tar file; splits are looked for over all of them together. Raises DataError."""
    indexes = opened(paths, read_index, listing)
    if (tree := choose_split({path: index.names for path, index in indexes.items()}, split, listing)) is None:
        return []
    return [_part(path, index, tree, columns, listing) for path, index in indexes.items()]


def _part(path: str, index: TarIndex, tree: Tree, columns: Columns, listing: Listing) -> TarMembers:
    label = printable(os.fsencode(path))
    listing.problems += [(f"{label}/{name}", reason) for name, reason in index.problems]
    members = last_of_each_name(path, index.names, tree, listing)
    suffix = f".{columns.label or 'cls'}".lower().encode("utf-8", "surrogateescape")
    images = [i for i in members if _is_image(path, index, i)]
    others = sorted(set(members) - set(images), key=index.names.__getitem__)
    for i in others:
        if not index.names[i].lower().endswith(suffix):
            listing.add_other(index.names[i].replace(b"\0", b"/"))
    beside = {_stem(index.names[i]) for i in others}
    chosen = _one_a_sample(path, index, images, beside, columns.image, listing)
    classes, reason = _webdataset_classes(path, index, chosen, others, suffix)
    relative = (index.names[i].replace(b"\0", b"/") for i in chosen)
    packed = Names.pack(relative, tree.component, tree.under_split)
    offsets, sizes = (np.array(a, dtype=np.int64)[chosen] for a in (index.offsets, index.sizes))
    return TarMembers(path, packed, offsets, sizes, classes, reason)


def _is_image(path: str, index: TarIndex, i: int) -> bool:
    if index.names[i].lower().endswith(IMAGE_SUFFIXES):
        return True
    name, size = index.names[i].rpartition(b"\0")[2], min(START, index.sizes[i])
    return is_unnamed_dicom(name, lambda: read_image_file(path, index.offsets[i], size))


def _one_a_sample(
    path: str, index: TarIndex, images: list[int], beside: set[bytes], given: str | None, listing: Listing
) -> list[int]:
    """Return one image of each sample: those with the given suffix, else KEY.jpg where several share a key.

    beside: names, without suffix, of members that are no images. Images that share a key with no other file are photos
    with dots in their names, and all are read. Raises DataError where the choice would be a guess.
    """
    names = index.names
    if given is not None:
        suffix = b"." + os.fsencode(given).lower().lstrip(b".")
        return [i for i in images if names[i].lower() == _key(names[i]).lower() + suffix]
    chosen, left, shared = [], [], []
    for key, group in groupby(images, key=lambda i: _key(names[i])):
        of_key = list(group)
        together, plain = _sharing(key, of_key, names, beside)
        if len(together) > 1 and len(plain) == 1:
            parts = set(together) - set(plain)
            left += sorted(parts)
            of_key = [i for i in of_key if i not in parts]
        elif len(together) > 1 and key in beside:
            raise DataError(_ambiguous(path, names, together))
        elif len(together) > 1:
            shared += together
        chosen += of_key
    _say(path, names, left, shared, listing)
    return chosen


def _sharing(key: bytes, images: list[int], names: list[bytes], beside: set[bytes]) -> tuple[list[int], list[int]]:
    """Return the images of a key that have no other file of their full name beside them, and those called KEY.jpg."""
    stems = {i: _stem(names[i]) for i in images}
    together = [i for i in images if stems[i] == key or stems[i] not in beside]
    return together, [i for i in together if stems[i] == key]


def _say(path: str, names: list[bytes], left: list[int], shared: list[int], listing: Listing) -> None:
    """Add to `listing` the images that were left out of their sample, and those that may be masks."""
    listing.problems += [(label_of(path, names[i]), _NOT_THE_IMAGE) for i in left]
    if shared:
        example = ", ".join(label_of("", names[i]) for i in shared[:2])
        listing.notes.append(
            f"{printable(os.fsencode(path))}: {len(shared)} images share their key with another ({example}) and all "
            "are read; if some are masks, name the suffix of the images with --image-column"
        )


def _ambiguous(path: str, names: list[bytes], images: list[int]) -> str:
    first = names[images[0]]
    suffixes = [printable(names[i][len(_key(names[i])) + 1 :]) for i in images]
    return (
        f"data: {printable(os.fsencode(path))}: {len(images)} images have the key {label_of('', _key(first))} (a name "
        f"up to its first dot): {', '.join(suffixes[:5])}; name the suffix to read with --image-column {suffixes[0]}"
    )


def _webdataset_classes(
    path: str, index: TarIndex, images: list[int], others: list[int], suffix: bytes
) -> tuple[tuple[str, ...] | None, str]:
    """Return the labels of the images if all have one; else None, and why if some have."""
    labels, names = _labels_by_name(path, index, others, suffix), index.names
    if not labels:
        return None, ""
    found = [labels.get(_stem(names[i]), labels.get(_key(names[i]))) for i in images]
    if missing := [i for i, label in zip(images, found, strict=True) if label is None]:
        first = label_of(path, names[missing[0]])
        return None, f"has {len(missing)} of {len(images)} images without a label KEY{suffix.decode()}, e.g. {first}"
    texts = {i: _readlabel_of(path, index, i) for i in found if i is not None}
    if empty := [i for i, text in texts.items() if not text]:
        return None, f"has empty labels, e.g. {label_of(path, names[empty[0]])}"
    return tuple(texts[i] for i in found if i is not None), ""


def _labels_by_name(path: str, index: TarIndex, others: list[int], suffix: bytes) -> dict[bytes, int]:
    """Return {name without suffix: member} of the labels. Raises DataError if two differ in case only."""
    labels: dict[bytes, int] = {}
    for i in others:
        if index.names[i].lower().endswith(suffix) and index.sizes[i] <= MAX_LABEL_BYTES:
            first = labels.setdefault(index.names[i][: -len(suffix)], i)
            if first != i:
                both = f"{label_of('', index.names[first])} and {label_of('', index.names[i])}"
                raise DataError(f"data: {printable(os.fsencode(path))}: {both} are two labels of one key; keep one")
    return labels


def _readlabel_of(path: str, index: TarIndex, i: int) -> str:
    try:
        text = read_image_file(path, index.offsets[i], index.sizes[i])
    except OSError as error:
        raise DataError(f"data: cannot read {label_of(path, index.names[i])}: {error}") from error
    return printable(text.removeprefix(b"\xef\xbb\xbf").strip())


def _key(name: bytes) -> bytes:
    folder, nul, base = name.rpartition(b"\0")
    return folder + nul + base.split(b".", 1)[0]


def _stem(name: bytes) -> bytes:
    folder, nul, base = name.rpartition(b"\0")
    return folder + nul + (base.rpartition(b".")[0] or base)
