"""Bytes go to the device as they are and are normalized there, with the bits of floats normalized on the host."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from upstep_fast.data.views.resize import normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_bytes_are_normalized_as_their_floats_bit_for_bit():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(2, 3, 16, 16)
    floats = torch.stack(list(images)).float().div_(255)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (MEAN, STD))
    assert torch.equal(normalize(images, MEAN, STD), (floats - mean).div_(std))
    assert torch.equal(normalize(images, MEAN, STD, torch.device("cpu")), normalize(floats, MEAN, STD))
    assert torch.equal(images[0, 0].flatten(), torch.arange(256, dtype=torch.uint8))  # not written to


def test_what_is_copied_to_a_gpu_is_bytes():
    copied = []

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if "_to_copy" in str(func) and (kwargs or {}).get("device", torch.device("cpu")).type == "cuda":
                copied.append((out.dtype, kwargs.get("non_blocking")))
            return out

    with FakeTensorMode(), Copies():
        images = torch.empty(2, 3, 8, 8, dtype=torch.uint8)
        images.pin_memory = lambda: images
        out = normalize(images, MEAN, STD, torch.device("cuda"))
    assert out.is_cuda and out.dtype == torch.float32
    assert copied[0] == (torch.uint8, True)
