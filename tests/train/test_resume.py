"""Exact resume: a run that is stopped or killed and goes on is, bit for bit, the run that was never stopped."""

import hashlib
import itertools
import json
import math
import os
import shutil
import signal

import pytest
import timm
import torch
from adapt_configs import upstep_config
from photos import save_photos
from safetensors.torch import load, save
from tally import tally

import upstep_fast
from upstep_fast.data.loading.loader import permutation
from upstep_fast.errors import ConfigError, Interrupted, RunFailedError
from upstep_fast.methods.upstep.upstep import UpStep
from upstep_fast.model import peft_format
from upstep_fast.runtime import checkpoint
from upstep_fast.train import identity, resume
from upstep_fast.train import loop as trainer
from upstep_fast.train.state import fresh_state

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)


def make_model(folder, seed=0, **changes):
    torch.manual_seed(seed)
    args = SMALL | changes
    vit = timm.create_model("vit_tiny_patch16_224", **args)
    timm.models.save_for_hf(vit, folder, model_args=args, safe_serialization=True)
    return f"local-dir:{folder}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """24 images, the third of them broken: what replaces it must be the same after a resume."""
    folder = save_photos(tmp_path_factory.mktemp("photos"), 24)
    (folder / "02.png").write_bytes((folder / "02.png").read_bytes()[:100])
    return folder


@pytest.fixture
def options(options):
    return options | dict(steps=12, max_bad_fraction=0.1, checkpoint_every=5)


@pytest.fixture
def finished(options, tmp_path, tmp_path_factory, _runs={}):  # noqa: B006  (one run for all tests that only look at it)
    """The options of a run that has ended, and its folder."""
    key = options["model"]
    if key not in _runs:
        _runs[key] = tmp_path_factory.mktemp("finished") / "out"
        upstep_fast.adapt(**{**options, "out": _runs[key]})
    shutil.copytree(_runs[key], tmp_path / "out")
    return options


def stop_after(monkeypatch, step):
    """A SIGTERM in a step, counted over all runs since. Every step calls `schedule`, skipped ones too."""
    real, count = UpStep.schedule, iter(range(1, 10**6))

    def schedule(self, optimizer, index):
        if next(count) == step:
            signal.raise_signal(signal.SIGTERM)
        real(self, optimizer, index)

    monkeypatch.setattr(UpStep, "schedule", schedule)


def evidence(out):
    """All that must agree: every tensor's SHA-256, the state's numbers, and the metrics but for the clock's."""
    path = sorted((out / "checkpoints").glob("step-*"))[-1]
    manifest = json.loads((path / "manifest.json").read_text())
    tensors = {
        name: (str(t.dtype), tuple(t.shape), hashlib.sha256(t.numpy().tobytes()).hexdigest())
        for name, t in load((path / "state.safetensors").read_bytes()).items()
    }
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    exact = [{k: v.hex() if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    for row in exact:
        for name in ("images_per_s", "data_wait", "forward_s", "backward_s", "other_s"):
            del row[name]
    adapter = hashlib.sha256((out / "adapter" / peft_format.WEIGHTS).read_bytes()).hexdigest()
    skipped = (out / "skipped.csv").read_text()
    return path.name, tensors, manifest["state"], manifest["loader"], exact, adapter, skipped


def interrupted(options, monkeypatch, step):
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        with pytest.raises(Interrupted, match=rf"after {step} of {options['steps']} steps.*--resume"):
            upstep_fast.adapt(**options)


GATES = [{"gate": rule} for rule in ("none", "ema", "median", "quantile", "views", "random", "alternate")]
FORMS = [
    {"layout": "asymmetric", "gate": "prev"},
    {"prototype_init": "learned", "head": "linear", "weight_decay": 0.1},
    {"prototype_init": "kmeans", "cvr": "anchor", "head": "none"},
    {"cvr": "hinge", "lora_targets": ("q", "v", "proj", "fc1", "fc2")},
    {"cvr": "ema", "precision": "bf16", "num_workers": 2},
    {"adapter_ema": 0.9},
    {"queue": 12, "base_targets": 0.9},
    {"queue": 20, "layout": "asymmetric", "base_targets": 0.5},
    {"gate_statistic": "loss"},
    {"gate_statistic": "disagreement", "gate": "quantile", "update_when": "high"},
    {"tune": "full", "cvr": "sq", "lora_r": 8},
    {"lora_blocks": 1},
    {"local_views": 2, "gate": "alternate", "cvr_on": "features"},
    {"objective": "vicreg", "gate": "ema"},
    {"objective": "vicreg", "layout": "asymmetric", "gate": "random"},
    {"objective": "vicreg", "lora_blocks": 1, "view_uses": 4},
    {"objective": "vicreg", "lora_blocks": 1, "view_uses": 2, "precision": "bf16", "num_workers": 2},
    {"method": "diet", "gate": "ema"},
    {"method": "diet", "gate": "random", "layout": "asymmetric"},
]


@pytest.mark.parametrize("extra", GATES + FORMS, ids=lambda e: "-".join(map(str, e.values())))
def test_a_resumed_run_equals_the_uninterrupted_one(options, monkeypatch, tmp_path, extra, record_property):
    options |= extra
    if extra.get("objective") == "vicreg":
        del options["prototypes"]
    if extra.get("method") == "diet":
        options = {
            name: value for name, value in options.items() if name not in ("prototypes", "head_hidden", "head_dim")
        }
    torch.manual_seed(1)
    upstep_fast.adapt(**{**options, "out": tmp_path / "whole"})
    interrupted(options, monkeypatch, step=7)
    torch.manual_seed(2)  # the global generator must have no say
    upstep_fast.adapt(**options, resume=True)
    assert evidence(tmp_path / "out") == evidence(tmp_path / "whole")
    # more than the mere start must have been compared: weights that moved, and both kinds of moments
    _, tensors, *_ = evidence(tmp_path / "whole")
    assert any(name.startswith("optimizer.") and name.endswith("exp_avg_sq") for name in tensors)
    record_property("exact_resumes", 1)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("extra", [{"gate": "ema"}, {"gate": "random", "layout": "asymmetric"}], ids=["ema", "random"])
def test_a_resumed_run_on_a_gpu_equals_the_uninterrupted_one(
    options, monkeypatch, tmp_path, precision, extra, record_property
):
    options |= extra | {"device": "cuda", "precision": precision, "steps": 40}
    upstep_fast.adapt(**{**options, "out": tmp_path / "whole"})
    interrupted(options, monkeypatch, step=17)
    upstep_fast.adapt(**options, resume=True)
    assert evidence(tmp_path / "out") == evidence(tmp_path / "whole")
    record_property("exact_resumes_gpu", 1)


def test_forty_steps_with_four_stops(options, monkeypatch, tmp_path, record_property):
    options |= {"steps": 40}
    upstep_fast.adapt(**{**options, "out": tmp_path / "whole"})
    for at, stop in enumerate((3, 10, 17, 5)):  # steps of each part: it is stopped after 3, 13, 30, 35
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            with pytest.raises(Interrupted):
                upstep_fast.adapt(**options, resume=at > 0)
    upstep_fast.adapt(**options, resume=True)
    assert evidence(tmp_path / "out") == evidence(tmp_path / "whole")
    assert len(evidence(tmp_path / "out")[4]) == 40
    record_property("exact_resumes", 4)


def test_a_resume_from_an_older_checkpoint_cuts_the_metrics_and_runs_the_same_steps_again(finished, tmp_path):
    before = evidence(tmp_path / "out")
    out = tmp_path / "out"
    # as a kill after step 11 leaves it: a checkpoint of step 10, rows beyond it, half a row at the end
    shutil.rmtree(out / "checkpoints" / "step-00000012")
    lines = (out / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (out / "metrics.jsonl").write_bytes(b"".join(lines[:11]) + lines[11][:30])
    upstep_fast.adapt(**finished, resume=True)
    assert evidence(out) == before


def test_what_a_checkpoint_holds(finished, tmp_path):
    folder = tmp_path / "out" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step-00000010", "step-00000012"]
    assert (folder / "latest").read_text() == "step-00000012\n"
    found = checkpoint.newest(folder)
    assert found.step == 12 and found.manifest["loader"]["step"] == 12
    assert found.manifest["environment"]["torch"] == torch.__version__
    assert {row["op"] for row in found.manifest["kernels"]} >= {"sinkhorn"}
    names = set(load(found.files["state.safetensors"]))
    for name in ("prototypes", "running_centre", "running_magnitude", "seen", "head.0.weight"):
        assert f"method.{name}" in names
    assert {"method.vit.blocks.1.attn.qkv.lora_b", "optimizer.vit.blocks.1.attn.qkv.lora_b.exp_avg"} <= names
    assert not any(".base." in name for name in names), "frozen weights have no place in a checkpoint"


def test_a_checkpoint_is_an_adapter(finished, tmp_path):
    peft = pytest.importorskip("peft")
    step = tmp_path / "out" / "checkpoints" / "step-00000012"
    ours = upstep_fast.load_adapted(finished["model"], step)
    vit = timm.create_model(finished["model"], pretrained=True).eval()
    theirs = peft.PeftModel.from_pretrained(vit, str(step)).merge_and_unload()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(theirs.forward_features(x), ours.forward_features(x), atol=1e-5)


def test_bad_images_met_before_the_stop_still_count(options, monkeypatch, tmp_path):
    # the broken image in the first batch, and not in the one that the check after the last step looks at
    seed = next(s for s in range(100) if 2 in permutation(24, s, 0)[:8] and 2 not in permutation(24, s, 1)[:8])
    options |= {"seed": seed, "steps": 3, "gate": "none"}
    interrupted(options, monkeypatch, step=1)
    upstep_fast.adapt(**options, resume=True)
    assert "02.png" in (tmp_path / "out" / "skipped.csv").read_text()


def test_a_finished_run_is_not_run_again(options, tmp_path):
    first = upstep_fast.adapt(**options)
    before = evidence(tmp_path / "out")
    again = upstep_fast.adapt(**options, resume=True)
    assert evidence(tmp_path / "out") == before
    assert (again.steps, again.opened, again.loss) == (first.steps, first.opened, first.loss)


def test_without_a_checkpoint_a_resume_starts_afresh_and_says_so(options, tmp_path, caplog):
    with caplog.at_level("WARNING", logger="upstep_fast"):
        upstep_fast.adapt(**options, resume=True)
    assert "no checkpoint" in caplog.text and "starting from the beginning" in caplog.text
    upstep_fast.adapt(**{**options, "out": tmp_path / "plain"})
    assert evidence(tmp_path / "out") == evidence(tmp_path / "plain")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"lr": 0.5}, "lr was 0.001, is 0.5"),
        ({"steps": 13, "gate": "none"}, "steps was 12, is 13; gate was quantile, is none"),
        ({"seed": 1}, "seed was 0, is 1"),
        ({"lora_r": 4}, "lora_r was 2, is 4"),
        ({"lora_targets": ("q",)}, r"lora_targets was \['q', 'k', 'v'\], is \['q'\]"),
        ({"batch_size": 4}, "batch_size was 8, is 4"),
        ({"precision": "bf16"}, "precision was fp32, is bf16"),
    ],
)
def test_a_changed_configuration_is_refused_by_its_fields(finished, tmp_path, change, named):
    before = evidence(tmp_path / "out")
    with pytest.raises(ConfigError, match=named) as error:
        upstep_fast.adapt(**{**finished, **change}, resume=True)
    assert "\n" not in str(error.value) and error.value.exit_code == 2
    assert evidence(tmp_path / "out") == before


def forget(tmp_path, *names, **added):
    """Rewrites the newest manifest as if its configuration had no such fields, or others too."""
    path = tmp_path / "out" / "checkpoints" / "step-00000012"
    found = checkpoint.load(path)
    config = {k: v for k, v in found.manifest["config"].items() if k not in names} | added
    checkpoint.save(path.parent, 12, found.files, {**found.manifest, "config": config})


def test_a_field_newer_than_the_checkpoint_had_its_default(finished, tmp_path):
    forget(tmp_path, "clip", "lora_targets", "img_size", "lr")
    assert upstep_fast.adapt(**finished, resume=True).steps == 12
    for change, named in [({"clip": 0.5}, "clip was 1.0, is 0.5"), ({"lr": 0.5}, "lr was 0.001, is 0.5")]:
        with pytest.raises(ConfigError, match=named):
            upstep_fast.adapt(**{**finished, **change}, resume=True)


def test_a_field_that_there_is_no_more_is_refused(finished, tmp_path):
    forget(tmp_path, gone=3)
    with pytest.raises(ConfigError, match="gone was 3, is None"):
        upstep_fast.adapt(**finished, resume=True)


def test_what_may_change(options, tmp_path, monkeypatch):
    upstep_fast.adapt(**{**options, "out": tmp_path / "whole"})
    interrupted(options, monkeypatch, step=7)
    (tmp_path / "out").rename(tmp_path / "moved")
    change = {"out": tmp_path / "moved", "checkpoint_every": 3, "num_workers": 2, "log_every": 1, "debug": True}
    upstep_fast.adapt(**{**options, **change}, resume=True)
    whole, moved = evidence(tmp_path / "whole"), evidence(tmp_path / "moved")
    assert moved == whole


def test_another_model_is_refused(finished, tmp_path):
    other = make_model(tmp_path / "other", seed=1)
    with pytest.raises(ConfigError, match="made with another model"):
        upstep_fast.adapt(**{**finished, "model": other}, resume=True)


def test_a_copied_model_is_the_same_model(finished, tmp_path):
    same = make_model(tmp_path / "same", seed=0)
    upstep_fast.adapt(**{**finished, "model": same}, resume=True)


def test_other_images_are_refused(options, photos, tmp_path):
    for path in photos.iterdir():
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / path.name).write_bytes(path.read_bytes())
    options["data"] = tmp_path / "data"
    upstep_fast.adapt(**options)
    (tmp_path / "data" / "25.png").write_bytes((photos / "05.png").read_bytes())
    with pytest.raises(ConfigError, match=r"images are not those of .*24 then, 25 now"):
        upstep_fast.adapt(**options, resume=True)


def test_another_environment_resumes_and_logs_what_is_not_exact(options, tmp_path, monkeypatch, caplog):
    interrupted(options, monkeypatch, step=7)
    monkeypatch.setattr(identity, "__version__", "9.9")
    with caplog.at_level("WARNING", logger="upstep_fast"):
        upstep_fast.adapt(**options, resume=True)
    assert "not bit for bit" in caplog.text and "is 9.9" in caplog.text


def test_a_decoder_that_reads_other_pixels_is_named(options, monkeypatch, caplog):
    interrupted(options, monkeypatch, step=7)
    monkeypatch.setattr(identity, "decoder_fingerprint", lambda: "of another libjpeg")
    with caplog.at_level("WARNING", logger="upstep_fast"):
        upstep_fast.adapt(**options, resume=True)
    assert "not bit for bit" in caplog.text and "is of another libjpeg" in caplog.text


def test_instructions_of_another_processor_are_named(options, monkeypatch, caplog):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    interrupted(options, monkeypatch, step=7)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA")
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setattr(identity, "processor_name", lambda: "another")
    with caplog.at_level("WARNING", logger="upstep_fast"):
        upstep_fast.adapt(**options, resume=True)
    line = next(m for m in caplog.messages if "not bit for bit" in m)
    assert "is another" in line and "MKL_CBWR was None, is COMPATIBLE" in line
    assert "ONEDNN_MAX_CPU_ISA was AVX2, is None" in line


def test_resume_and_overwrite_exclude_one_another(options):
    with pytest.raises(ConfigError, match="resume and overwrite"):
        upstep_fast.adapt(**options, resume=True, overwrite=True)


def tamper(tmp_path, change):
    """A checkpoint whose hashes are right but whose contents are not what a run writes."""
    folder = tmp_path / "out" / "checkpoints"
    found = checkpoint.newest(folder)
    files, manifest = dict(found.files), {k: v for k, v in found.manifest.items() if k != "files"}
    change(files, manifest)
    checkpoint.save(folder, found.step, files, manifest, keep=1)


def without(name):
    def change(files, manifest):
        tensors = load(files["state.safetensors"])
        del tensors[name]
        files["state.safetensors"] = save(tensors)

    return change


def reshaped(name):
    def change(files, manifest):
        tensors = load(files["state.safetensors"])
        files["state.safetensors"] = save({**tensors, name: tensors[name][..., :1].contiguous()})

    return change


def said(*path_and_value):
    *path, last, value = path_and_value

    def change(files, manifest):
        for key in path:
            manifest = manifest[key]
        manifest[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        without("method.head.0.weight"),
        without("optimizer.head.0.weight.exp_avg"),
        without("received"),
        reshaped("method.prototypes"),
        reshaped("optimizer.vit.blocks.0.attn.qkv.lora_a.exp_avg_sq"),
        lambda files, manifest: files.update({"state.safetensors": b"\x80\x04cos\nsystem\n"}),
        lambda files, manifest: files.pop("state.safetensors"),
        lambda files, manifest: manifest.pop("state"),
        lambda files, manifest: manifest.pop("config"),
        said("state", "gate", {"step": "twelve"}),
        said("state", "gate", []),
        said("state", "gate", "step", 5),
        said("state", "loss", "low"),
        said("loader", "step", 7),
        said("loader", "skipped", ["a", "b"]),
        said("config", None),
        said("backbone", "none"),
        said("data", 3),
        said("pins", 3),
        said("state", "passes", 0),
        said("state", "passes", "2"),
        said("state", "accumulated", -1),
        said("state", "collapsed", 1e400),
        said("state", "bad", [1, 2, 3]),
        said("state", "scaler", {"scale": "x"}),
        said("state", "gate", "reference", "low"),
        said("state", "gate", "window", ["x"]),
        said("state", "gate", "window", [float("nan")]),
        said("state", "gate", "skips", -1),
        said("state", "gate", "opened", "all"),
        said("state", "gate", "spread", None),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_before_anything_is_changed(
    finished, tmp_path, monkeypatch, change, record_property
):
    tamper(tmp_path, change)
    states = []
    real = fresh_state
    monkeypatch.setattr(trainer, "fresh_state", lambda *a: states.append(real(*a)) or states[-1])
    with pytest.raises((ConfigError, RunFailedError), match="resume: ") as error:
        upstep_fast.adapt(**finished, resume=True)
    assert "\n" not in str(error.value) and len(str(error.value)) < 800
    assert states[0].step == 0 and not any(a.lora_b.any() for a in states[0].method.adapters.values())
    assert not states[0].optimizer.state and not states[0].skipped
    record_property("hostile_files", 1)
    tally("hostile files", "checkpoints", 1)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="the system has no SIGUSR1")
def test_sigusr1_saves_and_the_run_continues(options, monkeypatch, tmp_path):
    real, count = UpStep.update_running_stats, iter(range(1, 100))

    def remember(self, embedded):
        if next(count) == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        real(self, embedded)

    monkeypatch.setattr(UpStep, "update_running_stats", remember)
    saved = []
    real_save = resume.save
    monkeypatch.setattr(resume, "save", lambda state, *rest: (saved.append(state.step), real_save(state, *rest))[1])
    upstep_fast.adapt(**options)
    assert saved == [3, 5, 10, 12]


def test_a_run_that_stops_with_accumulated_gradients_resumes_exactly(options, monkeypatch, tmp_path, record_property):
    options |= {"accumulate": 3, "gate": "alternate", "steps": 20}
    upstep_fast.adapt(**{**options, "out": tmp_path / "whole"})
    interrupted(options, monkeypatch, step=9)  # 5 open steps: one update, and two gradients that wait
    found = checkpoint.newest(tmp_path / "out" / "checkpoints")
    names = load(found.files["state.safetensors"])
    assert found.manifest["state"]["accumulated"] == 2
    assert any(name.startswith("gradients.") for name in names)
    upstep_fast.adapt(**options, resume=True)
    assert evidence(tmp_path / "out") == evidence(tmp_path / "whole")
    record_property("exact_resumes", 1)


def test_a_resume_that_is_the_same_is_verified(options, caplog):
    caplog.set_level("INFO", "upstep_fast")
    upstep_fast.adapt(**options, verify_resume=4)
    assert "verify_resume: 4 steps repeated from" in caplog.text and "bit for bit the same" in caplog.text


def test_fewer_steps_than_asked_for_are_verified_at_the_end(options, caplog):
    caplog.set_level("INFO", "upstep_fast")
    upstep_fast.adapt(**options | {"checkpoint_every": 10}, verify_resume=50)
    assert "verify_resume: 2 steps repeated from" in caplog.text


def test_what_a_checkpoint_forgets_fails_the_check(options, monkeypatch):
    real = resume.restore

    def forgets(state, *rest):
        real(state, *rest)
        state.method.running_center.zero_()

    monkeypatch.setattr(resume, "restore", forgets)
    with pytest.raises(RunFailedError, match=r"verify_resume: 3 steps repeated .* not the same: .*running_centre"):
        upstep_fast.adapt(**options, verify_resume=3)


def test_a_checkpoint_can_be_due_by_the_clock(options, monkeypatch):
    now = iter(range(0, 10**6, 10))  # a look at the clock each step, ten seconds apart
    monkeypatch.setattr("upstep_fast.runtime.signals.time.monotonic", lambda: next(now))
    saved = []
    real_save = resume.save
    monkeypatch.setattr(resume, "save", lambda state, *rest: (saved.append(state.step), real_save(state, *rest))[1])
    upstep_fast.adapt(**options | {"checkpoint_every": "0.5min"})
    assert len(saved) >= 3 and saved[-1] == 12
    assert set(b - a for a, b in itertools.pairwise(saved[:-1])) <= {1, 2, 3}


@pytest.mark.parametrize("value", ["", "0", "-5", "0min", "tenmin", "5 hours", "infmin", "nanmin"])
def test_nonsense_between_checkpoints_is_refused(value):
    with pytest.raises(ConfigError, match=r"checkpoint_every: got .* steps \(200\) or minutes \(10min\)"):
        upstep_config(model="m", data=("d",), out="o", checkpoint_every=value)


CONSTANT = {"lr_schedule": "constant", "warmup": 3}


@pytest.mark.parametrize(
    "extra",
    [{"gate": "ema"}, {"gate": "random", "layout": "asymmetric", "accumulate": 3}],
    ids=lambda e: "-".join(map(str, e.values())),
)
def test_a_finished_run_made_longer_equals_the_longer_run(options, tmp_path, extra):
    """With a rate that does not depend on the number of steps; stopped by nothing but its end, twice."""
    options |= CONSTANT | extra
    upstep_fast.adapt(**{**options, "out": tmp_path / "whole", "steps": 16})
    for steps in (5, 12, 16):
        upstep_fast.adapt(**{**options, "steps": steps}, resume=steps > 5)
    assert evidence(tmp_path / "out") == evidence(tmp_path / "whole")


def test_a_longer_run_follows_the_schedule_of_its_new_length(finished, options, tmp_path, caplog):
    caplog.set_level("INFO", logger="upstep_fast")
    upstep_fast.adapt(**{**options, "steps": 20}, resume=True)
    rates = [json.loads(line)["lr"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    planned = [12] * 12 + [20] * 8
    expected = []
    for step, steps in enumerate(planned):  # linear warm-up over a twentieth, then half a cosine
        rising = 0.05 * steps
        cosine = 0.5 * (1 + math.cos(math.pi * (step - rising) / (steps - rising)))
        expected.append(1e-3 * ((step + 1) / (rising + 1) if step < rising else cosine))
    assert rates == pytest.approx(expected, rel=1e-6)
    assert (
        f"learning rate {expected[12]:.3g} now" in caplog.text
        and "steps: 20 instead of 12: from step 12 on" in caplog.text
    )
    assert upstep_fast.adapt(**{**options, "steps": None}, resume=True).steps == 20  # without --steps: as before
    with pytest.raises(ConfigError, match=r"resume: .*step-00000020 is 20 steps long; give at least as many --steps"):
        upstep_fast.adapt(**{**options, "steps": 19}, resume=True)


def test_an_interrupted_run_may_end_earlier(options, monkeypatch, tmp_path):
    interrupted(options, monkeypatch, step=7)
    assert upstep_fast.adapt(**{**options, "steps": 9}, resume=True).steps == 9


def test_what_an_earlier_end_left_goes_when_a_run_goes_on(finished, options, monkeypatch, tmp_path):
    left = [tmp_path / "out" / name for name in ("verdict.json", "whitening.safetensors")]
    for path in left:
        path.write_bytes(b"{}")
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        with pytest.raises(Interrupted, match="after 14 of 20 steps"):
            upstep_fast.adapt(**{**options, "steps": 20}, resume=True)
    assert not any(path.exists() for path in left)
