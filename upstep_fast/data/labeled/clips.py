"""Clips: folders of frames, or video files read by PyAV or torchcodec.

    train/CLASS/CLIP/frame.png      one folder a clip, its frames in the order of their names; in folders or tars
    train/CLASS/clip.mp4            one file a clip; in folders

A clip is cut into T equal segments; training takes a random frame of each, evaluation the middle one (TSN,
arXiv 1608.00859). A clip shorter than T frames is refused when the data is listed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from upstep_fast.config.reading import AS_STORED, Reading
from upstep_fast.data.keyed_random import uniform_array
from upstep_fast.data.labeled import video
from upstep_fast.data.labeled.reader import ReaderOptions
from upstep_fast.data.labeled.splits import Labeled, join
from upstep_fast.data.loading.loader import MAX_AHEAD_BYTES, permutation
from upstep_fast.data.loading.ordered_map import ordered_map
from upstep_fast.data.loading.skipped_images import SkippedImages, catch_bad_image, read_image
from upstep_fast.data.reading.retries import with_retries
from upstep_fast.data.sources.folders import top_folders, walk
from upstep_fast.data.sources.part import Listing, printable
from upstep_fast.data.sources.source import Source, open_source
from upstep_fast.data.sources.splits import SPLITS, find_splits
from upstep_fast.errors import BadImage, DataError

T = TypeVar("T")
_SLOT = 1 << 20  # key of the random numbers, away from the views' slots


@dataclass(frozen=True)
class Clip:
    """One clip: indices of its frames in the source of frames, or a video file."""

    name: str
    frames: tuple[int, ...]
    file: str | None = None

    def __len__(self) -> int:
        return len(self.frames)


@dataclass(frozen=True, eq=False)
class Clips:
    """Fixed sequence of clips."""

    clips: tuple[Clip, ...]
    source: Source | None  # of the frames
    problems: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def summary(self) -> str:
        """How many clips there are, and what was found of their frames."""
        return f"{len(self)} clips" + (f", of {self.source.summary}" if self.source else "")

    def name(self, index: int) -> str:
        """Return the clip's folder or file."""
        return self.clips[index].name

    def subset(self, indices: Sequence[int]) -> Clips:
        """Return the clips at `indices`, in that order."""
        return Clips(tuple(self.clips[i] for i in indices), self.source, self.problems)

    def read(self, index: int, frames: Sequence[int], channels: int, min_side: int | None = None) -> list[Tensor]:
        """Return the frames at these positions of a clip, uint8 [C, H, W] each. Raises BadImage, DataError.

        min_side: as `decode`, for frames in files of their own.
        """
        clip = self.clips[index]
        if clip.file is not None:
            if channels != 3:
                raise BadImage("a video has 3 channels")
            return with_retries(lambda: video.read(clip.file, frames), lambda: clip.name)  # type: ignore[arg-type]
        assert self.source is not None
        images = []
        for frame in frames:
            try:
                images.append(read_image(self.source, clip.frames[frame], channels=channels, min_side=min_side))
            except BadImage as error:
                raise BadImage(f"frame {self.source.name(clip.frames[frame])}: {error.reason}") from error
        if any(image.shape != images[0].shape for image in images):
            raise BadImage("its frames differ in size")
        return images

    def fingerprint(self) -> str:
        """Return SHA-256 over the clips' names and lengths and the frames' names and sizes."""
        text = ";".join(f"{clip.name}:{len(clip)}" for clip in self.clips)
        return hashlib.sha256((text + (self.source.fingerprint() if self.source else "")).encode()).hexdigest()


def middle_frames(length: int, count: int) -> list[int]:
    """Return the middle frame of each of `count` equal segments of a clip of `length` frames."""
    return [int((i + 0.5) * length / count) for i in range(count)]


def random_frames(length: int, count: int, *, seed: int, epoch: int, index: int) -> list[int]:
    """Return a random frame of each of `count` equal segments, a pure function of (seed, epoch, index)."""
    offsets = uniform_array(seed, epoch, index, _SLOT, np.arange(count))
    return [int((i + u) * length / count) for i, u in enumerate(offsets)]


def train_and_test_clips(paths: Sequence[str], frames: int, reading: Reading = AS_STORED) -> tuple[Labeled, Labeled]:
    """Return the clips of the train and test splits, both with the classes of train.

    Raises DataError for images that are not in train/CLASS/CLIP/, clips of fewer than `frames` frames, and classes of
    test/ that train/ lacks.
    """
    splits, where = [], ", ".join(paths)
    for split in SPLITS:
        clips, names, source = _list(paths, split, reading)
        short = [clip for clip in clips if len(clip) < frames]
        if short:
            raise DataError(
                f"data: {len(short)} of {len(clips)} clips are shorter than --frames {frames}; the shortest: "
                f"{min(short, key=len).name} with {min(map(len, short))}; lower --frames or leave these clips out"
            )
        splits.append((Clips(tuple(clips), source, source.problems if source else ()), names))
    (train, train_names), (test, test_names) = splits
    return join(train, train_names, test, test_names, where)


def _list(paths: Sequence[str], split: str, reading: Reading) -> tuple[list[Clip], list[str], Source | None]:
    clips, names = _videos(paths, split)
    try:
        source: Source | None = open_source(paths, split=split, reading=reading)
    except DataError:
        if not clips:
            raise
        return clips, names, None
    assert source is not None
    if source.labels is None:
        raise DataError(f"data: {', '.join(paths)} {source.unlabeled()}; clips lie in {split}/CLASS/CLIP/")
    members: dict[str, list[int]] = {}
    for index in range(len(source)):
        members.setdefault(source.name(index).rpartition("/")[0], []).append(index)
    for folder, indices in members.items():
        label = source.labels[indices[0]]
        if folder.rpartition("/")[2] == label:
            raise DataError(
                f"data: {source.name(indices[0])} lies directly in its class; --frames wants {split}/CLASS/CLIP/frame"
            )
        clips.append(Clip(folder, tuple(indices)))
        names.append(label)
    return clips, names, source


def _videos(paths: Sequence[str], split: str) -> tuple[list[Clip], list[str]]:
    """Return the video files under PATH/split/CLASS/, and their classes."""
    clips, names = [], []
    suffixes = tuple(suffix.encode() for suffix in video.SUFFIXES)
    for root in filter(os.path.isdir, paths):
        splits = find_splits(top_folders(root), root)
        if splits is None:
            continue
        for name in walk(os.fsencode(root), os.fsencode(splits[split]), Listing(), suffixes):
            path, parts = os.path.join(root, os.fsdecode(name)), name.split(b"/")
            if len(parts) > 2:
                clips.append(Clip(path, tuple(range(video.count_frames(path))), path))
                names.append(printable(parts[1]))
    return clips, names


def training_clips(
    clips: Clips, options: ReaderOptions, skipped: SkippedImages, step: int
) -> Generator[tuple[list[list[Tensor]], Tensor, int]]:
    """Yield batches (clips of T frames, indices [B] int64, epoch) in random order from `step` on, without end.

    A bad clip is left out of its batch and added to `skipped`. Raises DataError when too many are bad.
    """
    assert options.frames is not None
    count, batch_size, per_epoch = options.frames, options.batch_size, len(clips) // options.batch_size

    def jobs() -> Iterator[tuple[int, int]]:
        for at in itertools.count(step):
            epoch, place = divmod(at, per_epoch)
            order = permutation(len(clips), options.seed, epoch)
            yield from ((epoch, int(i)) for i in order[place * batch_size :][:batch_size])

    def read(job: tuple[int, int]) -> list[Tensor]:
        epoch, index = job
        length = len(clips.clips[index])
        if options.views is None:
            images = clips.read(index, middle_frames(length, count), len(options.mean))
            return [options.resized(image) for image in images]
        frames = random_frames(length, count, seed=options.seed, epoch=epoch, index=index)
        return clips.read(index, frames, len(options.mean), options.min_side)

    for batch in _batches(read, jobs(), options):
        indexed = [(index, frames) for (_, index), frames in batch]
        if good := _readable(clips, indexed, options, skipped):
            yield [frames for _, frames in good], torch.tensor([index for index, _ in good]), batch[0][0][0]


def load_clips(
    clips: Clips, options: ReaderOptions, skipped: SkippedImages
) -> Iterator[tuple[Tensor, list[list[Tensor]]]]:
    """Yield every readable clip once, in order, T frames of each, resized: (indices [B] int64, clips).

    A bad clip is left out of its batch and added to `skipped`. Raises DataError when too many are bad.
    """
    assert options.frames is not None
    count, channels = options.frames, len(options.mean)

    def read(index: int) -> list[Tensor]:
        images = clips.read(index, middle_frames(len(clips.clips[index]), count), channels)
        return [options.resized(image) for image in images]

    for batch in _batches(read, range(len(clips)), options):
        if good := _readable(clips, batch, options, skipped):
            yield torch.tensor([index for index, _ in good]), [frames for _, frames in good]


def _batches(
    read: Callable[[T], list[Tensor]], jobs: Iterable[T], options: ReaderOptions
) -> Generator[list[tuple[T, list[Tensor] | BadImage]]]:
    """Yield `batch_size` jobs at a time with their results, read by threads; close() ends them."""

    def run(job: T) -> tuple[T, list[Tensor] | BadImage]:
        return job, catch_bad_image(read)(job)

    def num_bytes(result: tuple[T, list[Tensor] | BadImage]) -> int:
        return 0 if isinstance(result[1], BadImage) else sum(image.nbytes for image in result[1])

    results = ordered_map(run, jobs, options.num_workers, 2 * options.batch_size, num_bytes, MAX_AHEAD_BYTES)
    with contextlib.closing(results):
        while batch := list(itertools.islice(results, options.batch_size)):
            yield batch


def _readable(
    clips: Clips,
    batch: Sequence[tuple[int, list[Tensor] | BadImage]],
    options: ReaderOptions,
    skipped: SkippedImages,
) -> list[tuple[int, list[Tensor]]]:
    """Return the readable clips of a batch and add bad ones to `skipped`. Raises DataError for too many."""
    good = []
    for index, frames in batch:
        if isinstance(frames, BadImage):
            skipped[clips.name(index)] = frames.reason
        else:
            good.append((index, frames))
    skipped.check(len(clips), options.max_bad_fraction)
    return good
