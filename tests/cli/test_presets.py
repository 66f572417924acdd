"""Presets: what they set, and what overrides them."""

import pytest

from upstep_fast.cli import parse
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.files import to_toml
from upstep_fast.config.flat import flat
from upstep_fast.config.plan import PlanConfig
from upstep_fast.config.presets import PRESETS, with_preset
from upstep_fast.errors import ConfigError
from upstep_fast.train.adapt import adapt

GIVEN = ["--model", "m", "--data", "d", "--out", "o"]


def parsed(*args):
    return parse.parse(AdaptConfig, [*GIVEN, *args], prog="adapt")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_its_values_and_nothing_else(name):
    config, plain = flat(parsed("--preset", name)), flat(parsed())
    for field, value in PRESETS[name].items():
        assert config[field] == value
    changed = {f for f in plain if plain[f] != config[f]} - {"preset"}
    assert changed <= PRESETS[name].keys()
    assert config["preset"] == name and len({str(sorted(p.items())) for p in PRESETS.values()}) == len(PRESETS)


def test_single_flags_override_the_preset_wherever_they_stand():
    for args in (["--preset", "gentle", "--strength", "2"], ["--strength", "2", "--preset=gentle"]):
        config = parsed(*args)
        assert (config.views.crop_min, config.validation.strength, config.objective.cvr) == (0.5, 2.0, "off")


def test_a_file_overrides_its_own_preset_and_the_command_line_the_file(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('preset = "gentle"\nstrength = 2.0\nlr = 0.5\n')
    config = parsed("--config", str(file))
    assert (config.views.crop_min, config.validation.strength, config.optimization.lr) == (0.5, 2.0, 0.5)
    config = parsed("--config", str(file), "--preset", "strong")
    assert (config.preset, config.optimization.lr, config.gate.rule) == ("strong", PRESETS["strong"]["lr"], "none")


@pytest.mark.parametrize("name", PRESETS)
def test_the_configuration_that_a_run_writes_is_read_back_the_same(name, tmp_path):
    config = parsed("--preset", name, "--steps", "7")
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert parsed("--config", str(tmp_path / "config.toml")) == config


def test_epochs_replace_the_steps_of_a_preset():
    config = parsed("--preset", "fast", "--epochs", "2")
    assert (config.optimization.epochs, config.optimization.steps) == (2.0, None)
    assert "steps" not in with_preset({"preset": "fast", "epochs": 2.0})


def test_python_has_the_same_presets(tmp_path, photos, model):
    assert with_preset({"preset": "strong", "lr": 1.0}) == PRESETS["strong"] | {"preset": "strong", "lr": 1.0}
    with pytest.raises(ConfigError, match="preset: got 'bold', choose from upstep, gentle, balanced, strong, fast"):
        adapt(model=model, data=photos, out=tmp_path / "out", preset="bold")
    small = dict(steps=2, batch_size=8, prototypes=8, head_hidden=16, head_dim=8, device="cpu", num_workers=0)
    adapt(model=model, data=photos, out=tmp_path / "out", preset="gentle", **small)
    assert "strength = 0.5" in (tmp_path / "out" / "config.toml").read_text()


def test_explora_has_none(tmp_path):
    with pytest.raises(ConfigError, match="preset: belongs to --method upstep"):
        adapt(model="m", data="d", out=tmp_path, method="explora", preset="strong")


def test_without_a_preset_the_recipe_is_the_one_that_gained_most():
    config = parsed()
    assert (config.preset, config.objective.loss, config.gate.rule, config.objective.cvr) == (
        None,
        "vicreg",
        "none",
        "off",
    )
    assert {depth: config.num_adapted(depth) for depth in (2, 9, 12, 24, 40)} == {2: 1, 9: 3, 12: 4, 24: 8, 40: 14}
    assert parsed("--lora-blocks", "2").num_adapted(9) == 2


@pytest.mark.parametrize("asked", [["--objective", "clustering"], ["--prototypes", "50"], ["--distil", "feature"]])
def test_who_asks_for_clustering_gets_upsteps_own_recipe(asked):
    config, own = flat(parsed(*asked)), flat(parsed("--preset", "upstep"))
    assert {f for f in own if own[f] != config[f]} <= {"preset", asked[0].removeprefix("--")}
    assert parsed("--preset", "upstep").num_adapted(9) == 9
    with pytest.raises(ConfigError, match="needs --objective clustering; leave it out with vicreg"):
        parsed("--objective", "vicreg", "--prototypes", "50")


def test_a_file_of_an_earlier_version_keeps_its_recipe(tmp_path):
    """Which named every option but those without a value: --lora-blocks and --crop-min."""
    file = tmp_path / "config.toml"
    file.write_text('[objective]\nloss = "clustering"\ncvr = "sq"\n[optimization]\nlr = 1e-3\nbatch_size = 256\n')
    config = parsed("--config", str(file))
    assert (config.optimization.batch_size, config.gate.rule, config.views.crop_min) == (256, "quantile", None)
    assert config.num_adapted(9) == 9


@pytest.mark.parametrize(("objective", "blocks"), [("clustering", 9), ("vicreg", 3)])
def test_a_run_goes_on_from_another_with_its_objective(objective, blocks, tmp_path):
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "adapter" / "adapter_config.json").write_text('{"base_model_name_or_path": "m"}')
    (run / "config.toml").write_text(to_toml(parsed("--objective", objective)))
    config = parse.parse(AdaptConfig, ["--from", str(run), "--data", "d", "--out", "o"], prog="adapt")
    assert (config.objective.loss, config.num_adapted(9)) == (objective, blocks)


@pytest.mark.parametrize("method", ["explora", "diet"])
def test_a_plan_has_the_batch_of_its_method(method):
    plan = parse.parse(PlanConfig, ["--model", "m", "--method", method], prog="plan")
    assert plan.to_adapt().optimization == parsed("--method", method).optimization
