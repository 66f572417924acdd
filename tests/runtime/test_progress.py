"""Progress of slow work: never silent, one line per few seconds in a pipe, nothing with --quiet."""

import io
import itertools
import time
from types import SimpleNamespace

import pytest

from upstep_fast.cli.commands import main
from upstep_fast.evaluation import features
from upstep_fast.runtime import progress, terminal
from upstep_fast.runtime.progress import Task, track
from upstep_fast.runtime.terminal import format_duration


class Stream(io.StringIO):
    """A pipe that notes when each line came."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def write(self, text):
        if text.strip():
            self.lines.append((time.monotonic(), text.strip()))
        return super().write(text)


@pytest.fixture
def stderr(monkeypatch):
    stream = Stream()
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    monkeypatch.setattr(progress, "SHORT", 0.2)
    yield stream
    terminal.set_style()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.25 s"),
        (45, "45 s"),
        (59.6, "1 min"),
        (112, "1 min 52 s"),
        (600, "10 min"),
        (3570, "1 h"),
        (5741, "1 h 36 min"),
        (7800, "2 h 10 min"),
        (446.4 * 3600, "18 d 14 h"),
    ],
)
def test_durations_as_people_read_them(seconds, text):
    assert format_duration(seconds) == text


def test_a_line_tells_count_rate_and_time_left(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    task = Task("embed", 5000)
    clock[0] += 6
    assert task.line() == "embed: 0 of 5,000 images, 6 s so far"
    clock[0] += 29
    task.advance(1200)  # 35 s: (5000 - 1200) * 35 / 1200 = 110.8 s are left
    assert task.line() == "embed: 1,200 of 5,000 images, 34/s, 1 min 51 s left"
    clock[0] += 10  # nothing more is done: the time left is less by what has passed
    assert task.line().endswith("1 min 41 s left")
    task.advance(3800)
    assert task.line() == "embed: 5,000 of 5,000 images, 111/s"
    slow = Task("adapt", 400, "steps", done=100)  # continued: the rate is of this process's steps
    clock[0] += 600
    slow.advance()
    assert slow.line() == "adapt: 101 of 400 steps, 10 min each, 2 d 2 h left"
    assert Task("export").line() == "export: 0 s so far"


def test_one_long_step_is_not_silent_and_the_innermost_task_is_shown(stderr):
    with track("outer"):
        with track("inner", 4) as task:
            time.sleep(0.5)
            task.advance()
            time.sleep(0.3)
        time.sleep(0.45)
    names = [line.split(":")[0] for _, line in stderr.lines]
    assert names[0] == "inner" and names[-1] == "outer" and 3 <= len(names) <= 6
    count = len(stderr.lines)
    time.sleep(0.4)  # the thread has ended
    assert len(stderr.lines) == count


def test_after_the_first_minute_lines_come_less_often_and_still_within_three_seconds(stderr, monkeypatch):
    assert progress.SHORT < progress.LONG + 0.1 < 3  # the thread looks every .1 s
    monkeypatch.setattr(progress, "EARLY", 0.5)  # in place of 60 s
    monkeypatch.setattr(progress, "LONG", 0.4)
    began = time.monotonic()
    with track("one step", 4):
        time.sleep(2)
    later = [at for at, _ in stderr.lines if at - began > 0.5]
    assert 2 <= len(later) <= 4 and all(b - a >= 0.4 for a, b in itertools.pairwise(later))


def test_quiet_and_other_ranks_show_nothing(stderr, monkeypatch):
    terminal.set_style(quiet=True)
    with track("embed", 3):
        time.sleep(0.4)
    terminal.set_style()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("RANK", "1")
    with track("embed", 3):
        time.sleep(0.4)
    assert stderr.lines == []


def test_an_error_ends_the_progress(stderr):
    with pytest.raises(ValueError, match="this"), track("outer"), track("inner"):
        raise ValueError("this")
    assert progress._display is None


def test_embed_of_slow_images_has_no_gap(stderr, monkeypatch, tmp_path, model, photos):
    load = features.load_images

    def slowly(*args, **options):
        for batch in load(*args, **options):
            time.sleep(0.35)
            yield batch

    monkeypatch.setattr(features, "load_images", slowly)
    began = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        main(["embed", "--model", model, "--data", str(photos), "--out", str(tmp_path / "f.npy"),
              "--batch-size", "2", "--device", "cpu"])  # fmt: skip
    assert not stop.value.code
    times = [began, *(at for at, _ in stderr.lines), time.monotonic()]
    assert max(b - a for a, b in itertools.pairwise(times)) < 3
    assert any(" images, " in line and line.endswith("left") for _, line in stderr.lines)


def test_the_time_of_all_is_told_once_it_is_known(monkeypatch):
    clock, messages = [0.0], []
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(progress, "log", SimpleNamespace(info=lambda text, *values: messages.append(text % values)))

    def said(seconds, total, device="cpu"):
        messages.clear()
        task = Task("adapt", total, "steps", device=device)
        for each in seconds:
            clock[0] += each
            task.advance()
        return list(messages)

    assert said([15, 1, 1, 1, 1, 1], 7800) == ["adapt: about 2 h 10 min on this CPU"]  # the first step compiles
    # no need to wait for a second step; but a first one that compiled is no measure of the others
    assert said([3600, 3600], 400, "cuda") == ["adapt: at most 16 d 16 h on this GPU"]
    assert said([25, 2, 2, 2], 60) == ["adapt: at most 25 min on this CPU", "adapt: about 2 min on this CPU"]
    assert said([1, 1, 1, 1], 30) == said([1, 1, 1, 1], 7800, device="") == said([1, 1], 7800) == []


def test_the_time_left_does_not_count_the_first_units_once_others_followed(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    task, left = Task("adapt", 10, "steps"), []
    for seconds in (25, 2, 2):
        clock[0] += seconds
        task.advance()
        left.append(task.seconds_per_unit)
    assert left == [25, 2, 2]
    assert task.line() == "adapt: 3 of 10 steps, 0.1/s, 14 s left"
