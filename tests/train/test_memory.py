"""The plan: what it counts without bytes is what the allocator gives out, and adapt keeps to it."""

import json
import logging
from dataclasses import replace

import pytest
import torch
from adapt_configs import upstep_config

from upstep_fast.cli import plan
from upstep_fast.cli.commands import main
from upstep_fast.cli.parse import parse
from upstep_fast.config.flat import from_flat, replace_flat
from upstep_fast.config.plan import PlanConfig, to_bytes
from upstep_fast.engine import vit as engine
from upstep_fast.errors import ConfigError, RunFailedError
from upstep_fast.kernels.attention import cpp as attention_on_cpu
from upstep_fast.runtime import machine
from upstep_fast.runtime.device import Compute, resolve
from upstep_fast.train.memory import count as step_memory
from upstep_fast.train.memory import fit as memory_fit
from upstep_fast.train.memory import measure as calibrate
from upstep_fast.train.memory.count import hidden_bytes

CPU = Compute(torch.device("cpu"), "fp32")
TINY, SMALL = "vit_tiny_patch16_224", "vit_small_patch16_224"

# one line a configuration: together every level, precision, layout, head and kind of model
CONFIGURATIONS = [
    dict(model=TINY, batch_size=8),
    dict(model=TINY, batch_size=8, memory="balanced"),
    dict(model=TINY, batch_size=8, memory="lean"),
    dict(model=TINY, batch_size=8, precision="bf16"),
    dict(model=TINY, batch_size=8, precision="bf16", memory="balanced"),
    dict(model=TINY, batch_size=8, precision="bf16", memory="lean"),
    dict(model=TINY, batch_size=2),
    dict(model=TINY, batch_size=33, img_size=64, memory="lean"),
    dict(model=TINY, batch_size=4, img_size=(96, 128)),
    dict(model=TINY, batch_size=4, layout="asymmetric"),
    dict(model=TINY, batch_size=4, layout="asymmetric", memory="lean", precision="bf16"),
    dict(model=TINY, batch_size=8, layout="asymmetric", gate="quantile", gate_unit="image"),
    dict(model=TINY, batch_size=8, layout="asymmetric", gate="random", gate_unit="image", gate_rate=0.25),
    dict(model=TINY, batch_size=8, distil="relational"),
    dict(model=TINY, batch_size=4, img_size=64, local_views=3),
    dict(model=TINY, batch_size=4, implementation="reference"),
    dict(model=TINY, batch_size=4, implementation="reference", precision="bf16"),
    dict(model=TINY, batch_size=6, lora_targets=("qkv",), lora_r=32),
    dict(model=TINY, batch_size=6, lora_targets=("q", "v", "proj", "fc1", "fc2"), memory="lean"),
    dict(model=TINY, batch_size=6, lora_blocks=2),
    dict(model=TINY, batch_size=6, tune="full"),
    dict(model=TINY, batch_size=6, head="none", prototypes=64),
    dict(model=TINY, batch_size=48, img_size=32, head_hidden=4096, head_dim=512, prototypes=2000),
    dict(model=TINY, batch_size=6, prototype_init="learned", head="linear"),
    dict(model=SMALL, batch_size=4, img_size=112),
    dict(model=SMALL, batch_size=4, img_size=112, precision="bf16", memory="balanced"),
    dict(model="vit_base_patch16_224", batch_size=2, img_size=64, memory="lean"),
    dict(model="vit_small_patch14_dinov2", batch_size=2, img_size=112),
    dict(model="deit_tiny_distilled_patch16_224", batch_size=4, in_chans=1),
    dict(model="eva02_tiny_patch14_224", batch_size=2),
    dict(model="vit_small_patch16_dinov3", batch_size=2, img_size=112, precision="bf16"),
]


def config_of(options, **more):
    given = dict(data=("unused",), out="unused", steps=10) | options | more
    precision = given.pop("precision", "fp32")
    return upstep_config(**given), replace(CPU, precision=precision)


@pytest.mark.parametrize("options", CONFIGURATIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_the_count_is_within_a_tenth_of_what_the_allocator_gave_out(options, monkeypatch):
    # which form of attention runs on a CPU is measured; the count is of the library's, which takes more
    monkeypatch.setattr(attention_on_cpu, "unsupported_reason", lambda qkv: "the library's is counted")
    # the oracle is PyTorch's own allocator, which reports every block to the profiler
    config, compute = config_of(options)
    real = calibrate.measure(config, compute, cpu_images=1000)
    assert real.batch == config.optimization.batch_size
    assert step_memory.count(config, compute).peak == pytest.approx(real.peak_bytes, rel=0.1)


def test_the_compiled_attention_takes_no_more_than_is_counted():
    config, compute = config_of(dict(model=TINY, batch_size=8, precision="bf16", memory="lean"))
    real = calibrate.measure(config, compute, cpu_images=1000)
    assert real.peak_bytes < 1.1 * step_memory.count(config, compute).peak


@pytest.mark.gpu
@pytest.mark.parametrize("memory", memory_fit.LEVELS)
@pytest.mark.parametrize("model", [SMALL, "vit_base_patch16_224", "vit_large_patch14_clip_224"])
@pytest.mark.parametrize("batch", [8, 32, 64])
def test_the_count_is_within_a_tenth_of_the_gpus_peak(model, batch, memory):
    config, compute = config_of(dict(model=model, batch_size=batch, memory=memory))[0], resolve("cuda", "auto")
    real = calibrate.measure(config, compute)
    assert step_memory.count(config, compute).peak == pytest.approx(real.peak_bytes, rel=0.1)


@pytest.mark.parametrize(
    ("memory", "values", "held"), [("fast", 1 + 3 + 1 + 1 + 4, 2), ("balanced", 1 + 1 + 1 + 4, 2), ("lean", 1, 2)]
)
def test_kept_bytes_are_those_of_the_blocks_docstring(memory, values, held):
    # 12 blocks of width 192, 2 x 16 views of 17 tokens in bf16: what engine/block.py says a block keeps, 3 heads
    config, compute = config_of(
        dict(model=TINY, batch_size=16, img_size=64, precision="bf16", memory=memory, head="none")
    )
    tokens = 2 * 16 * 17
    kept = 12 * tokens * 192 * values * held
    counted = step_memory.count(config, compute).kept
    # beside them: the norms' and the softmax's statistics, adapters in folded form, the last norm and the loss
    assert kept < counted < kept + 12 * tokens * 4 * (2 + 3) + 8e6


def test_no_weight_is_allocated_or_downloaded(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("the plan fetched something")

    monkeypatch.setattr("urllib.request.urlopen", refused)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refused)
    monkeypatch.setattr("timm.models._builder.load_pretrained", refused)
    # 1.1 billion weights in fp32 are 4.5 GB: the process must not grow by a tenth of that
    config, compute = config_of(dict(model="vit_giant_patch14_dinov2.lvd142m", batch_size=2, img_size=28))
    before = _resident()
    counted = step_memory.count(config, compute)
    assert counted.parts["weights"] > 4.4e9 and _resident() - before < 0.4e9


def _resident():
    import resource

    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def test_the_parts_are_what_they_are_called():
    config, compute = config_of(dict(model=TINY, batch_size=4, img_size=64, prototypes=50, lora_targets=("q", "v")))
    step = step_memory.count(config, compute)
    width, depth, head = 192, 12, 192 * 1024 + 1024 + 1024 * 128 + 128
    learned = depth * 2 * 8 * (width + width) + head
    assert step.trained == learned and step.parts["optimizer"] == pytest.approx(8 * learned, rel=1e-3)
    assert step.parts["gradients"] <= 4 * learned
    buffers = 4 * (50 * 128 + 2 * 128)
    assert step.parts["adapters"] == pytest.approx(4 * learned + buffers, rel=1e-2)
    assert step.parts["views"] == 2 * 4 * 3 * 64 * 64 * 4
    assert sum(step.parts.values()) == step.peak and min(step.parts.values()) >= 0


def test_a_gpu_is_planned_where_there_is_none(monkeypatch):
    monkeypatch.setattr(engine, "_first", lambda vit, pool: None)  # the class token alone, in the last block on a CPU
    config, _ = config_of(dict(model=TINY, batch_size=8))
    compute = Compute(torch.device("cpu"), "bf16")
    on_gpu, on_cpu = step_memory.count(config, compute, on="cuda"), step_memory.count(config, compute)
    # GELU's derivative in one byte instead of two bytes of its input: 4 D bytes a token less
    tokens = 2 * 8 * 197
    assert on_cpu.kept - on_gpu.kept == pytest.approx(12 * tokens * 4 * 192, rel=0.05)
    assert on_gpu.parts["workspace"] >= step_memory.CUBLAS_BYTES["hopper"]
    assert on_gpu.waiting == 2 * on_gpu.parts["views"]


def test_hidden_bytes_of_attention():
    shape = torch.Size([2, 128, 3, 3, 64])
    values = 2 * 128 * 3 * 64
    assert hidden_bytes(shape, 4, "cpu") == 12 * values
    scores = 2 * 3 * 128 * 128
    assert hidden_bytes(shape, 2, "cpu") == 16 * values + 4 * scores
    assert hidden_bytes(torch.Size([2, 600, 3, 3, 64]), 2, "cpu") == 44 * values * 600 // 128
    assert hidden_bytes(shape, 2, "cuda") == (6 + 4) * values


def test_flops_are_those_of_the_products():
    config, compute = config_of(dict(model=TINY, batch_size=4, img_size=64, head="none", prototypes=2))
    step = step_memory.count(config, compute, flops=True)
    tokens, width = 2 * 4 * 17, 192
    # qkv 3, proj 1, fc1 4, fc2 4; after qkv the last block goes on with the class token alone
    products = 2 * width**2 * (11 * 12 * tokens + 3 * tokens + 9 * 8)
    attention = 11 * 4 * 8 * 17**2 * width + 4 * 8 * 17 * width
    patches = 2 * 8 * 16 * width * 3 * 16 * 16
    assert step.forward_flops == pytest.approx(products + attention + patches, rel=1e-3)
    # frozen weights: one product back for each, less the first block's qkv, whose input learns nothing
    assert 0.95 * products < step.backward_flops < 1.4 * products


class Steps:
    """Counts that are a line in the batch, each level a third of the one before."""

    def __init__(self, one=90.0):
        self.asked, self.one = [], one

    def __call__(self, memory, batch):
        self.asked.append((memory, batch))
        size = round(batch * self.one / 3 ** memory_fit.LEVELS.index(memory))
        parts = dict.fromkeys(step_memory.PARTS, 0) | {"activations": size}
        return memory_fit.Choice(memory, batch, step_memory.StepMemory(parts, size, 0, 0, 0, 0))


@pytest.mark.parametrize(
    ("limit", "memory", "low", "high"),
    [(1e6, "fast", 256, 256), (10_000, "balanced", 256, 256), (2900, "lean", 256, 256), (1100, "lean", 88, 100)],
)
def test_fit_keeps_the_batch_while_a_level_holds_it(limit, memory, low, high):
    steps = Steps()
    choice = memory_fit.fit(steps, 256, limit)
    assert choice.memory == memory and low <= choice.batch_size <= high and choice.needed <= limit
    assert len(steps.asked) < 14


def test_fit_says_so_when_nothing_fits():
    with pytest.raises(ConfigError, match=r"two images at level lean need .* smaller model or --img-size"):
        memory_fit.fit(Steps(), 256, 15)
    assert memory_fit.fit(Steps(), 256, None).memory == "fast"


@pytest.fixture
def free(monkeypatch):
    """Sets how much memory appears to be free, beside the loader's cache."""

    def set_free(size):
        value = None if size is None else int(size) + memory_fit.CACHE_BYTES
        monkeypatch.setattr(machine, "free_bytes", lambda device: value)

    return set_free


def test_adapt_refuses_what_cannot_fit(free, model, photos, tmp_path, capsys):
    config, _ = config_of(dict(model=model, batch_size=24, prototypes=8))
    fast, lean = (step_memory.count(replace_flat(config, memory=level), CPU).peak for level in ("fast", "lean"))
    free(memory_fit.MARGIN * (fast + lean) / 2)
    out = tmp_path / "out"
    flags = ["adapt", "--model", model, "--data", str(photos), "--out", str(out), "--steps", "2", "--batch-size", "24"]
    flags += ["--precision", "fp32", "--prototypes", "8", "--no-report-images"]
    with pytest.raises(SystemExit) as stopped:
        main(flags)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and not out.exists()
    assert "24 images per step at level fast do not fit" in error and "--no-memory-check" in error
    # what it names fits
    words = error.split()
    level, batch = words[words.index("--memory") + 1], int(words[words.index("--batch-size") + 1])
    assert level != "fast" and batch == 24
    with pytest.raises(SystemExit) as stopped:
        main([*flags, "--memory", level])
    assert stopped.value.code == 0
    with pytest.raises(SystemExit) as stopped:
        main([*flags, "--overwrite", "--no-memory-check"])
    assert stopped.value.code == 0


def test_auto_takes_the_fastest_level_that_fits(free, model):
    config, _ = config_of(dict(model=TINY, img_size=64, batch_size=24, memory="auto"))
    peaks = {level: step_memory.count(replace_flat(config, memory=level), CPU).peak for level in memory_fit.LEVELS}
    assert peaks["fast"] > peaks["balanced"] > peaks["lean"]
    for level, peak in peaks.items():
        free(1.11 * peak)
        assert memory_fit.settle(config, CPU).memory.level == level
    free(0.5 * peaks["lean"])
    with pytest.raises(ConfigError, match="do not fit"):
        memory_fit.settle(config, CPU)
    assert memory_fit.settle(replace_flat(config, memory_check=False), CPU).memory.level == "lean"


def test_a_resumed_run_keeps_the_level_it_had(free, model, tmp_path):
    (tmp_path / "config.toml").write_text('memory = "balanced"\n')
    config, _ = config_of(dict(model=model, batch_size=24, memory="auto", resume=True, out=str(tmp_path)))
    free(1e12)
    assert memory_fit.settle(config, CPU).memory.level == "balanced"


def test_what_cannot_be_counted_or_is_not_known_is_said_and_runs(free, model, monkeypatch, caplog):
    config, _ = config_of(dict(model=model, batch_size=24, memory="auto"))
    with caplog.at_level(logging.WARNING, logger="upstep_fast"):
        logging.getLogger("upstep_fast").propagate = True
        free(None)
        assert memory_fit.settle(config, CPU).memory.level == "fast"
        assert "the free memory is unknown here" in caplog.text
        free(1e12)
        monkeypatch.setattr(step_memory, "count", lambda *a, **k: 1 / 0)
        assert memory_fit.settle(config, CPU).memory.level == "fast"
        assert "memory: not checked (ZeroDivisionError" in caplog.text


def test_free_memory_is_less_than_there_is():
    import os

    free = machine.free_bytes(torch.device("cpu"))
    assert free is not None and 0 < free <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def plan_of(*flags, capsys):
    plan.run(parse(PlanConfig, [*flags, "--json"], "upstep-fast plan"))
    return json.loads(capsys.readouterr().out)


def test_the_commands_json_and_table_agree(capsys):
    flags = ["--model", TINY, "--batch-size", "8", "--img-size", "64", "--precision", "fp32", "--device", "cpu"]
    flags += ["--steps", "50"]
    result = plan_of(*flags, capsys=capsys)
    assert sum(result["parts"].values()) == result["peak_bytes"] == result["levels"]["fast"]
    assert result["total_seconds"]["no_skips"] == pytest.approx(50 * result["seconds"]["open"])
    assert result["seconds"]["from"] == "estimated" and result["accumulate"] == 1
    plan.run(parse(PlanConfig, flags, "upstep-fast plan"))
    shown = capsys.readouterr().out
    for part, size in result["parts"].items():
        assert any(part in line and machine.format_bytes(size) in line for line in shown.splitlines())
    assert "for adapt: --memory fast --batch-size 8" in shown


def test_calibrate_puts_a_real_step_beside_it(capsys):
    flags = ["--model", TINY, "--batch-size", "8", "--img-size", "64", "--device", "cpu", "--calibrate"]
    measured = plan_of(*flags, capsys=capsys)["measured"]
    assert measured["planned_bytes"] == pytest.approx(measured["peak_bytes"], rel=0.1)
    assert measured["batch"] == 8 and min(measured["forward_seconds"], measured["backward_seconds"]) > 0


def test_fit_picks_batch_level_and_accumulation(capsys):
    base = ["--model", TINY, "--img-size", "64", "--batch-size", "64", "--device", "cuda", "--precision", "bf16"]
    if torch.cuda.is_available():
        pytest.skip("plans for a GPU that is not here")
    whole = plan_of(*base, capsys=capsys)
    assert whole["seconds"] is None and whole["free_bytes"] is None
    # room for the lean step of a quarter of the batch, roughly
    small = plan_of(*base, "--memory", "lean", "--batch-size", "16", capsys=capsys)
    room = small["needed_bytes"] + plan.CONTEXT_BYTES
    found = plan_of(*base, "--fit", str(room), capsys=capsys)
    assert found["memory"] == "lean" and found["accumulate"] > 1
    assert 64 <= found["batch_size"] * found["accumulate"] <= 64 + found["accumulate"]
    assert found["needed_bytes"] <= found["free_bytes"]


def test_a_plan_that_does_not_fit_proposes_one_that_does(capsys, monkeypatch):
    flags = ["--model", TINY, "--img-size", "64", "--batch-size", "64", "--device", "cpu", "--precision", "fp32"]
    levels = plan_of(*flags, capsys=capsys)["levels"]
    assert plan.MARGIN * levels["lean"] < levels["fast"]
    monkeypatch.setattr(machine, "free_bytes", lambda device: round(plan.MARGIN * levels["lean"]) + 1)
    with pytest.raises(
        RunFailedError, match=r"^plan: --memory fast --batch-size 64 does not fit in .*; this does: "
    ) as error:
        plan_of(*flags, capsys=capsys)
    assert error.value.exit_code == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False and found["needed_bytes"] > found["free_bytes"]
    proposed = found["proposal"]
    assert str(error.value).endswith(f"--memory {proposed['memory']} --batch-size {proposed['batch_size']}")
    again = [*flags, "--memory", proposed["memory"], "--batch-size", str(proposed["batch_size"])]
    assert plan_of(*again, capsys=capsys)["fits"] is True  # what is proposed fits
    with pytest.raises(RunFailedError):
        plan.run(parse(PlanConfig, flags, "upstep-fast plan"))
    shown = capsys.readouterr().out
    assert "does not fit: needs" in shown and "for adapt: --memory fast" not in shown
    assert f"for adapt: --memory {proposed['memory']} --batch-size {proposed['batch_size']}" in shown
    monkeypatch.setattr(machine, "free_bytes", lambda device: 1000)
    with pytest.raises(RunFailedError, match="take a smaller model or --img-size"):
        plan_of(*flags, capsys=capsys)


def test_devices_share_the_batch(capsys):
    flags = ["--model", TINY, "--img-size", "64", "--batch-size", "64", "--device", "cpu", "--precision", "fp32"]
    one, four = (plan_of(*flags, "--world-size", n, capsys=capsys) for n in ("1", "4"))
    assert four["batch_size"] == 64 and four["parts"]["activations"] < 0.3 * one["parts"]["activations"]
    with pytest.raises(ConfigError, match="must divide the batch of 64"):
        from_flat(PlanConfig, model=TINY, batch_size=64, world_size=3)


@pytest.mark.parametrize(
    ("text", "size"), [("24GB", 24e9), ("24 gib", 24 * 2**30), ("800M", 8e8), ("1.5KiB", 1536), ("7", 7)]
)
def test_sizes_of_memory(text, size):
    assert to_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "24XB", "1e9", "nan"])
def test_what_is_no_size(text):
    with pytest.raises(ConfigError, match="fit: got"):
        to_bytes(text)


def test_a_runs_configuration_can_be_planned(tmp_path, model, capsys):
    from upstep_fast.config.files import to_toml

    path = tmp_path / "config.toml"
    path.write_text(to_toml(config_of(dict(model=model, batch_size=8))[0]))
    result = plan_of("--config", str(path), "--device", "cpu", "--no-tensorboard", capsys=capsys)
    assert result["model"] == model and result["batch_size"] == 8


def test_calibrating_a_device_that_is_not_here_is_refused():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(ConfigError, match="no cuda device here"):
        plan.make(from_flat(PlanConfig, model=TINY, device="cuda", calibrate=True))
