"""Clips: folders of frames, or video files read by PyAV or torchcodec.

    train/CLASS/CLIP/frame.png      one folder a clip, its frames in the order of their names; in folders or tars
    train/CLASS/clip.mp4            one file a clip; in folders

T frames of a clip of F: it is cut into T equal segments; training takes a random frame of each, evaluation the middle
one (TSN, arXiv 1608.00859). A clip shorter than T frames is refused when the data is listed.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from upstep_fast.data.keyed_random import uniform_array
from upstep_fast.data.labelled import video
from upstep_fast.data.labelled.splits import Labelled, join
from upstep_fast.data.loading.loader import permutation
from upstep_fast.data.loading.ordered_map import ordered_map
from upstep_fast.data.loading.skipped import check_bad, read_image
from upstep_fast.data.sources.part import SPLITS
from upstep_fast.data.sources.source import Source, open_source
from upstep_fast.errors import DataError

if TYPE_CHECKING:
    from upstep_fast.data.labelled.batches import Reader

_SLOT = 1 << 20  # of the random numbers: far from those of the views


@dataclass(frozen=True)
class Clip:
    """One clip: the indices of its frames in the source of frames, or its video file."""

    name: str
    frames: tuple[int, ...]
    file: str | None = None

    def __len__(self) -> int:
        return len(self.frames)


@dataclass(frozen=True, eq=False)
class Clips:
    """A fixed sequence of clips."""

    clips: tuple[Clip, ...]
    source: Source | None  # of the frames
    problems: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.clips)

    def name(self, index: int) -> str:
        """The clip's folder or file."""
        return self.clips[index].name

    def subset(self, indices: Sequence[int]) -> Clips:
        """Return the clips at `indices`, in that order."""
        return Clips(tuple(self.clips[i] for i in indices), self.source, self.problems)

    def read(self, index: int, frames: Sequence[int], channels: int) -> list[Tensor] | str:
        """The frames at these places, uint8 [C, H, W] each, or in one line why there are none."""
        clip = self.clips[index]
        if clip.file is not None:
            return video.read(clip.file, frames) if channels == 3 else "a video has 3 channels"
        assert self.source is not None
        images = []
        for frame in frames:
            image = read_image(self.source, clip.frames[frame], channels=channels)
            if isinstance(image, str):
                return f"frame {self.source.name(clip.frames[frame])}: {image}"
            images.append(image)
        if any(image.shape != images[0].shape for image in images):
            return "its frames differ in size"
        return images

    def fingerprint(self) -> str:
        """SHA-256 over the clips' names and lengths and the frames' names and sizes."""
        text = ";".join(f"{clip.name}:{len(clip)}" for clip in self.clips)
        return hashlib.sha256((text + (self.source.fingerprint() if self.source else "")).encode()).hexdigest()


def middle_frames(length: int, count: int) -> list[int]:
    """The middle frame of each of `count` equal segments of a clip of `length` frames."""
    return [int((i + 0.5) * length / count) for i in range(count)]


def random_frames(length: int, count: int, *, seed: int, epoch: int, index: int) -> list[int]:
    """A random frame of each of `count` equal segments; a pure function of (seed, epoch, index)."""
    draws = uniform_array(seed, epoch, index, _SLOT, np.arange(count))
    return [int((i + u) * length / count) for i, u in enumerate(draws)]


def train_and_test_clips(paths: Sequence[str], frames: int) -> tuple[Labelled, Labelled]:
    """The clips of both splits, with the classes of train.

    Raises DataError for images that are not in train/CLASS/CLIP/, clips of fewer than `frames` frames, and classes of
    test/ that train/ lacks.
    """
    found, where = [], ", ".join(paths)
    for split in SPLITS:
        clips, names, source = _list(paths, split)
        short = [clip for clip in clips if len(clip) < frames]
        if short:
            raise DataError(
                f"data: {len(short)} of {len(clips)} clips are shorter than --frames {frames}; the shortest: "
                f"{min(short, key=len).name} with {min(map(len, short))}; lower --frames or leave these clips out"
            )
        found.append((Clips(tuple(clips), source, source.problems if source else ()), names))
    (train, train_names), (test, test_names) = found
    return join(train, train_names, test, test_names, where)


def _list(paths: Sequence[str], split: str) -> tuple[list[Clip], list[str], Source | None]:
    clips, names = _videos(paths, split)
    try:
        source: Source | None = open_source(paths, split=split)
    except DataError:
        if not clips:
            raise
        return clips, names, None
    assert source is not None
    if source.labels is None:
        raise DataError(f"data: {', '.join(paths)} has images outside class folders; clips lie in {split}/CLASS/CLIP/")
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
    """Video files under PATH/split/CLASS/."""
    clips, names = [], []
    for root in paths:
        top = Path(root) / split
        for folder, folders, files in os.walk(top):
            folders.sort()
            for file in sorted(files):
                path = Path(folder) / file
                parts = path.relative_to(top).parts
                if path.suffix.lower() in video.SUFFIXES and len(parts) > 1:
                    clips.append(Clip(str(path), tuple(range(video.count_frames(str(path)))), str(path)))
                    names.append(parts[0])
    return clips, names


def training_clips(clips: Clips, reader: Reader, step: int) -> Generator[tuple[list[list[Tensor]], Tensor, int]]:
    """Batches (clips of T frames, indices, epoch) in random order from `step` on, without end.

    A clip that cannot be read is left out of its batch and listed.
    """
    assert reader.frames is not None
    count, per_epoch = reader.frames, len(clips) // reader.batch_size

    def batches() -> Iterator[tuple[int, int]]:
        at = step
        while True:
            epoch, place = divmod(at, per_epoch)
            order = permutation(len(clips), reader.seed, epoch)
            yield from ((epoch, int(i)) for i in order[place * reader.batch_size :][: reader.batch_size])
            at += 1

    def read(job: tuple[int, int]) -> tuple[int, int, list[Tensor] | str]:
        epoch, index = job
        if reader.views is None:
            places = middle_frames(len(clips.clips[index]), count)
        else:
            places = random_frames(len(clips.clips[index]), count, seed=reader.seed, epoch=epoch, index=index)
        return epoch, index, clips.read(index, places, len(reader.mean))

    done = ordered_map(read, batches(), reader.num_workers, 2 * reader.batch_size)
    try:
        while True:
            results = [next(done) for _ in range(reader.batch_size)]
            good = _sort_out(clips, [(index, frames) for _, index, frames in results], reader)
            if good:
                yield [frames for _, frames in good], torch.tensor([index for index, _ in good]), results[0][0]
    finally:
        done.close()


def load_clips(clips: Clips, reader: Reader) -> Iterator[tuple[Tensor, list[list[Tensor]]]]:
    """Every readable clip once, in order, T frames of each: (indices [B], clips)."""
    assert reader.frames is not None
    count, channels = reader.frames, len(reader.mean)

    def read(index: int) -> tuple[int, list[Tensor] | str]:
        return index, clips.read(index, middle_frames(len(clips.clips[index]), count), channels)

    done = ordered_map(read, range(len(clips)), reader.num_workers, 2 * reader.batch_size)
    try:
        for batch in iter(partial(_up_to, done, reader.batch_size), []):
            if good := _sort_out(clips, batch, reader):
                yield torch.tensor([index for index, _ in good]), [frames for _, frames in good]
    finally:
        done.close()


def _up_to(items: Iterator[tuple[int, list[Tensor] | str]], count: int) -> list[tuple[int, list[Tensor] | str]]:
    return [item for _, item in zip(range(count), items, strict=False)]


def _sort_out(
    clips: Clips, read: Sequence[tuple[int, list[Tensor] | str]], reader: Reader
) -> list[tuple[int, list[Tensor]]]:
    """Those that could be read; the others are listed, and too many of them end the run."""
    good = []
    for index, frames in read:
        if isinstance(frames, str):
            reader.skipped[clips.name(index)] = frames
        else:
            good.append((index, frames))
    check_bad(reader.skipped, len(clips), reader.max_bad_fraction)
    return good
