"""Remote paths of --data: folders of object stores, and archives, lists and images on object stores and web servers.

A folder is listed once, and each of its files fetched when it is read first; archives and lists are fetched as a whole
when they are opened. What was fetched stays in the cache (remote/cache.py).
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from upstep_fast.data.formats.kinds import START, SUFFIXES, suffix_of
from upstep_fast.data.remote import objects
from upstep_fast.data.remote.address import (
    HTTP,
    ZIP,
    file_name_of,
    folder_of,
    is_address,
    joined,
    protocol_of,
    shown,
)
from upstep_fast.data.remote.cache import Version
from upstep_fast.data.sources.archives import Members, children_in
from upstep_fast.data.sources.explain import HINTS
from upstep_fast.data.sources.file_kinds import is_unnamed_dicom, may_be_unnamed_dicom
from upstep_fast.data.sources.folders import is_features
from upstep_fast.data.sources.image_folder import Place, open_place
from upstep_fast.data.sources.lists import LIST_SUFFIXES, read_list
from upstep_fast.data.sources.metadata import METADATA
from upstep_fast.data.sources.names import Names
from upstep_fast.data.sources.part import ALREADY_LISTED, IMAGE_SUFFIXES, Columns, Listing, Part
from upstep_fast.data.sources.remote_files import RemoteFiles
from upstep_fast.data.sources.remote_open import at_opening, fetch_all, labeled
from upstep_fast.data.sources.splits import TREE
from upstep_fast.data.sources.tar_shards import open_tars
from upstep_fast.data.sources.zip_files import open_zips
from upstep_fast.errors import DataError

THREADS = 16  # that look at files without a suffix
_TAR_MAGIC = slice(257, 262)  # b"ustar"


def open_remote(match: str | list[str], split: str | None, columns: Columns, listing: Listing) -> list[Part]:
    """Return the parts of an address, or of several tar or zip files that are one tree. Raises DataError."""
    addresses = [match] if isinstance(match, str) else match
    if protocol_of(addresses[0]) == ZIP:
        return [part for address in addresses for part in _open_zip_folder(address, split, listing)]
    versions: list[Version | None] = [None] * len(addresses)
    for i, address in enumerate(addresses):
        if protocol_of(address) in HTTP:
            _check_web_address(address)
            continue
        versions[i] = at_opening(address, functools.partial(objects.facts, address))
        if versions[i] is None and len(addresses) == 1:
            return _open_folder(address, split, columns, listing)
    suffix = suffix_of(file_name_of(addresses[0]))
    if suffix in SUFFIXES:
        return _open_image(addresses[0], versions[0], split, listing)
    if suffix in HINTS:
        raise DataError(
            f"data: {shown(addresses[0])} is no image, .tar or .zip file or list; {HINTS[suffix].format(path='it')}"
        )
    paths = fetch_all(addresses, versions)
    with labeled(listing, dict(zip(paths, addresses, strict=True))):
        if suffix in LIST_SUFFIXES:
            return read_list(Path(paths[0]), split, columns, listing, folder_of(addresses[0]))
        if suffix not in (".tar", ".zip") and not _is_tar(paths[0]):
            return _open_image(addresses[0], versions[0], split, listing)
        parts = open_zips(paths, split, listing) if suffix == ".zip" else open_tars(paths, split, columns, listing)
    return _with_addresses(parts, dict(zip(paths, addresses, strict=True)))


def _check_web_address(address: str) -> None:
    if not file_name_of(address) or address.split("?", 1)[0].endswith("/"):
        cure = "give a .tar or .zip file, or a text list of addresses"
        raise DataError(f"data: {shown(address)} is a folder, and web servers do not list them; {cure}")


def _with_addresses(parts: list[Part], addresses: dict[str, str]) -> list[Part]:
    """Return parts of archives in the cache, named by the archives' addresses."""
    named = (part for part in parts if isinstance(part, Members))
    return [replace(part, address=shown(addresses[part.path])) for part in named]  # type: ignore[type-var]


def _is_tar(path: str) -> bool:
    with open(path, "rb") as file:
        return file.read(512)[_TAR_MAGIC] == b"ustar"


def _open_image(address: str, version: Version | None, split: str | None, listing: Listing) -> list[Part]:
    if split == "test":
        listing.without_test.append(f"it must hold {TREE}; {shown(address)} is one image")
        return []
    if address in listing.seen:
        listing.problems.append((shown(address), ALREADY_LISTED))
        return []
    listing.seen.add(address)
    return [_part("", {address: version} if version else {}, Names.pack([os.fsencode(address)], None), None, "")]


def _open_zip_folder(address: str, split: str | None, listing: Listing) -> list[Part]:
    """Return the part of zip://FOLDER::ADDRESS. Raises DataError."""
    folder, _, outer = address.partition("://")[2].partition("::")
    if not outer:
        raise DataError(f"data: {shown(address)}: write zip://FOLDER::FILE.zip, where FOLDER may be empty")
    (path,) = fetch_all([outer], [None]) if is_address(outer) else [outer]
    with labeled(listing, {path: outer}):
        parts = open_zips([path], split, listing, folder)
    return _with_addresses(parts, {path: f"{outer}/{folder.strip('/')}".rstrip("/")})


def _open_folder(address: str, split: str | None, columns: Columns, listing: Listing) -> list[Part]:
    """Return the part of a folder of an object store, by the rules of local folders. Raises DataError."""
    root = address.rstrip("/")
    found = at_opening(address, lambda: dict(objects.listed(root)))
    by_bytes = {os.fsencode(name).replace(b"/", b"\0"): name for name in found}
    ordered = [by_bytes[key] for key in sorted(by_bytes) if not _is_hidden(by_bytes[key])]

    def files(top: str) -> Iterable[bytes]:
        inside = [name for name in ordered if not top or name.startswith(f"{top}/")]
        return (os.fsencode(name) for name in _images(root, inside, found, listing))

    with tempfile.TemporaryDirectory(prefix="upstep-") as tables:
        for name in ordered:
            if os.path.basename(name) in METADATA:
                file = Path(tables, name)
                file.parent.mkdir(parents=True, exist_ok=True)
                (path,) = fetch_all([joined(root, name)], [found[name]])
                file.symlink_to(path)
        part = functools.partial(_part, root, found)
        place = Place(shown(root), tables, functools.cache(children_in([sorted(by_bytes)])), files, part)
        with labeled(listing, {tables: root}):
            return open_place(place, split, columns, listing)


def _part(
    root: str, found: dict[str, Version], names: Names, classes: tuple[str, ...] | None, reason: str
) -> RemoteFiles:
    if not found:
        return RemoteFiles(root, names, classes, reason)
    versions = [found[os.fsdecode(names[i])] for i in range(len(names))]
    tags = Names.pack((os.fsencode(f"{version.tag}\0{version.modified}") for version in versions), None)
    return RemoteFiles(root, names, classes, reason, np.array([v.size for v in versions], np.int64), tags)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part in ("", "..", "__MACOSX") for part in name.split("/"))


def _images(root: str, names: list[str], found: dict[str, Version], listing: Listing) -> Iterator[str]:
    """Yield the names that are images; the others go to `listing`, as in a local folder (folders.py)."""
    stores = {name[: name.index(".zarr/") + 5] for name in names if ".zarr/" in name}
    listing.problems += [(shown(joined(root, store)), "OME-Zarr is read from a local disk only") for store in stores]
    names = [name for name in names if ".zarr/" not in name]

    def start(name: str) -> bytes:
        address = joined(root, name)
        return at_opening(address, lambda: objects.read(address, found[name], None, 0, START))

    last = {name: os.fsencode(os.path.basename(name)) for name in names}
    images = {name for name in names if last[name].lower().endswith(IMAGE_SUFFIXES)}
    unsure = [name for name in names if name not in images and may_be_unnamed_dicom(last[name])]
    with ThreadPoolExecutor(THREADS) as pool:
        found_dicom = pool.map(lambda name: is_unnamed_dicom(last[name], lambda: start(name)), unsure)
        images |= {name for name, yes in zip(unsure, found_dicom, strict=True) if yes}
    for name in names:
        address = joined(root, name)
        if name not in images:
            listing.add_other(os.fsencode(shown(address)))
        elif listing.several and address in listing.seen:
            listing.problems.append((shown(address), ALREADY_LISTED))
        elif name.endswith(".npy") and f"{name[:-4]}.txt" in found and _holds_features(address, found[name]):
            listing.problems.append((shown(address), "features that embed has written, no image"))
        else:
            if listing.several:
                listing.seen.add(address)
            yield name


def _holds_features(address: str, version: Version) -> bool:
    (path,) = fetch_all([address], [version])
    return is_features(os.fsencode(path))
