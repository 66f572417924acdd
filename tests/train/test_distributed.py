"""Many processes as one run: the same result as one process, the same decisions on every rank, and faults of ranks.

One launch of two gloo ranks (rank_runner.py) does many runs; each test looks at one. Faults that end processes
have launches of their own, under `long`.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import upstep_fast
from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.config.flat import from_flat
from upstep_fast.data.sources.source import open_source
from upstep_fast.evaluation import features
from upstep_fast.report.run_record import read_config, read_record
from upstep_fast.runtime import distributed
from upstep_fast.runtime.device import resolve

RUNNER = Path(__file__).with_name("rank_runner.py")
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--nnodes=1",
    "--rdzv-backend=c10d",
    "--rdzv-endpoint=localhost:0",
]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
CLOCK = ("images_per_s", "data_wait", "forward_s", "backward_s", "other_s", "comm_bytes", "comm_share")


def rows(out):
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def exact(out):
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows(out)]


def state(out):
    newest = sorted((Path(out) / "checkpoints").glob("step-*"))[-1]
    manifest = json.loads((newest / "manifest.json").read_text())
    return load_file(newest / "state.safetensors"), manifest


def same_state(one, two):
    (a, x), (b, y) = state(one), state(two)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert x["state"] == y["state"] and x["step"] == y["step"]


def close(one, two, tolerance=1e-5):
    """Compare two runs: equal decisions; losses, centers and weights within `tolerance`."""
    a, b = rows(one), rows(two)
    assert [row["open"] for row in a] == [row["open"] for row in b]
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for x, y in zip(a, b, strict=True):
        assert x["center"] == pytest.approx(y["center"], abs=tolerance)
        assert x["loss"] is None or x["loss"] == pytest.approx(y["loss"], abs=tolerance)
    x, y = state(one)[0], state(two)[0]
    assert x.keys() == y.keys()
    worst = {n: (x[n].double() - y[n].double()).abs().max().item() for n in x if n.startswith("method.")}
    assert max(worst.values()) <= tolerance, worst


@pytest.fixture(scope="module")
def base(short_run, model, photos):
    more = dict(checkpoint_every=100, memory_check=False, report_images=False, debug=True)
    return short_run | dict(model=model, data=str(photos)) | more


FORMS = {
    "views": {"gate": "views", "layout": "symmetric"},
    "one-sided": {"gate": "prev", "layout": "asymmetric", "prototype_init": "learned", "head": "linear"},
    "start": {"prototype_init": "kmeans", "cvr": "anchor", "gate": "alternate"},
    "hinge": {"cvr": "hinge", "lora_targets": ("q", "v", "proj", "fc1", "fc2"), "clip": 0.01},
    "average": {"adapter_ema": 0.9},
    "queue": {"queue": 13, "base_targets": 0.9},
    "queue, one-sided": {"queue": 12, "base_targets": 0.5, "layout": "asymmetric"},
    "loss": {"gate_statistic": "loss", "gate": "prev", "queue": 12},
    "features, local": {"cvr": "sq", "cvr_on": "features", "local_views": 2},
    "disagreement": {"gate_statistic": "disagreement", "update_when": "high"},
    "vicreg": {"objective": "vicreg", "gate": "ema", "cvr": "sq", "lr": 1e-3},
    "diet": {"method": "diet", "gate": "ema", "lr": 1e-2},
}


def changed(base, changes):
    """The options of a form; vicreg has no prototypes to choose, diet no head either."""
    missing = ("prototypes",) if "objective" in changes else ()
    missing = ("prototypes", "head_hidden", "head_dim") if "method" in changes else missing
    return {k: v for k, v in base.items() if k not in missing} | changes


def twelve_bits(folder):
    """A folder of PNGs of 16 bits with values of 12."""
    folder.mkdir()
    for i, image in enumerate(np.random.default_rng(0).integers(300, 4000, (16, 40, 40)).astype(np.uint16)):
        Image.fromarray(image).save(folder / f"{i:02}.png")
    return folder


def jobs(base, folder):
    """The runs of the launch, in order."""

    def adapt(name, fault=None, out=None, **changes):
        options = changed(base, changes) | {"out": str(folder / (out or name))}
        return {"name": name, "call": "adapt", "options": options, "fault": fault}

    def signal_at(step, name="SIGTERM"):
        return {"rank": 1, "kind": "signal", "signal": name, "at": step}

    runs = [{"name": "collectives", "call": "collectives"}, adapt("fifty", steps=50)]
    runs += [adapt(name, **form) for name, form in FORMS.items()]
    runs += [
        adapt("sharded", shard_weights=True),
        adapt("waits", accumulate=3, steps=9, gate="none"),
        adapt("stopped", signal_at(3), accumulate=3, steps=9, gate="none"),
        adapt("resumed", out="stopped", accumulate=3, steps=9, gate="none", resume=True),
        adapt("saves", signal_at(1, "SIGUSR1")),
        adapt("nan", {"rank": 1, "kind": "nan", "at": 2}, gate="none"),
        adapt("forward", {"rank": 1, "kind": "forward memory", "at": 2}, gate="none", auto_batch=True),
        adapt("backward", {"rank": 0, "kind": "backward memory", "at": 2}, gate="none", auto_batch=True),
        adapt("no-memory", {"rank": 1, "kind": "backward memory", "at": 2}, gate="none"),
        adapt("gate", {"rank": 1, "kind": "gate", "at": 2}, gate="ema"),
        adapt("odd", batch_size=9),
        adapt("verified", verify_resume=2, checkpoint_every=2),
        {**adapt("differs"), "per_rank": {"lr": [1e-3, 2e-3]}},
        adapt("twelve bits", data=str(twelve_bits(folder / "deep"))),
    ]
    embed = {k: base[k] for k in ("model", "data", "precision", "device", "num_workers")} | {"out": "x.npy"}
    fewer, weights = folder / "fewer", folder / "weights"
    shutil.copytree(base["data"], fewer)
    next(fewer.iterdir()).unlink()
    shutil.copytree(base["model"].removeprefix("local-dir:"), weights)
    state = load_file(weights / "model.safetensors")
    save_file(state | {"norm.bias": state["norm.bias"] + 1}, weights / "model.safetensors")
    for name, key, other in (
        ("embed data", "data", str(fewer)),
        ("embed model", "model", f"local-dir:{weights}"),
        ("embed mean", "mean", (0.4,) * 3),
    ):
        mine = base.get(key, (0.5,) * 3)
        options = embed | {"out": str(folder / f"{key}.npy")}
        runs.append({"name": name, "call": "embed", "options": options, "per_rank": {key: [mine, other]}})
    shards = embed | {"out": str(folder / "features/"), "batch_size": 2, "shard_size": 5, "with_base": True}
    runs += [{"name": name, "call": "embed", "options": shards} for name in ("embed folder", "embed folder again")]
    broken = Path(shutil.copytree(base["data"], folder / "broken"))
    (broken / "03.png").write_bytes(b"no image")
    tokens = {"data": str(broken), "out": str(folder / "tokens.zarr"), "tokens": True, "max_bad_fraction": 0.1}
    runs.append({"name": "tokens", "call": "embed", "options": embed | tokens | {"batch_size": 5}})
    runs.append({"name": "extract", "call": "extract", "options": embed | {"batch_size": 5}})
    return runs


@pytest.fixture(scope="module")
def ranks(base, tmp_path_factory):
    """The folder in which the launch left its runs."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "job.json").write_text(json.dumps(jobs(base, folder)))
    done = subprocess.run(
        [*TORCHRUN, "--nproc-per-node=2", str(RUNNER), str(folder / "job.json")],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=280,
    )
    (folder / "stderr").write_text(done.stderr)
    if not (folder / "extract.rank1.json").exists():
        pytest.fail(done.stderr[-4000:])
    return folder


def outcome(ranks, name):
    """What each rank said of a run."""
    return [json.loads((ranks / f"{name}.rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture
def alone(base, tmp_path):
    """Runs in this process, with the same global batch."""

    def run(**changes):
        out = tmp_path / "alone"
        upstep_fast.adapt(**changed(base, changes) | {"out": str(out)})
        return out

    return run


def test_collectives(ranks):
    first, second = (found["result"] for found in outcome(ranks, "collectives"))
    assert first["size"] == 2 and first["sum"] == [1.0, 3.0, 5.0, 7.0] and first["max"] == [1, 0]
    assert first["rows"] == [[[0, 0], [1, 1]]] * 2
    assert first["json"] == [{"rank": 0, "name": "ä"}, {"rank": 1, "name": "ää"}]
    assert first["numbers"] == [0.5, 1.0] and first["grad"] == [[[0.5] * 3] * 2, None]
    assert second == first


def test_nccl_raises_on_a_timeout_instead_of_aborting(monkeypatch):
    class StartedError(Exception):
        pass

    def init(backend, **_):
        raise StartedError(backend, os.environ.get("TORCH_NCCL_BLOCKING_WAIT"))

    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT", raising=False)
    monkeypatch.setattr(distributed, "launched", lambda: True)
    monkeypatch.setattr(distributed, "rendezvous", lambda *_, **__: iter([(torch.distributed.HashStore(), 0, 1)]))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    with pytest.raises(StartedError) as started, distributed.joined(torch.device("cuda", 0)):
        pass
    assert started.value.args == ("cpu:gloo,cuda:nccl", "1")
    monkeypatch.delenv("TORCH_NCCL_BLOCKING_WAIT")


def test_alone_every_collective_gives_its_input_back():
    x = torch.arange(3.0)
    assert distributed.reduce(x) is x and distributed.gather_rows(x) is x and distributed.gather([1]) == [[1]]
    assert distributed.reducer() is None and distributed.traffic(1.0) == {}
    assert (distributed.rank(), distributed.size(), distributed.is_first()) == (0, 1, True)
    p = torch.nn.Parameter(x)
    p.grad = torch.ones(3)
    assert distributed.average_gradients([p], torch.tensor([2.0])).tolist() == [2.0] and p.grad.sum() == 3
    distributed.agree_on({"a": 1})
    distributed.check_same("x", [1.0])


def test_fifty_steps_of_two_ranks_are_those_of_one(ranks, alone):
    one = alone(steps=50)
    opened = [row["open"] for row in rows(one)]
    assert 0 < sum(opened) < 50
    close(ranks / "fifty", one)


@pytest.mark.parametrize("name", FORMS)
def test_every_form_is_the_same_on_two_ranks(ranks, alone, name):
    close(ranks / name, alone(**FORMS[name]))


def test_both_ranks_measure_the_intensity_that_one_process_measures(ranks, alone):
    """Percentiles 0.5 and 99.5 of all values."""
    measured = [
        [line for line in found["lines"] if "intensity: values" in line] for found in outcome(ranks, "twelve bits")
    ]
    assert len(measured[0]) == 1 and measured[0] == measured[1]
    values = np.stack([np.asarray(Image.open(path)) for path in sorted((ranks / "deep").iterdir())])
    kept = tomllib.loads((ranks / "twelve bits" / "config.toml").read_text())["data"]["intensity"]
    low, high = map(float, kept.removeprefix("auto:").split(","))
    assert (low, high) == pytest.approx(np.percentile(values.astype(np.float64), (0.5, 99.5)), rel=1e-3)
    close(ranks / "twelve bits", alone(data=str(ranks / "deep")))


def test_only_rank_0_writes_and_the_result_is_the_same_on_both(ranks):
    first, second = outcome(ranks, "fifty")
    assert first["result"] == second["result"]
    out = ranks / "fifty"
    assert {"adapter", "checkpoints", "config.toml", "metrics.jsonl", "report.html"} <= {p.name for p in out.iterdir()}
    assert not list(out.rglob("*.tmp-*")) and len(rows(out)) == 50


def test_communication_is_counted(ranks):
    found = rows(ranks / "fifty")[2:]  # what is agreed on at the start counts as the first steps'
    trained = sum(t.numel() for n, t in state(ranks / "fifty")[0].items() if n.endswith("exp_avg"))
    # the center: two views of width 16, a count, two requests, memory; a debug run also compares the decision
    closed = {row["comm_bytes"] for row in found if not row["open"]}
    opened = {row["comm_bytes"] for row in found if row["open"]}
    center, check = 4 * (2 * 16 + 1 + 3), 2 * 8 * 4
    assert closed == {center + check}
    sinkhorn = 2 * 4 * 8 * (1 + 3)  # a peak and three sums of 8 prototypes a view
    assert opened == {center + check + sinkhorn + 4 * (trained + 2)}
    assert all(0 < row["comm_share"] < 1 for row in found)


def test_frozen_weights_spread_over_the_ranks_give_the_plain_model(ranks, alone):
    close(ranks / "sharded", alone(implementation="reference"))


def test_a_stop_on_any_rank_stops_all_and_the_resumed_run_is_the_unbroken_one(ranks, record_property):
    for found in outcome(ranks, "stopped"):
        assert found["error"] == "Interrupted" and found["code"] == 75
        # the wish of rank 1 at the end of step 4 is known to all at the end of step 5
        assert "after 5 of 9 steps" in found["text"]
    assert [found["result"] for found in outcome(ranks, "resumed")] == [f["result"] for f in outcome(ranks, "waits")]
    assert exact(ranks / "stopped") == exact(ranks / "waits")
    same_state(ranks / "stopped", ranks / "waits")
    record_property("exact_resumes_ranks", 1)


def test_a_save_requested_on_any_rank_is_made_and_the_run_continues(ranks):
    assert "result" in outcome(ranks, "saves")[0]
    assert (ranks / "saves" / "checkpoints" / "step-00000003").is_dir()


def test_a_run_of_two_ranks_resumes_on_one_and_logs_what_is_not_exact(ranks, base, alone, caplog):
    shutil.rmtree(ranks / "saves" / "checkpoints" / "step-00000006")
    upstep_fast.adapt(**base | {"out": str(ranks / "saves"), "resume": True})
    close(ranks / "saves", alone())
    assert "not bit for bit the uninterrupted run: ranks was 2, is 1" in caplog.text


def test_a_step_that_is_not_finite_on_one_rank_is_applied_on_none(ranks, record_property):
    bad = [row["bad"] for row in rows(ranks / "nan")]
    assert bad == [None, None, "the loss is nan", None, None, None]
    counts = {
        t.item() for n, t in state(ranks / "nan")[0].items() if n.startswith("optimizer.") and n.endswith(".step")
    }
    assert counts == {5.0}
    record_property("rank_faults", 1)


@pytest.mark.parametrize("name", ["forward", "backward"])
def test_out_of_memory_on_one_rank_halves_micro_batches_on_all(ranks, alone, name, record_property):
    first, second = outcome(ranks, name)
    assert first["result"] == second["result"]
    for found in (first, second):
        assert any(
            "step 2: out of memory; from now on each step runs in 2 micro-batches" in line for line in found["lines"]
        )
    assert state(ranks / name)[1]["state"]["passes"] == 2
    close(ranks / name, alone(gate="none"))
    record_property("rank_faults", 1)


def test_out_of_memory_says_what_to_do(ranks, record_property):
    for found in outcome(ranks, "no-memory"):
        assert found["error"] == "RunFailedError"
        for words in ("step 2", "8 images of 32 x 32 over 2 ranks", "--memory fast", "--auto-batch", "in part"):
            assert words in found["text"]
    assert len(rows(ranks / "no-memory")) == 2
    record_property("rank_faults", 1)


def test_a_gate_decision_that_differs_is_detected_in_debug_mode(ranks, record_property):
    for found in outcome(ranks, "gate"):
        assert found["error"] == "RunFailedError" and "step 2: the gate's decision" in found["text"]
        assert "[0.0, " in found["text"] and "[1.0, " in found["text"]
    record_property("rank_faults", 1)


def test_a_batch_that_does_not_divide_is_refused(ranks):
    for found in outcome(ranks, "odd"):
        assert found["error"] == "ConfigError" and "9 images do not divide over 2 ranks" in found["text"]


def test_repeated_steps_on_two_ranks_are_the_same(ranks):
    assert any("2 steps repeated" in line for line in outcome(ranks, "verified")[0]["lines"])


def test_a_rank_with_another_configuration_is_refused(ranks, record_property):
    for found in outcome(ranks, "differs"):
        assert found["error"] == "ConfigError"
        assert "rank 1 differs from rank 0: config.lr is 0.002, rank 0 has 0.001" in found["text"]
    record_property("rank_faults", 1)


@pytest.mark.parametrize(
    ("name", "differs"), [("data", "data.images"), ("model", "model.sha256"), ("mean", "config.mean")]
)
def test_embed_refuses_ranks_that_differ(ranks, name, differs):
    for found in outcome(ranks, f"embed {name}"):
        assert found["error"] == "ConfigError" and f"rank 1 differs from rank 0: {differs}" in found["text"]
    assert not (ranks / f"{name}.npy").exists()


def test_features_are_those_of_one_process(ranks, base):
    config = from_flat(
        EmbedConfig, model=base["model"], data=(base["data"],), out="x.npy", device="cpu", precision="fp32"
    )
    x, read = features.extract(
        open_source(config.data.paths), features.load_models(config), config, resolve("cpu", "fp32")
    )
    for rank in (0, 1):
        found = torch.load(ranks / f"extract.rank{rank}.pt", weights_only=True)
        assert found["read"] == read
        torch.testing.assert_close(found["x"], x["base"], atol=1e-6, rtol=0)


def flags(options):
    """The command line of `options`."""
    found = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        found += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", str(value)]
    return found


def launch(tmp_path, job, *arguments, ranks=2):
    """A command under torchrun; returns the finished process and the time at which it ended."""
    (tmp_path / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [*TORCHRUN, f"--nproc-per-node={ranks}", *arguments, str(RUNNER), str(tmp_path / "job.json")],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=240,
    )
    return done, time.time()


# what the line must say; the slowest wait is --rank-timeout, a look at who lives, and torchrun's own half minute
CAUSES = {
    "killed": "no heartbeat from rank 1",
    "exits": "no heartbeat from rank 1",
    "stopped": "no heartbeat from rank 1",
    "sleeps": "rank 1 did not reach the collective in which the others wait",
    "raises": "(rank 1): RuntimeError: planted",
}


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("kind", CAUSES)
def test_when_a_rank_ends_all_end_within_a_minute_and_say_why(base, tmp_path, record_property, kind, count):
    options = base | {"steps": 100_000, "out": str(tmp_path / "out"), "debug": False, "checkpoint_every": 2}
    fault = {"rank": 1, "kind": kind, "at": 5, "note": str(tmp_path / "when")}
    done, ended = launch(tmp_path, {"command": ["adapt", *flags(options)], "fault": fault}, ranks=count)
    seconds = ended - float((tmp_path / "when").read_text())
    said = [line for line in done.stderr.splitlines() if line.startswith("upstep-fast")]
    assert done.returncode != 0 and CAUSES[kind] in said[0], done.stderr[-3000:]
    assert len(said) == 1  # by one rank, the first cause alone
    assert seconds < 60
    assert len(rows(tmp_path / "out")) == 5 and state(tmp_path / "out")[1]["step"] == 4
    log = (tmp_path / "out" / "train.log").read_text()
    assert CAUSES[kind].removeprefix("(rank 1): ") in log
    record_property("rank_faults", 1)
    record_property("rank_fault_seconds_max", seconds)


def shards_of(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if not path.name.startswith(".")}


def test_ranks_share_the_shards_of_a_folder(base, ranks, tmp_path):
    """24 images in shards of 5: three for rank 0, two for rank 1; one process gives every bit of them."""
    options = {k: base[k] for k in ("model", "data", "precision", "device", "num_workers")}
    upstep_fast.embed(**options, out=tmp_path / "one", batch_size=2, shard_size=5, with_base=True)
    for name in ("embed folder", "embed folder again"):
        assert all("error" not in found for found in outcome(ranks, name))
    assert shards_of(ranks / "features") == shards_of(tmp_path / "one") and len(shards_of(tmp_path / "one")) == 6


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_folder_is_completed_after_a_rank_was_killed(base, tmp_path, rank):
    options = {k: base[k] for k in ("model", "data", "precision", "device", "num_workers")}
    options |= {"out": f"{tmp_path}/f/", "batch_size": 2, "shard_size": 3}
    fault = {"rank": rank, "kind": "killed", "at": 3, "in": "features", "note": str(tmp_path / "when")}
    done, _ = launch(tmp_path, {"command": ["embed", *flags(options)], "fault": fault})
    assert done.returncode != 0 and 0 < len(shards_of(tmp_path / "f")) < 9
    done, _ = launch(tmp_path, {"command": ["embed", *flags(options)]})
    assert done.returncode == 0, done.stderr[-3000:]
    upstep_fast.embed(**options | {"out": tmp_path / "one"})
    assert shards_of(tmp_path / "f") == shards_of(tmp_path / "one") and len(shards_of(tmp_path / "f")) == 9


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("kind", ["killed", "stopped", "raises"])
def test_when_a_rank_of_embed_ends_all_end_within_a_minute_and_say_why(base, tmp_path, kind):
    options = {k: base[k] for k in ("model", "data", "precision", "device", "num_workers")}
    options |= {"out": str(tmp_path / "f.npy"), "batch_size": 4}
    fault = {"rank": 1, "kind": kind, "at": 1, "in": "features", "note": str(tmp_path / "when")}
    done, ended = launch(tmp_path, {"command": ["embed", *flags(options)], "fault": fault})
    said = [line for line in done.stderr.splitlines() if line.startswith("upstep-fast")]
    if kind == "killed":  # torchrun sees that at once, says so, and ends the others, which wait for nobody
        assert "exitcode  : -9" in done.stderr
    else:
        assert len(said) == 1 and CAUSES[kind] in said[0], done.stderr[-3000:]
    assert (
        done.returncode != 0 and "--resume" not in done.stderr and ended - float((tmp_path / "when").read_text()) < 60
    )
    assert not list(tmp_path.glob("*f.npy"))


@pytest.mark.long
@pytest.mark.timeout(300)
def test_torchrun_restarts_the_ranks_and_the_run_resumes_exactly(base, tmp_path, record_property):
    options = base | {"steps": 12, "debug": False, "checkpoint_every": 3, "resume": True}
    command = ["adapt", *flags(options | {"out": str(tmp_path / "out")})]
    fault = {"rank": 0, "kind": "killed", "at": 8, "note": str(tmp_path / "when")}
    done, _ = launch(tmp_path, {"command": command, "fault": fault}, "--max-restarts=2")
    assert done.returncode == 0, done.stderr[-3000:]
    whole = ["adapt", *flags(options | {"out": str(tmp_path / "whole")})]
    assert launch(tmp_path, {"command": whole})[0].returncode == 0
    assert exact(tmp_path / "out") == exact(tmp_path / "whole")
    same_state(tmp_path / "out", tmp_path / "whole")
    assert not list((tmp_path / "out").rglob("*.tmp-*")) and not (tmp_path / "out" / "run.lock").exists()
    record_property("rank_faults", 1)
    record_property("exact_resumes_ranks", 1)


@pytest.mark.long
@pytest.mark.timeout(300)
def test_ranks_that_differ_refuse_to_start(base, tmp_path, record_property):
    options = base | {"out": str(tmp_path / "out"), "debug": False}
    other = [[], ["--lr", "0.002"], [], []]
    done, _ = launch(tmp_path, {"command": ["adapt", *flags(options)], "per_rank": other}, ranks=4)
    said = [line for line in done.stderr.splitlines() if line.startswith("upstep-fast")]
    assert done.returncode != 0 and len(said) == 1
    assert "rank 1 differs from rank 0: config.lr is 0.002, rank 0 has 0.001" in said[0]
    record_property("rank_faults", 1)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_to_one_of_four_ranks_ends_all_with_75(base, tmp_path, record_property, number):
    options = base | {"out": str(tmp_path / "out"), "steps": 100_000, "debug": False}
    fault = {"rank": 3, "kind": "signal", "signal": number, "at": 5}
    done, _ = launch(tmp_path, {"command": ["adapt", *flags(options)], "fault": fault}, ranks=4)
    assert done.stderr.count("exitcode  : 75") == 4, done.stderr[-3000:]
    assert sum(line.startswith("upstep-fast") for line in done.stderr.splitlines()) == 1
    assert state(tmp_path / "out")[1]["step"] == len(rows(tmp_path / "out")) == 7
    record_property("rank_faults", 1)


def test_ctrl_c_during_the_verdict_ends_all_ranks_at_once(base, tmp_path):
    options = base | {"out": str(tmp_path / "out"), "steps": 2, "debug": False}
    fault = {"rank": "all", "kind": "signal", "signal": "SIGINT", "in": "verdict"}
    done, _ = launch(tmp_path, {"command": ["adapt", *flags(options)], "fault": fault})
    assert done.stderr.count("exitcode  : 75") == 2, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("upstep-fast")]
    assert len(said) == 1 and "stopped after all 2 steps, before the verdict; the adapter is written" in said[0]
    assert not (tmp_path / "out" / "run.lock").exists()
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_budget_is_the_first_ranks_clock(base, tmp_path):
    out = tmp_path / "out"
    options = {k: v for k, v in base.items() if k != "steps"} | {"out": str(out), "debug": False}
    options |= {"budget": "60s", "verdict": "off", "whitening": "off"}
    # by the second rank's clock half as many steps fit, and it would try fewer blocks
    done, _ = launch(tmp_path, {"command": ["adapt", *flags(options)], "clocks": [1.0, 2.0]})
    assert done.returncode == 0, done.stderr[-3000:]
    planned = read_config(out)["steps"]
    assert 80 <= planned <= 120 and "lora_blocks" not in read_config(out)  # a measured step is half a second
    taken = len((out / "metrics.jsonl").read_text().splitlines())
    assert 45 <= taken <= 60  # one of the run is a whole one
    assert read_record(out).steps == taken
    assert "finished" in (out / "report.html").read_text() and "not finished" not in (out / "report.html").read_text()


@pytest.mark.long
@pytest.mark.timeout(300)
def test_four_ranks_are_one_and_spread_weights_too(base, alone, tmp_path):
    for name, changes in {"plain": {}, "sharded": {"shard_weights": True}}.items():
        options = base | {"steps": 20, "out": str(tmp_path / name)} | changes
        done, _ = launch(tmp_path, {"command": ["adapt", *flags(options)]}, ranks=4)
        assert done.returncode == 0, done.stderr[-3000:]
        close(tmp_path / name, alone(steps=20, overwrite=True))


@pytest.mark.long
@pytest.mark.timeout(300)
def test_eval_over_ranks_gives_the_figures_of_one(base, photos, tmp_path):
    for split in ("train", "test"):
        for at, path in enumerate(sorted(photos.iterdir())[split == "test" :: 2]):
            target = tmp_path / "labeled" / split / "ab"[at % 2] / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    common = {"model": base["model"], "data": str(tmp_path / "labeled"), "device": "cpu", "precision": "fp32"}
    options = common | {"json": str(tmp_path / "ranks.json"), "k": 3, "measures": "all"}
    done, _ = launch(tmp_path, {"command": ["eval", *flags(options)]}, ranks=4)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "ranks.json").read_text())
    alone = upstep_fast.evaluate(**common, k=3, measures=("all",))
    assert found["base"]["knn"] == alone["base"]["knn"] and found["n_test"] == alone["n_test"]
    assert found["per_class"] and found["base"].keys() == alone["base"].keys()
    for name in ("recall_at_1", "map", "map_at_r", "few_shot_5", "nmi"):
        assert found["base"][name] == pytest.approx(alone["base"][name])
    assert found["base"]["linear"] == pytest.approx(alone["base"]["linear"], abs=100 / 12 + 1e-6)


def test_two_ranks_write_the_tokens_of_one(ranks, base):
    """An unreadable image of the first rank leaves no gap; 24 images are two chunks."""
    tokens = pytest.importorskip("upstep_fast.evaluation.dense.token_files")
    pytest.importorskip("zarr")
    table = tokens.read_tokens(ranks / "tokens.zarr")
    assert [Path(name).name for name in table.names] == [f"{i:02}.png" for i in range(24) if i != 3]
    expected = upstep_fast.load(base["model"], precision="fp32", device="cpu").tokens(list(table.names[:3]))
    np.testing.assert_allclose(table.rows(0, 3), expected, atol=2e-6)
    last = upstep_fast.load(base["model"], precision="fp32", device="cpu").tokens(list(table.names[-3:]))
    np.testing.assert_allclose(table.rows(20, 23), last, atol=2e-6)
    assert outcome(ranks, "tokens")[0]["result"] == outcome(ranks, "tokens")[1]["result"]
