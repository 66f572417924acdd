"""Frames of video files, by torchcodec or PyAV."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from upstep_fast.data.reading.transient import may_pass
from upstep_fast.errors import BadImage, DataError, first_line

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")


def backend(path: str) -> str:
    """Return the installed library's name. Raises DataError, naming the cure, if there is none."""
    for name in ("torchcodec", "av"):
        if importlib.util.find_spec(name) is not None:
            return name
    raise DataError(
        f"data: {path} is a video file, and neither PyAV nor torchcodec is installed: pip install av, "
        "or give folders of frames"
    )


def count_frames(path: str) -> int:
    """Return the number of frames; PyAV decodes the file where its header does not state it. Raises DataError."""
    name = backend(path)
    try:
        if name == "torchcodec":
            return len(_decoder(path))
        with _av().open(path) as container:
            stream = container.streams.video[0]
            return stream.frames or sum(1 for _ in container.decode(stream))
    except Exception as error:  # whatever the libraries raise on a broken file
        raise DataError(f"data: {path} cannot be read: {first_line(error)}") from error


def read(path: str, frames: Sequence[int]) -> list[Tensor]:
    """Return the frames at these positions, ascending, uint8 [3, H, W] each. Raises BadImage, DataError."""
    try:
        if backend(path) == "torchcodec":
            return list(_decoder(path).get_frames_at(list(frames)).data)
        decoded, expected = {}, set(frames)
        with _av().open(path) as container:
            for index, frame in enumerate(container.decode(container.streams.video[0])):
                if index in expected:
                    decoded[index] = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                if len(decoded) == len(expected):
                    break
    except DataError:
        raise
    except Exception as error:  # whatever the libraries raise on a broken file
        if may_pass(error):
            raise
        raise BadImage(f"cannot be decoded: {first_line(error)}") from error
    if missing := expected - set(decoded):
        raise BadImage(f"it ends before frame {min(missing)}")
    return [decoded[index] for index in frames]


def _decoder(path: str) -> Any:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(path)


def _av() -> Any:
    import av

    return av
