"""Frames of video files, by torchcodec or PyAV, whichever is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from upstep_fast.errors import DataError

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg")


def backend(path: str) -> str:
    """The installed library. Raises DataError, naming the cure, if there is none."""
    for name in ("torchcodec", "av"):
        if importlib.util.find_spec(name) is not None:
            return name
    raise DataError(
        f"data: {path} is a video file, and neither PyAV nor torchcodec is installed: pip install av, "
        "or give folders of frames"
    )


def count_frames(path: str) -> int:
    """How many frames the file has; PyAV decodes all of it where the file does not say. Raises DataError."""
    name = backend(path)
    try:
        if name == "torchcodec":
            return len(_decoder(path))
        with _av().open(path) as container:
            stream = container.streams.video[0]
            return stream.frames or sum(1 for _ in container.decode(stream))
    except Exception as error:  # whatever the libraries raise on a broken file
        raise DataError(f"data: {path} cannot be read: {_first_line(error)}") from error


def read(path: str, frames: Sequence[int]) -> list[Tensor] | str:
    """The frames at these places, ascending, uint8 [3, H, W] each, or in one line why there are none."""
    try:
        if backend(path) == "torchcodec":
            return list(_decoder(path).get_frames_at(list(frames)).data)
        wanted, found = set(frames), {}
        with _av().open(path) as container:
            for index, frame in enumerate(container.decode(container.streams.video[0])):
                if index in wanted:
                    found[index] = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                if len(found) == len(wanted):
                    break
        missing = wanted - set(found)
        return f"it ends before frame {min(missing)}" if missing else [found[i] for i in frames]
    except DataError:
        raise
    except Exception as error:
        return f"cannot be decoded: {_first_line(error)}"


def _decoder(path: str) -> Any:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(path)


def _av() -> Any:
    import av

    return av


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
