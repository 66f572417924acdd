"""Folders and tars of small files, and what a source made of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path


def write_tree(root: Path, tree: dict[str, bytes]) -> Path:
    for name, data in tree.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_tar(path: Path, tree: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in tree.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def contents(source) -> list[bytes]:
    return [bytes(source.read(i)) for i in range(len(source))]


def reasons(source) -> dict[str, str]:
    return {name.rsplit("/", 1)[-1]: reason for name, reason in source.problems}
