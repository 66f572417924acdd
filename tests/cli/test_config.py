"""The configuration: every field checked, files and flags agree, mistakes named."""

import re
import tomllib

import numpy as np
import pytest
from adapt_configs import upstep_config

from upstep_fast.cli.parse import parse
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.evaluate import EmbedConfig, EvalConfig
from upstep_fast.config.explora import Dinov2Config, MaeConfig
from upstep_fast.config.files import from_options, read_toml, renamed, to_toml
from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.config.flat import dashed, defaults, flat, from_flat, paths, replace_flat
from upstep_fast.config.limits import LARGEST
from upstep_fast.config.plan import PlanConfig
from upstep_fast.config.resolve import resolve
from upstep_fast.errors import ConfigError

BASE = dict(model="m", data=("d",), out="o")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_size", 1),
        ("steps", 0),
        ("epochs", 0.0),
        ("lora_r", 0),
        ("lora_alpha", -1.0),
        ("lora_targets", ("q", "w")),
        ("lora_targets", ()),
        ("lora_targets", ("q", "q")),
        ("lora_targets", ("qkv", "q")),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("warmup", -0.1),
        ("temperature", 0.0),
        ("epsilon", 0.001),
        ("sinkhorn_iterations", 0),
        ("prototypes", 1),
        ("cvr_weight", -1.0),
        ("gate_rate", 1.5),
        ("gate_beta", -0.1),
        ("max_skips", 0),
        ("max_bad_fraction", 2.0),
        ("crop_min", -0.1),
        ("flip", 1.1),
        ("img_size", 0),
        ("num_workers", -1),
    ],
)
def test_a_bad_value_is_refused_by_its_name(field, value):
    with pytest.raises(ConfigError, match=rf"^{field}: .*") as error:
        upstep_config(**{**BASE, field: value})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("clip", float("inf"), "clip: got inf, must be a finite number"),
        ("mean", (0.5, float("nan"), 0.5), "mean: got nan, must be a finite number"),
        ("weight_decay", float("inf"), "weight_decay: got inf, must be a finite number"),
        ("sinkhorn_iterations", 2**31, "sinkhorn_iterations: got 2147483648, must be at most 1000"),
        ("lora_r", 100_000, "lora_r: got 100000, must be at most 4096"),
        ("head_dim", 5000, "head_dim: got 5000, must be at most 4096"),
        ("img_size", (10**6, 16), "img_size: got 1000000, must be at most 32768"),
        ("rank_timeout", 1e300, "rank_timeout: got 1e+300, must be at most 1000000"),
        ("epochs", 1e9, "epochs: got 1000000000.0, must be at most 1000000"),
    ],
)
def test_what_no_run_could_use_is_refused_on_every_way_in(field, value, message, tmp_path):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        upstep_config(**{**BASE, field: value})
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        from_options(AdaptConfig, {**BASE, field: value}, "adapt")
    values = value if isinstance(value, tuple) else (value,)
    flags = [f"--{field.replace('_', '-')}", *map(str, values)]
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}$"):
        parse(AdaptConfig, ["--model", "m", "--data", "d", "--out", "o", *flags], "upstep-fast adapt")


def test_limits_are_of_flags_that_there_are():
    known = {
        name for kind in (AdaptConfig, Dinov2Config, MaeConfig, FinetuneConfig, EvalConfig) for name in paths(kind)
    }
    assert set(LARGEST) <= known | {"runs", "world_size"}


def test_odd_texts_survive_toml_and_texts_that_cannot_are_refused():
    odd = 'a\x7fb\x1b\t\n"\\\u2028é\U0001f600'
    config = upstep_config(**{**BASE, "out": odd})
    assert tomllib.loads(to_toml(config))["output"]["out"] == odd
    with pytest.raises(ConfigError, match=r"^out: 'a\\udcff' is not UTF-8, so config\.toml cannot hold it; rename it$"):
        to_toml(upstep_config(**{**BASE, "out": "a\udcff"}))


def test_fields_that_exclude_one_another():
    with pytest.raises(ConfigError, match="steps and epochs"):
        upstep_config(**BASE, steps=5, epochs=1.0)
    with pytest.raises(ConfigError, match="views"):
        upstep_config(**BASE, layout="asymmetric", gate="views")
    with pytest.raises(ConfigError, match="crop_min"):
        upstep_config(**BASE, crop_min=0.9, crop_max=0.5)
    with pytest.raises(ConfigError, match="ensemble"):
        from_flat(EmbedConfig, model="m", data=("d",), out="f.npy", ensemble=True)


def test_toml_round_trip(tmp_path):
    config = upstep_config(**BASE, steps=7, lora_targets=("q", "v"), cvr="off", overwrite=True, crop_min=0.1)
    (tmp_path / "c.toml").write_text(to_toml(config))
    again = parse(AdaptConfig, ["--config", str(tmp_path / "c.toml")], "upstep-fast adapt")
    assert again == config
    assert tomllib.loads(to_toml(config))["lora"]["targets"] == ["q", "v"]


def test_flags_override_the_file(tmp_path):
    (tmp_path / "c.toml").write_text('model = "m"\ndata = ["a", "b"]\nout = "o"\nlora-r = 4\nlr = 0.1\n')
    config = parse(
        AdaptConfig, ["--config", str(tmp_path / "c.toml"), "--lr", "0.2", "--data", "c"], "upstep-fast adapt"
    )
    assert (config.lora.r, config.optimization.lr, config.data.paths) == (4, 0.2, ("c",))


@pytest.mark.parametrize(
    ("recorded", "flags", "length"),
    [
        ("steps = 40", ["--epochs", "6"], (None, 6.0)),
        ("epochs = 6", ["--steps", "40"], (40, None)),
        ("steps = 40", [], (40, None)),
    ],
)
def test_a_length_in_the_other_unit_overrides_the_file(tmp_path, recorded, flags, length):
    (tmp_path / "c.toml").write_text(f'model = "m"\ndata = ["a"]\nout = "o"\n{recorded}\n')
    config = parse(AdaptConfig, ["--config", str(tmp_path / "c.toml"), *flags], "upstep-fast adapt")
    assert (config.optimization.steps, config.optimization.epochs) == length


def test_a_repeated_flag_is_said(capsys):
    flags = ["--model", "m", "--data", "d", "--out", "o"]
    assert parse(AdaptConfig, [*flags, "--lr", "1", "--lr", "2"], "upstep-fast adapt").optimization.lr == 2
    assert capsys.readouterr().err == "upstep-fast: lr: given more than once; the last counts: '2'\n"
    parse(AdaptConfig, [*flags, "--lr", "2", "--lr=2"], "upstep-fast adapt")
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lora_rank = 3", r"unknown key 'lora_rank'; did you mean lora_r"),
        ("batchsize = 3", r"did you mean batch_size"),
        ("zzzz = 3", r"the fields are model, arch"),
        ("lr = ", r"not valid TOML"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, text, message):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_toml(tmp_path / "c.toml", AdaptConfig)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*none\.toml"):
        read_toml(tmp_path / "none.toml", AdaptConfig)


def test_usage_errors_exit_with_2():
    for args, text in (
        (["--lr", "fast"], "lr: got 'fast', must be a number"),
        (["--gate", "door"], "gate: got 'door', must be one of 'none', 'prev'"),
        ([], "adapt: --model, --data and --out must be given"),
    ):
        with pytest.raises(ConfigError, match=f"^{text}") as error:
            parse(AdaptConfig, args, "upstep-fast adapt")
        assert error.value.exit_code == 2
    with pytest.raises(ConfigError, match="unknown option --stps; did you mean --steps") as error:
        parse(AdaptConfig, ["--stps", "3"], "upstep-fast adapt")
    assert error.value.exit_code == 2


def test_every_field_has_a_line_of_help(capsys):
    for config in (AdaptConfig, EvalConfig, EmbedConfig):
        with pytest.raises(SystemExit) as stop:
            parse(config, ["--help"], "upstep-fast")
        assert stop.value.code == 0
        text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
        for name in paths(config):
            flag = f"--{dashed(name)}"
            helps = re.findall(rf" {flag}\b(.*?)\((?:default|required)", text)
            assert any(len(words.split()) > 3 for words in helps), flag


def test_a_file_may_have_tables_flags_or_both(tmp_path):
    flat_text = 'model = "m"\ndata = ["d"]\nout = "o"\ngate = "none"\ngate_rate = 0.3\nlora_r = 4\n'
    tables = '[model]\nname = "m"\n[data]\npaths = ["d"]\n[output]\nout = "o"\n'
    tables += '[gate]\nrule = "none"\nrate = 0.3\n[lora]\nr = 4\n'
    both = "gate_rate = 0.3\n" + tables.replace("rate = 0.3\n", "")
    found = []
    for text in (flat_text, tables, both):
        (tmp_path / "c.toml").write_text(text)
        found.append(parse(AdaptConfig, ["--config", str(tmp_path / "c.toml")], "upstep-fast adapt"))
    assert found[0] == found[1] == found[2]
    assert (found[0].gate.rule, found[0].gate.rate, found[0].lora.r) == ("none", 0.3, 4)
    (tmp_path / "c.toml").write_text("[gate]\nrte = 0.3\n")
    with pytest.raises(ConfigError, match="has no key 'rte'"):
        read_toml(tmp_path / "c.toml", AdaptConfig)


def test_old_names_of_flags_are_accepted(tmp_path, capsys):
    (tmp_path / "c.toml").write_text('model = "m"\ndata = ["d"]\nout = "o"\ngrey = 0.25\n')
    from_file = parse(AdaptConfig, ["--config", str(tmp_path / "c.toml")], "upstep-fast adapt")
    from_flag = parse(AdaptConfig, ["--model", "m", "--data", "d", "--out", "o", "--grey", "0.25"], "upstep-fast adapt")
    assert from_file == from_flag and from_flag.views.gray == 0.25
    assert capsys.readouterr().err.count("grey is now called gray; the old name still works") == 2
    assert renamed({"grey": 0.25, "lr": 1.0}) == {"gray": 0.25, "lr": 1.0}


@pytest.mark.parametrize(
    "config_class", [AdaptConfig, Dinov2Config, MaeConfig, FinetuneConfig, EvalConfig, EmbedConfig]
)
def test_flat_is_the_inverse_of_from_flat(config_class):
    given = BASE if "out" in paths(config_class) else {"model": "m", "data": ("d",)}
    config = from_flat(config_class, **given)
    assert from_flat(config_class, **flat(config)) == config
    assert {name: value for name, value in flat(config).items() if name not in given} == {
        name: value for name, value in defaults(config_class).items() if name not in given
    }
    changed = replace_flat(config, seed=7)
    assert flat(changed) == flat(config) | {"seed": 7} and changed.runtime.seed == 7


def test_help_lists_common_options_and_help_all_every_option(capsys):
    def listed(*args):
        with pytest.raises(SystemExit) as stop:
            parse(AdaptConfig, args, "upstep-fast adapt")
        assert stop.value.code == 0
        return set(re.findall(r"^\W*--([a-z0-9-]+)", capsys.readouterr().out, re.M))

    common, every = listed("--help"), listed("--help-all")
    assert 20 <= len(common) <= 32 and common < every and {"model", "data", "out", "gate"} <= common
    assert {dashed(name) for name in paths(AdaptConfig)} <= every
    explora = listed("--help-all", "--method", "explora")
    assert "unfreeze" in explora and not {"cvr", "queue", "preset"} & explora


def test_a_resolved_configuration_has_its_steps_and_names_what_was_reduced():
    config = upstep_config(**BASE, batch_size=64, prototypes=300)
    with pytest.raises(ValueError, match="not resolved"):
        _ = config.optimization.num_steps
    resolved = resolve(config, 24)
    assert resolved.config.optimization.num_steps == 30 and resolved.has_few_images
    assert resolved.reduced == {"batch_size": (64, 24), "prototypes": (300, 24)}
    with pytest.raises(ConfigError, match="do not divide over 3 ranks"):
        resolve(config, 24, 3)


@pytest.mark.parametrize(
    ("num_images", "steps"), [(300, 35), (1000, 117), (3413, 399), (4000, 400), (10_240, 400), (20_000, 780)]
)
def test_the_default_number_of_steps(num_images, steps):
    """max(10 N / B, min(400, 30 N / B)) for batches of B = 256; what is given is kept."""
    resolved = resolve(upstep_config(**BASE), num_images)
    assert resolved.config.optimization.num_steps == steps
    assert resolved.has_few_images == (steps < 400)
    assert steps * 256 / num_images <= 30
    given = resolve(upstep_config(**BASE, steps=5000), num_images)
    assert given.config.optimization.num_steps == 5000 and not given.has_few_images


def test_a_size_of_memory_needs_its_unit():
    with pytest.raises(ConfigError, match=r"^fit: got '24', needs a unit: 24GB$"):
        from_flat(PlanConfig, model="m", fit="24")


def test_a_table_takes_the_fields_of_its_group_alone(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text("[gate]\nruel = 'none'\n")
    with pytest.raises(ConfigError, match=r"config: \[gate\] has no key 'ruel'; did you mean rule"):
        read_toml(path, AdaptConfig)
    path.write_text("[gate]\nlr = 1.0\n")
    with pytest.raises(ConfigError, match=r"config: \[gate\] has no key 'lr'"):
        read_toml(path, AdaptConfig)


def test_numbers_of_numpy_and_paths_from_a_generator_are_plain(tmp_path):
    options = {
        "model": "m",
        "data": (tmp_path / name for name in ("a", "b")),
        "out": "o",
        "steps": np.int64(3),
        "lr": np.float32(0.5),
    }
    config = from_options(AdaptConfig, options, "adapt")
    assert config.data.paths == (str(tmp_path / "a"), str(tmp_path / "b"))
    assert type(config.optimization.steps) is int and config.optimization.lr == 0.5
    assert "steps = 3" in to_toml(config)
