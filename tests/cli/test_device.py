"""Which device and precision a run takes, and what is refused."""

import pytest
import torch

from upstep_fast.errors import ConfigError
from upstep_fast.runtime import device


@pytest.fixture
def gpu(monkeypatch):
    """A machine with one GPU of a chosen compute capability, as torch would describe it."""

    def of(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))

    return of


@pytest.mark.parametrize(
    ("name", "capability", "wanted"),
    [("V100", (7, 0), "fp16"), ("T4", (7, 5), "fp16"), ("A100", (8, 0), "bf16"), ("H100", (9, 0), "bf16")],
)
def test_gpus_without_bf16_take_fp16(gpu, name, capability, wanted):
    gpu(*capability)
    assert (found := device.resolve("auto", "auto")).precision == wanted and found.device.type == "cuda"


def test_bf16_is_refused_where_a_gpu_lacks_it(gpu):
    gpu(7, 5)
    with pytest.raises(ConfigError, match="no bf16"):
        device.resolve("cuda", "bf16")


@pytest.mark.parametrize(
    ("name", "precision", "message"),
    [
        ("tpu", "auto", "not a device"),
        ("meta", "auto", "not supported"),
        ("cpu", "fp16", "fp16 needs a CUDA GPU"),
        ("cpu", "fp8", "fp8 needs a GPU"),
    ],
)
def test_what_is_not_there_is_refused(name, precision, message):
    with pytest.raises(ConfigError, match=message):
        device.resolve(name, precision)


def test_a_second_gpu_that_is_not_there(gpu):
    gpu(9, 0)
    with pytest.raises(ConfigError, match="1 GPUs found"):
        device.resolve("cuda:1", "auto")
