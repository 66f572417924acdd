"""From JPEG files to two 224-pixel views: this package against torchvision, DINO's PIL pipeline and webdataset.

    pytest bench/data/bench_data.py --benchmark-only --benchmark-json=FILE

A time is that of IMAGES images, read, decoded, two views each, collated. extra_info has `images_per_s` and
`cpu_ms_per_image`, the processor time of all threads and processes, which means something on a busy machine too. Every
contender does the same operations with the same settings and has the same number of workers, which are warm when the
clock starts. Recipes: `plain` is the package's default (crop, flip, brightness, contrast, saturation, gray); `dino`
adds hue, blur and solarise. The files are 500-pixel JPEGs of quality 90, made here.

    ours          data.Loader (threads) and data.random_views
    torchvision   torchvision.io.decode_jpeg, transforms.v2 on uint8 tensors, DataLoader (processes)
    pil           Pillow and torchvision transforms on Pillow images, each view by itself, DataLoader: as in DINO's code
    webdataset    a tar read by webdataset, Pillow, transforms.v2, its loader (processes)
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import io as tv_io
from torchvision.transforms import v2

from upstep_fast.data.loading.loader import Loader
from upstep_fast.data.sources.source import open_source
from upstep_fast.data.sources.subset import subset
from upstep_fast.data.views.make_views import random_views
from upstep_fast.data.views.view_config import ViewConfig
from upstep_fast.runtime.machine import processor_name

BATCH, SIZE, FILES = 16, 224, 64
IMAGES = 4096 if torch.cuda.is_available() else 192  # a round
WORKERS = min(16, os.cpu_count() or 1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPES = {
    "plain": ViewConfig(size=SIZE),
    "dino": ViewConfig(size=SIZE, hue=0.1, blur=0.5, solarize=0.1),
}


def photograph(rng: np.random.Generator) -> Image.Image:
    """500 x 375 pixels with the spectrum of natural images, about 1 / f."""
    height, width = 375, 500
    f = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    f[0, 0] = 1
    noise = rng.normal(size=(3, *f.shape)) + 1j * rng.normal(size=(3, *f.shape))
    x = np.fft.irfft2((0.3 * noise + 0.7 * noise[:1]) / f, s=(height, width))
    x = 128 + 55 * (x - x.mean()) / x.std()
    return Image.fromarray(np.clip(x, 0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


@pytest.fixture(scope="session")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    with tarfile.open(root / "shard.tar", "w") as tar:
        for i in range(FILES):
            photograph(rng).save(root / f"{i:05d}.jpg", quality=90)
            tar.add(root / f"{i:05d}.jpg", f"{i:05d}.jpg")
    return root


def transform(config: ViewConfig, on_tensors: bool) -> Callable:
    """One view by torchvision, normalized; on uint8 tensors or on Pillow images."""
    steps: list[Callable] = [
        v2.RandomResizedCrop(SIZE, scale=config.crop_scale, ratio=config.crop_ratio, antialias=True),
        v2.RandomHorizontalFlip(config.flip),
        v2.ColorJitter(config.brightness, config.contrast, config.saturation, config.hue),
        v2.RandomGrayscale(config.gray),
    ]
    if config.blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(23, config.blur_sigma)], config.blur))
    if config.solarize:
        steps.append(v2.RandomSolarize(128, config.solarize))
    if not on_tensors:
        steps.append(v2.PILToTensor())
    return v2.Compose([*steps, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


class TwoViews(Dataset):
    """Files, decoded to a tensor or by Pillow, two views each."""

    def __init__(self, root: Path, config: ViewConfig, on_tensors: bool) -> None:
        self.paths = sorted(map(str, root.glob("*.jpg"))) * (IMAGES // FILES)
        self.transform, self.on_tensors = transform(config, on_tensors), on_tensors

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if self.on_tensors:
            image = tv_io.decode_jpeg(tv_io.read_file(self.paths[index]), mode=tv_io.ImageReadMode.RGB)
        else:
            with open(self.paths[index], "rb") as file:
                image = Image.open(file).convert("RGB")
        return self.transform(image), self.transform(image)


def ours(root: Path, config: ViewConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tensor]:
    # every image is decoded every time: the cache for small sources would hide what is measured
    monkeypatch.setattr("upstep_fast.data.loading.loader.CACHE_BYTES", 0)
    source = subset(open_source(root), np.tile(np.arange(FILES), IMAGES // FILES))
    with Loader(source, batch_size=BATCH, seed=0, num_workers=WORKERS) as loader:
        for batch in loader:
            yield random_views(
                batch.images, config, seed=0, epoch=batch.epoch, indices=batch.indices, views=2, device=DEVICE
            )


def theirs(root: Path, config: ViewConfig, on_tensors: bool) -> Iterator[Tensor]:
    data = TwoViews(root, config, on_tensors)
    loader = DataLoader(
        data, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True, pin_memory=DEVICE == "cuda"
    )
    while True:
        for views in loader:
            yield torch.stack([view.to(DEVICE, non_blocking=True) for view in views])


def webdatasets(root: Path, config: ViewConfig) -> Iterator[Tensor]:
    webdataset = pytest.importorskip("webdataset")
    view = transform(config, on_tensors=False)
    shards = [str(root / "shard.tar")] * WORKERS
    data = webdataset.WebDataset(shards, shardshuffle=False, nodesplitter=None).shuffle(100).decode("pilrgb")
    data = data.to_tuple("jpg").map_tuple(lambda image: (view(image), view(image))).repeat().with_epoch(10**9)
    loader = webdataset.WebLoader(
        data, batch_size=BATCH, num_workers=WORKERS, pin_memory=DEVICE == "cuda", collate_fn=_collate
    )
    for views in loader:
        yield torch.stack([view.to(DEVICE, non_blocking=True) for view in views])


def _collate(samples: list) -> tuple[Tensor, Tensor]:
    return tuple(torch.stack([sample[0][v] for sample in samples]) for v in (0, 1))  # type: ignore[return-value]


@pytest.mark.parametrize("contender", ["ours", "torchvision", "pil", "webdataset"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_images_to_two_views(benchmark, photographs, monkeypatch, recipe, contender):
    config = RECIPES[recipe]
    batches = {
        "ours": lambda: ours(photographs, config, monkeypatch),
        "torchvision": lambda: theirs(photographs, config, on_tensors=True),
        "pil": lambda: theirs(photographs, config, on_tensors=False),
        "webdataset": lambda: webdatasets(photographs, config),
    }[contender]()
    steps = IMAGES // BATCH

    spent: list[float] = []

    def run() -> None:
        before = cpu_seconds()
        for _ in range(steps):
            views = next(batches)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        spent.append(cpu_seconds() - before)
        assert views.shape == (2, BATCH, 3, SIZE, SIZE) and views.device.type == DEVICE

    benchmark.group = f"{recipe}: decode and two {SIZE} px views"
    benchmark.extra_info.update(device_card(), contender=contender, workers=WORKERS, files=_file_size(photographs))
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
    batches.close()
    benchmark.extra_info["images_per_s"] = round(IMAGES / benchmark.stats.stats.median, 1)
    benchmark.extra_info["cpu_ms_per_image"] = round(1000 * statistics.median(spent) / IMAGES, 2)


@pytest.mark.parametrize(("count", "size", "side"), [(256, 64, 64), (32, 224, 500)])
def test_views_of_a_decoded_batch(benchmark, count, size, side):
    """random_views alone."""
    images = [torch.randint(0, 256, (side, side, 3), dtype=torch.uint8).permute(2, 0, 1) for _ in range(count)]
    config = ViewConfig(size=size)

    def run() -> None:
        random_views(images, config, seed=0, epoch=0, indices=range(count), views=2, device=DEVICE)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.group = "two views of decoded images"
    benchmark.extra_info.update(device_card(), images=count, size=size, side=side)
    benchmark.pedantic(run, rounds=5, warmup_rounds=1)


def cpu_seconds() -> float:
    """Processor time of this process and its living children."""
    ticks = 0
    for child in multiprocessing.active_children():
        fields = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def device_card() -> dict[str, str | int]:
    import PIL
    import torchvision

    return {
        "cpu": processor_name(),
        "cores": os.cpu_count() or 1,
        "gpu": torch.cuda.get_device_name() if DEVICE == "cuda" else "none",
        "torch": torch.__version__,
        "torch_threads": torch.get_num_threads(),
        "torchvision": torchvision.__version__,
        "pillow": PIL.__version__,
        "load_1min": round(os.getloadavg()[0], 1),
    }


def _file_size(root: Path) -> str:
    sizes = [path.stat().st_size for path in root.glob("*.jpg")]
    return f"{len(sizes)} files of {sum(sizes) // len(sizes) // 1024} kB"
