"""The measured choice: kept on disk, pinned from outside, and never made twice, on a CPU or during a capture."""

from __future__ import annotations

import json
import logging
import os

import pytest
import torch

from upstep_fast.kernels import _autotune
from upstep_fast.kernels._dispatch import NAMESPACE

GPU = torch.device("cuda", 0)
WAYS = {"first": lambda: None, "second": lambda: None}


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A stand-in GPU on which `second` is always faster; returns the problems measured, and the file's path."""
    measured = []

    def measure(candidates):
        measured.append(tuple(candidates))
        return {name: 1.0 / (1 + i) for i, name in enumerate(candidates)}, False

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(_autotune, "_machine", lambda device: "a GPU")
    monkeypatch.setattr(_autotune, "_measure", measure)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_autotune, "_known", {})
    monkeypatch.setattr(_autotune, "_pinned", {})
    return measured, tmp_path / NAMESPACE / "measured.json"


def new_process(monkeypatch) -> None:
    monkeypatch.setattr(_autotune, "_known", {})


def test_measured_once_and_kept(gpu, monkeypatch):
    measured, path = gpu
    assert _autotune.autotune("p", GPU, WAYS) == ("second", "measured")
    assert _autotune.autotune("p", GPU, WAYS) == ("second", "measured")
    assert json.loads(path.read_text()) == {"a GPU": {"p": "second"}}
    new_process(monkeypatch)
    assert _autotune.autotune("p", GPU, WAYS) == ("second", "measured")
    assert len(measured) == 1
    _autotune.autotune("q", GPU, WAYS)
    assert json.loads(path.read_text()) == {"a GPU": {"p": "second", "q": "second"}}
    assert os.listdir(path.parent) == ["measured.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"a GPU": 3}', '{"a GPU": {"p": 3}}', "\x00\xff"])
def test_a_corrupted_file_is_ignored_with_a_log_line(gpu, content, caplog):
    _, path = gpu
    path.parent.mkdir()
    path.write_text(content)
    with caplog.at_level(logging.WARNING):
        assert _autotune.autotune("p", GPU, WAYS)[0] == "second"
    assert str(path) in caplog.text
    assert json.loads(path.read_text()) == {"a GPU": {"p": "second"}}


def test_a_name_that_is_no_longer_a_candidate_is_measured_anew(gpu):
    measured, path = gpu
    path.parent.mkdir()
    path.write_text(json.dumps({"a GPU": {"p": "gone"}}))
    assert _autotune.autotune("p", GPU, WAYS)[0] == "second"
    assert len(measured) == 1


def test_an_unwritable_cache_costs_only_a_log_line(gpu, monkeypatch, caplog):
    monkeypatch.setattr(_autotune.os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError("read-only")))
    with caplog.at_level(logging.WARNING):
        assert _autotune.autotune("p", GPU, WAYS)[0] == "second"
    assert "read-only" in caplog.text
    assert os.listdir(gpu[1].parent) == []


def test_pins_make_another_process_agree(gpu, monkeypatch):
    measured, path = gpu
    _autotune.autotune("p", GPU, WAYS)
    told = json.loads(json.dumps(_autotune.tuned()))
    assert told == {"p": "second"}
    new_process(monkeypatch)
    path.unlink()
    _autotune.set_tuned({"p": "first"})
    assert _autotune.autotune("p", GPU, WAYS) == ("first", "pinned")
    assert _autotune.tuned() == {"p": "first"}
    _autotune.set_tuned({"p": "missing"})
    with pytest.raises(RuntimeError, match=r"p: pinned to 'missing'.*can: first, second"):
        _autotune.autotune("p", GPU, WAYS)
    assert len(measured) == 1


def test_nothing_is_measured_during_a_capture_or_on_a_cpu(gpu, monkeypatch):
    measured, path = gpu
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    name, why = _autotune.autotune("p", GPU, WAYS)
    assert name == "first" and "captured" in why
    name, why = _autotune.autotune("p", torch.device("cpu"), WAYS)
    assert name == "first" and "CPU" in why
    assert not measured and not path.exists()


@pytest.mark.parametrize(("count", "size"), [(0, 1), (1, 1), (2, 2), (3, 4), (32768, 32768), (32896, 65536)])
def test_power_class(count, size):
    assert _autotune.power_class(count) == size


class Timeline:
    """A stand-in GPU: work is queued behind earlier work, and launching it takes the host time. Microseconds."""

    def __init__(self, monkeypatch):
        self.host = self.device = 0.0
        timeline = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = max(timeline.host, timeline.device)

            def synchronize(self):
                timeline.host = max(timeline.host, self.at)

            def elapsed_time(self, end):
                return (end.at - self.at) / 1e3

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: timeline.launch(0, cycles / 2000))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(timeline, "host", timeline.device))

    def launch(self, host, device):
        self.host += host
        self.device = max(self.host, self.device) + device


def test_the_time_is_the_devices_and_not_the_launches(monkeypatch):
    gpu = Timeline(monkeypatch)
    slow_launch, slow_kernel = lambda: gpu.launch(90, 20), lambda: gpu.launch(10, 30)
    times, lacked_memory = _autotune._measure({"slow launch": slow_launch, "slow kernel": slow_kernel})
    assert times == pytest.approx({"slow launch": 0.020, "slow kernel": 0.030}) and not lacked_memory


def test_a_choice_made_for_lack_of_memory_is_not_kept(gpu, monkeypatch):
    _, path = gpu
    monkeypatch.setattr(_autotune, "_measure", lambda candidates: ({"first": 1.0}, True))
    assert _autotune.autotune("p", GPU, WAYS) == ("first", "measured")
    assert not path.exists()


def test_lack_of_memory_is_told_from_other_failures(monkeypatch):
    Timeline(monkeypatch)

    def fails(error):
        raise error

    bad = {"no memory": lambda: fails(torch.cuda.OutOfMemoryError("out of memory")), "good": lambda: None}
    assert _autotune._measure(bad) == ({"good": pytest.approx(0.0)}, True)
    bad["no memory"] = lambda: fails(RuntimeError("out of shared memory"))
    assert _autotune._measure(bad)[1] is False


def test_other_kernels_are_another_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    names = []
    for text in ("a = 1", "a = 2"):
        (tmp_path / "op.py").write_text(text)
        monkeypatch.setattr(_autotune, "__file__", str(tmp_path / "_autotune.py"))
        _autotune._fingerprint.cache_clear()
        _autotune._machine.cache_clear()
        names.append(_autotune._machine(GPU))
    _autotune._fingerprint.cache_clear()
    _autotune._machine.cache_clear()
    assert names[0] != names[1] and names[0].startswith("a GPU | torch ")


@pytest.mark.gpu
def test_a_failing_candidate_is_left_out(caplog):
    def fails():
        raise RuntimeError("out of shared memory")

    with caplog.at_level(logging.WARNING):
        assert list(_autotune._measure({"bad": fails, "good": lambda: None})[0]) == ["good"]
    assert "bad cannot run" in caplog.text
