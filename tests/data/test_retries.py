"""Errors of the machine are retried and then stop the run; only the file itself can make an image bad."""

from __future__ import annotations

import errno
import io
import os
import threading

import pytest
import torch
from PIL import Image

from upstep_fast.data.curation.survey import channel_statistics
from upstep_fast.data.curation.triage import triage
from upstep_fast.data.decode import gpu_jpeg
from upstep_fast.data.labeled.clips import Clip, Clips
from upstep_fast.data.loading.loader import Loader, load_images
from upstep_fast.data.loading.skipped_images import SkippedImages, read_image
from upstep_fast.data.reading import retries
from upstep_fast.data.sources import folders
from upstep_fast.data.sources.source import Source, open_source
from upstep_fast.errors import BadImage, DataError, RunFailedError

COUNT = 12


@pytest.fixture(autouse=True)
def no_waits(monkeypatch):
    monkeypatch.setattr(retries, "WAITS", (0, 0, 0))


@pytest.fixture
def source(tmp_path) -> Source:
    for i in range(COUNT):
        image = Image.new("RGB", (40, 40), (i * 20, 255 - i * 20, 0))
        image.paste((0, i * 9, 200), (0, 0, 20, 5 + i))
        image.save(tmp_path / f"{i:02}.png")
    return open_source(tmp_path)


def failing(monkeypatch, error: Exception, times: int, where: str) -> None:
    """Make reading or decoding of each image fail the first `times` times."""
    failed: dict[str, int] = {}
    lock = threading.Lock()

    def fails(key: str) -> bool:
        with lock:
            failed[key] = failed.get(key, 0) + 1
            return failed[key] <= times

    if where == "read":
        real = folders.Files.read

        def read(self, index):
            if fails(str(index)):
                raise error
            return real(self, index)

        monkeypatch.setattr(folders.Files, "read", read)
        return
    real_load = Image.Image.convert if where == "convert" else Image.open

    def opened(file, *args, **options):
        if isinstance(file, io.BytesIO) and fails(str(hash(file.getvalue()))):
            raise error
        return real_load(file, *args, **options)

    monkeypatch.setattr(Image, "open", opened)


def everything(source: Source) -> list:
    """Return what each reader of the package makes of the images."""
    with Loader(source, batch_size=6, seed=0, num_workers=2) as loader:
        batches = [next(loader) for _ in range(2)]
    skipped = SkippedImages()
    in_order = list(load_images(source, size=8, skipped=skipped, num_workers=2))
    clips = Clips((Clip("clip", tuple(range(COUNT))),), source)
    assert not loader.skipped and not skipped and sum(batch.replaced for batch in batches) == 0
    return [
        torch.stack([image for batch in batches for image in batch.images]),
        torch.cat([x for _, x in in_order]),
        torch.tensor(channel_statistics(source)),
        torch.stack(clips.read(0, range(COUNT), 3)),
        torch.tensor(list(triage(source).to_dict()["counts"].values())),
    ]


PASSING = [
    (OSError(errno.EIO, os.strerror(errno.EIO)), "read"),
    (OSError(errno.ESTALE, os.strerror(errno.ESTALE)), "read"),
    (OSError(errno.EMFILE, os.strerror(errno.EMFILE)), "read"),
    (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), "read"),
    (MemoryError(), "open"),
    (OSError("out of memory when reading image file"), "open"),  # Pillow's
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "open"),
]


@pytest.mark.parametrize(("error", "where"), PASSING)
def test_an_error_that_passes_changes_nothing(source, monkeypatch, error, where):
    want = everything(source)
    failing(monkeypatch, error, 1, where)
    assert all(torch.equal(a, b) for a, b in zip(everything(source), want, strict=True))


@pytest.mark.parametrize(("error", "where"), PASSING)
def test_an_error_that_stays_ends_the_run_and_names_the_cause(source, monkeypatch, error, where):
    failing(monkeypatch, error, 10**9, where)
    is_disk = isinstance(error, OSError) and error.errno in (errno.EIO, errno.ESTALE, errno.EMFILE)
    kind, words = (
        (DataError, "cannot read .*: .*, tried 4 times") if is_disk else (RunFailedError, "out of memory, tried")
    )
    with Loader(source, batch_size=6, seed=0, num_workers=2, max_bad_fraction=1.0) as loader:
        with pytest.raises(kind, match=words) as caught:
            next(loader)
        assert not loader.skipped and "\n" not in str(caught.value)
    for run in (
        lambda: list(load_images(source, size=8, max_bad_fraction=1.0)),
        lambda: triage(source, max_bad_fraction=1.0),
        lambda: channel_statistics(source, max_bad_fraction=1.0),
        lambda: Clips((Clip("clip", (0, 1)),), source).read(0, (0, 1), 3),
    ):
        with pytest.raises(kind, match=words):
            run()


def test_a_bad_file_stays_bad(source, tmp_path, monkeypatch):
    """Not retried: a missing file, one without permission, a folder, and one that is no image."""
    tries = []
    real = folders.Files.read
    monkeypatch.setattr(folders.Files, "read", lambda self, i: (tries.append(i), real(self, i))[1])
    (tmp_path / "03.png").unlink()
    (tmp_path / "04.png").write_bytes(b"text")
    for index, reason in ((3, "No such file"), (4, "not an image")):
        with pytest.raises(BadImage, match=reason):
            read_image(source, index)
    monkeypatch.setattr(
        folders.Files, "read", lambda self, i: (_ for _ in ()).throw(OSError(errno.EACCES, "Permission denied"))
    )
    with pytest.raises(BadImage, match="Permission denied"):
        read_image(source, 5)
    assert tries == [3, 4]


def test_a_gpu_without_memory_does_not_change_the_decoder(source, monkeypatch):
    """The CPU's pixels differ from the GPU's: a run must not depend on how much memory was free."""
    calls = []

    def decode(self, files):
        calls.append(len(files))
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_jpeg, "unsupported_reason", lambda device: None)
    monkeypatch.setattr(gpu_jpeg.GpuReader, "_decode", decode)
    monkeypatch.setattr(gpu_jpeg.GpuReader, "_header", lambda self, data: ((40, 40), 1))
    with (
        Loader(source, batch_size=6, seed=0, decode="cuda", device=torch.device("cpu")) as loader,
        pytest.raises(RunFailedError, match="out of memory, tried 4 times"),
    ):
        next(loader)
    assert calls == [6] * 4


def test_a_short_read_is_continued(source, monkeypatch):
    """One call of read(2) may return less than there is, e.g. on a network file system."""
    want = source.read(0)
    short = lambda fd, mode, **options: _ShortReads(fd, **options)  # noqa: E731
    monkeypatch.setattr(folders, "open", short, raising=False)
    assert source.read(0) == want


class _ShortReads(io.BufferedReader):
    """File whose raw reads return at most 50 bytes."""

    def __init__(self, fd: int, buffering: int = -1) -> None:
        class Raw(io.FileIO):
            def readinto(self, buffer):
                return super().readinto(memoryview(buffer)[:50])

        super().__init__(Raw(fd))
