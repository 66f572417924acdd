"""Runs in Weights & Biases (offline) and MLflow (a file store), read back with the libraries' own formats."""

import json
import logging
import threading
import time
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from adapt_configs import upstep_config
from photos import save_photos
from PIL import Image

from upstep_fast import adapt, finetune
from upstep_fast.errors import ConfigError, Interrupted
from upstep_fast.methods.gate import GateState
from upstep_fast.report import trackers
from upstep_fast.report.metrics import Metrics
from upstep_fast.runtime import distributed
from upstep_fast.train.run_writer import RunWriter


def row(step, **values):
    return {"step": step, "loss": 5.0 - step, "open": True, "bad": None, "images_per_s": 10.0} | values


def write(out, steps, step=0, log_to=(), config=None):
    """Write the rows of `steps` as a run in `out` does that starts at `step`."""
    with Metrics(out / "metrics.jsonl", step, log_to, config) as metrics:
        for i in steps:
            metrics.write(row(i))


@pytest.fixture
def mlflow_client(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    return mlflow.MlflowClient((tmp_path / "store").as_uri())


@pytest.fixture
def warnings():
    """Texts of this package's warnings, whichever handlers other tests have left on its logger."""
    logger, texts = logging.getLogger("upstep_fast"), []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: texts.append(record.getMessage())
    before, logger.handlers[:] = logger.handlers[:], [handler]
    yield texts
    logger.handlers[:] = before


def mlflow_runs(client):
    return client.search_runs([e.experiment_id for e in client.search_experiments()])


def wandb_records(path):
    """Return the records of an offline run, once its last one is on disk: a busy machine writes after `finish`."""
    until = time.monotonic() + 20
    while True:
        records = read_wandb(path.read_bytes())
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < until, f"{path} has no last record"
        time.sleep(0.1)


def read_wandb(data):
    """Return the records in a file of Weights & Biases: a LevelDB log behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    at, part, records = 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:  # no header begins in the last 6 bytes of a block
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # full, last
            records.append(wandb_internal_pb2.Record.FromString(part))
            part = b""
    return records


def wandb_rows(records):
    """Return {step: {name: value}} of an offline run's records."""
    rows = [r.history for r in records if r.WhichOneof("record_type") == "history"]
    return {h.step.num: {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in h.item} for h in rows}


def test_mlflow_holds_what_metrics_jsonl_holds_and_a_resumed_run_continues(mlflow_client, tmp_path):
    many = {f"flag_{i}": i for i in range(150)} | {"data": ["photos/" + 600 * "x"]}
    write(tmp_path, range(120), log_to=["mlflow"], config=many)
    (run,) = mlflow_runs(mlflow_client)
    assert run.info.status == "FINISHED" and run.info.run_name == tmp_path.name
    assert run.data.params["flag_149"] == "149" and len(run.data.params["data"]) == 500
    history = mlflow_client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(i, 5.0 - i) for i in range(120)]
    assert set(run.data.metrics) == {"loss", "open", "images_per_s"}
    # killed after step 119 with a checkpoint at 100: steps 100 to 119 are repeated
    write(tmp_path, range(100, 130), 100, ["mlflow"], config=many | {"flag_0": 7})
    (same,) = mlflow_runs(mlflow_client)
    assert same.info.run_id == run.info.run_id
    assert [m.step for m in mlflow_client.get_metric_history(run.info.run_id, "loss")] == list(range(130))
    # begun anew: another run
    write(tmp_path, range(1), log_to=["mlflow"])
    assert len(mlflow_runs(mlflow_client)) == 2


@pytest.mark.parametrize(("error", "status"), [(Interrupted("stopped"), "KILLED"), (ValueError("bad"), "FAILED")])
def test_mlflow_is_told_how_a_run_ended(mlflow_client, tmp_path, error, status):
    with (
        pytest.raises(type(error)),
        Metrics(tmp_path / "metrics.jsonl", log_to=["mlflow"]) as metrics,
    ):
        metrics.write(row(0))
        raise error
    (run,) = mlflow_runs(mlflow_client)
    assert run.info.status == status


def test_weights_and_biases_holds_what_metrics_jsonl_holds_and_a_resumed_run_continues(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_PROJECT", "WANDB_NAME", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    write(tmp_path, range(3), log_to=["wandb"], config={"lr": 0.5})
    write(tmp_path, range(2, 4), 2, ["wandb"])
    first, second = (wandb_records(path) for path in sorted(tmp_path.glob("wandb/offline-run-*/*.wandb")))
    runs = [next(r.run for r in records if r.WhichOneof("record_type") == "run") for records in (first, second)]
    assert runs[0].run_id == runs[1].run_id == (tmp_path / "wandb-run-id.txt").read_text().strip()
    assert runs[0].project == "upstep_fast" and runs[0].display_name == tmp_path.name
    assert {(c.key, c.value_json) for c in runs[0].config.update if c.key == "lr"} == {("lr", "0.5")}
    values = {step: (r["loss"], r["open"]) for step, r in wandb_rows(first).items()}
    assert values == {0: (5.0, 1.0), 1: (4.0, 1.0), 2: (3.0, 1.0)}
    assert sorted(wandb_rows(second)) == [2, 3]


def test_a_run_logs_its_steps_and_flags(mlflow_client, options):
    result = adapt(**options | {"steps": 3, "log_to": ["mlflow"], "report_images": False, "verdict": "off"})
    (run,) = mlflow_runs(mlflow_client)
    assert run.data.params["steps"] == "3" and run.info.run_name == "out"
    rows = [json.loads(line) for line in (result.adapter.parent / "metrics.jsonl").read_text().splitlines()]
    history = mlflow_client.get_metric_history(run.info.run_id, "loss")
    assert [m.value for m in history] == [r["loss"] for r in rows if r["loss"] is not None]


VALUES = {"verdict": "better: by 2.0", "verdict_gain": 2.0, "final_loss": float("nan")}


def test_the_result_of_a_run_reaches_every_tracker(mlflow_client, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Metrics(tmp_path / "metrics.jsonl", 0, ["mlflow", "wandb", "tensorboard"]) as metrics:
        metrics.write(row(0))
        metrics.conclude(1, VALUES)
    (run,) = mlflow_runs(mlflow_client)
    assert run.data.tags["verdict"] == VALUES["verdict"] and run.data.metrics["verdict_gain"] == 2.0
    assert "final_loss" not in run.data.metrics and run.info.status == "FINISHED"
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    updates = [r.summary.update for r in wandb_records(path) if r.WhichOneof("record_type") == "summary"]
    summary = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for update in updates for i in update}
    assert {name: summary.get(name) for name in VALUES} == VALUES | {"final_loss": None}
    events = reader.EventAccumulator(str(tmp_path))
    events.Reload()
    (scalar,) = events.Scalars("verdict_gain")
    (text,) = events.Tensors("verdict/text_summary")
    assert (scalar.step, scalar.value) == (1, 2.0) and text.tensor_proto.string_val == [VALUES["verdict"].encode()]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


class Recorder:
    """A tracker that keeps what it is sent."""

    made: ClassVar[list] = []

    def __init__(self, run):
        self.run, self.rows, self.result, self.status = run, [], None, None
        self.made.append(self)

    def log(self, rows):
        self.rows += rows

    def conclude(self, step, values):
        self.result = (step, dict(values))

    def finish(self, status):
        self.status = status


@pytest.fixture
def recorders(monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setattr(Recorder, "made", [])
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", Recorder)
    return Recorder.made


def test_adapt_sends_its_verdict(recorders, options, tmp_path):
    (tmp_path / "more").mkdir()
    flags = {"data": save_photos(tmp_path / "more", 64), "steps": 4, "log_to": ["mlflow"], "report_images": False}
    result = adapt(**options | flags | {"verdict": 16})
    (tracker,) = recorders
    step, values = tracker.result
    assert step == 4 == len(tracker.rows) and tracker.status == "FINISHED"
    assert (values["verdict"], values["verdict_gain"]) == (result.verdict.text, result.verdict.gain)
    assert values["updates"] == result.opened


def test_finetune_sends_its_rows_and_results(recorders, model, tmp_path):
    for split, count in (("train", 6), ("test", 2)):
        for label in "ab":
            for i in range(count):
                path = tmp_path / "labeled" / split / label / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (40, 40), (40 * i, 255 * (label == "a"), 0)).save(path)
    result = finetune(
        model,
        tmp_path / "labeled",
        tmp_path / "out",
        method="linear",
        epochs=2,
        batch_size=4,
        device="cpu",
        num_workers=0,
        log_to=("mlflow,mlflow",),
    )
    (tracker,) = recorders
    rows = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [step for step, _ in tracker.rows] == [r["step"] for r in rows] and tracker.status == "FINISHED"
    assert [numbers["loss"] for _, numbers in tracker.rows] == [r["loss"] for r in rows]
    assert tracker.result == (len(rows), result.metrics) and tracker.run.config["method"] == "linear"


def test_a_second_rank_has_no_tracker(recorders, options, monkeypatch, tmp_path):
    config = upstep_config(**{**options, "data": ("d",), "out": "o", "log_to": ("mlflow",)})
    state = SimpleNamespace(step=0, method=SimpleNamespace(vit=torch.nn.Linear(1, 1)), gate=GateState())
    for is_first in (False, True):
        monkeypatch.setattr(distributed, "is_first", lambda first=is_first: first)
        folder = tmp_path / str(is_first)
        folder.mkdir()
        with RunWriter(config, state, None, None, folder, SimpleNamespace(config={})) as writer:
            if not is_first:
                writer.conclude([None])
        assert len(recorders) == is_first and (folder / "metrics.jsonl").exists() == is_first


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_server_or_key_is_one_warning(name, tmp_path, monkeypatch, warnings):
    pytest.importorskip(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    write(tmp_path, range(3), log_to=[name])
    (message,) = warnings
    assert message.startswith(f"{name}: ") and "the run continues without it" in message
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


class Hanging:
    """A tracker whose server never answers."""

    answer = threading.Event()

    def __init__(self, run):
        self.answer.wait()


class Full:
    """A tracker whose disk is full from the second row on."""

    def __init__(self, run):
        self.rows = []

    def log(self, rows):
        raise OSError(28, "No space left on device")

    def finish(self, status):
        raise AssertionError("it has failed")


@pytest.mark.parametrize(("kind", "reason"), [(Hanging, "no answer within"), (Full, "No space left on device")])
def test_a_failing_tracker_never_holds_up_a_step(kind, reason, tmp_path, monkeypatch, warnings):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", kind)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.1)
    metrics = Metrics(tmp_path / "metrics.jsonl", log_to=["mlflow"])
    began = time.monotonic()
    for i in range(100):
        metrics.write(row(i))
    assert time.monotonic() - began < 20  # a row that waited for the tracker would take a minute
    metrics.__exit__(None, None, None)
    (message,) = warnings
    assert reason in message and "metrics.jsonl holds every number" in message
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 100
    Hanging.answer.set()


@pytest.mark.parametrize("content", ["", "../../elsewhere", "a b", "x" * 2000])
def test_a_damaged_id_begins_a_new_run(content, tmp_path):
    (tmp_path / "mlflow-run-id.txt").write_text(content)
    assert trackers._run_id(trackers.TrackedRun(tmp_path, 5, {}), "mlflow") is None


def config(**flags):
    return upstep_config(model="m", data=("d",), out="o", **flags).output.trackers


def test_names_of_trackers(monkeypatch):
    assert config() == ()
    assert config(log_to=("wandb,mlflow", "wandb"), tensorboard=True) == ("wandb", "mlflow", "tensorboard")
    with pytest.raises(ConfigError, match=r"log_to: got 'comet', choose from tensorboard wandb mlflow"):
        config(log_to=("comet",))
    from upstep_fast.config import training

    monkeypatch.setattr(training.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"log_to: wandb is not installed; pip install 'upstep_fast\[loggers\]'"):
        config(log_to=("wandb",))
