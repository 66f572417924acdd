"""JPEGs on the GPU: which files it gets and where refused ones go, with a fake decoder; the real one on a GPU."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from upstep_fast.cli.parse import parse
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.data.decode import gpu_jpeg, jpeg
from upstep_fast.data.decode.gpu_jpeg import GpuReader
from upstep_fast.data.decode.image import decode
from upstep_fast.data.loading.loader import Loader
from upstep_fast.data.sources.source import open_source
from upstep_fast.data.views import make_views
from upstep_fast.data.views.make_views import random_views
from upstep_fast.data.views.view_config import ViewConfig
from upstep_fast.errors import ConfigError

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(jpeg.reader() is None, reason="torchvision has no JPEG reader here")


def encoded(i: int = 0, kind: str = "JPEG", mode: str = "RGB", size=(60, 40), **options) -> bytes:
    y, x = np.mgrid[: size[1], : size[0]]
    image = Image.fromarray(np.stack([x * 2 + i, y * 3, x + y + 5 * i], -1).astype(np.uint8)).convert(mode)
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


class StandIn:
    """Fake of torchvision's op: libjpeg's pixels, one level brighter; one refused file fails its batch."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.refuses: bytes | None = None

    def __call__(self, files):
        self.calls.append(len(files))
        if self.refuses in files:
            raise RuntimeError("nvjpegDecodeBatched failed")
        return [jpeg.reader()(torch.frombuffer(bytearray(data), dtype=torch.uint8)) + 1 for data in files]


@pytest.fixture
def fake_decoder(monkeypatch):
    made = StandIn()
    monkeypatch.setattr(gpu_jpeg, "unsupported_reason", lambda device: None)
    monkeypatch.setattr(GpuReader, "_decode", lambda self, files: made(files))
    return made


def test_without_a_gpu_the_error_names_the_cure(tmp_path):
    (tmp_path / "a.jpg").write_bytes(encoded())
    with pytest.raises(ConfigError, match="decode: cuda cannot be used: the device is cpu; use --decode cpu"):
        Loader(open_source(tmp_path), batch_size=1, seed=0, decode="cuda", device=CPU)
    with pytest.raises(ConfigError, match="cuda gives RGB, the model takes 4"):
        Loader(open_source(tmp_path), batch_size=1, seed=0, decode="cuda", device=CPU, channels=4)


def test_files_sent_to_the_gpu(fake_decoder):
    """Only RGB JPEGs of full size, within the limit of pixels, with an end marker."""
    exif = Image.Exif()
    exif[0x0112] = 6
    good = [encoded(), encoded(1, progressive=True), encoded(2, exif=exif)]
    others = [
        b"", b"text", encoded(kind="PNG"), encoded(mode="L"), encoded(mode="CMYK"), encoded()[:-2],
        encoded(size=(600, 400)), encoded(size=(2000, 1000)),
    ]  # fmt: skip
    reader = GpuReader(CPU, min_side=100, max_pixels=1_000_000)
    found = reader.read([*good, *others])
    assert [x is not None for x in found] == [True] * 3 + [False] * len(others)
    assert fake_decoder.calls == [3] and reader.refused == 0
    for image, data in zip(found, good, strict=False):
        assert torch.equal(image, decode(data) + 1)
    assert found[2].shape == (3, 60, 40), "EXIF's turn is undone"


def test_files_refused_by_the_gpu_are_decoded_by_the_cpu_and_counted(fake_decoder, tmp_path, caplog):
    files = [encoded(i) for i in range(8)]
    for i, data in enumerate(files):
        (tmp_path / f"{i}.jpg").write_bytes(data)
    (tmp_path / "8.png").write_bytes(encoded(8, "PNG"))
    (tmp_path / "9.jpg").write_bytes(files[0][:300])
    fake_decoder.refuses = files[5]
    options = {"batch_size": 5, "seed": 0, "decode": "cuda", "device": CPU, "max_bad_fraction": 0.5}
    seen = {}
    for workers in (0, 3):
        with caplog.at_level("INFO"), Loader(open_source(tmp_path), num_workers=workers, **options) as loader:
            for _ in range(4):  # two epochs: the second one from the cache
                batch = next(loader)
                for index, image in zip(batch.indices.tolist(), batch.images, strict=True):
                    assert torch.equal(seen.setdefault(index, image), image), "the decoder depends on the file alone"
        # threads that want one file at once decode it each: in its batch, as what stands in for the broken file, and
        # ahead in the second epoch
        (refused,) = re.findall(r"the GPU refused (\d+) JPEGs, the CPU decoded them", caplog.text)
        assert 1 <= int(refused) <= max(1, workers)
        assert list(loader.skipped) == [loader.source.name(9)]
        caplog.clear()
    for index, image in seen.items():
        brighter = 0 if index in (5, 8) else 1
        assert torch.equal(image, decode((tmp_path / open_source(tmp_path).name(index)).read_bytes()) + brighter)


def test_cuda_decoding_is_off_by_default():
    flags = ["--model", "m", "--data", "d", "--out", "o"]
    assert parse(AdaptConfig, flags, "adapt").data.decode == "cpu"
    assert parse(AdaptConfig, [*flags, "--decode", "cuda"], "adapt").data.decode == "cuda"


@pytest.mark.gpu
def test_the_decoder_on_a_gpu():
    """Pixels are within a few levels of libjpeg's, which interpolates chroma differently; batching changes nothing."""
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [encoded(i, quality=95, subsampling=s, size=(500 - i, 375)) for i, s in enumerate((0, 1, 2))]
    files.append(encoded(3, quality=95, exif=exif))
    reader = GpuReader(torch.device("cuda"))
    found = reader.read(files)
    for data, image in zip(files, found, strict=True):
        want = decode(data)
        assert image.is_cuda and image.shape == want.shape
        assert (image.cpu().int() - want.int()).abs().float().mean() < 3
        assert torch.equal(reader.read([data])[0], image)
    config = ViewConfig(size=64)
    key = {"seed": 0, "epoch": 0, "indices": range(5), "device": "cuda"}
    mixed = [*found, decode(encoded(4, "PNG"))]
    assert torch.equal(random_views(mixed, config, **key), random_views([x.cpu() for x in mixed], config, **key))
    assert make_views.pack(mixed, torch.device("cuda"))[0].is_cuda


@pytest.mark.gpu
@pytest.mark.parametrize("percent", [1, 50, 80, 99])
def test_truncated_files_on_a_gpu(percent, record_property):
    """Recorded for docs/data.md; nothing is promised."""
    data = encoded(quality=95, size=(500, 375))
    cut = data[: len(data) * percent // 100] + b"\xff\xd9"
    found = GpuReader(torch.device("cuda")).read([cut])[0]
    assert found is None or found.shape == (3, 375, 500), "no part of an image"
    record_property("taken_for_whole", found is not None)
