"""The configuration: every field checked, files and flags agree, mistakes named."""

import re
import tomllib

import pytest

from upstep_fast.cli.parse import parse
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.evaluate import EmbedConfig, EvalConfig
from upstep_fast.config.files import read_toml, to_toml
from upstep_fast.config.flat import from_flat, paths
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
        from_flat(AdaptConfig, **{**BASE, field: value})
    assert "\n" not in str(error.value)


def test_fields_that_exclude_one_another():
    with pytest.raises(ConfigError, match="steps and epochs"):
        from_flat(AdaptConfig, **BASE, steps=5, epochs=1.0)
    with pytest.raises(ConfigError, match="views"):
        from_flat(AdaptConfig, **BASE, layout="asymmetric", gate="views")
    with pytest.raises(ConfigError, match="crop_min"):
        from_flat(AdaptConfig, **BASE, crop_min=0.9, crop_max=0.5)
    with pytest.raises(ConfigError, match="ensemble"):
        from_flat(EmbedConfig, model="m", data=("d",), out="f.npy", ensemble=True)


def test_toml_round_trip(tmp_path):
    config = from_flat(AdaptConfig, **BASE, steps=7, lora_targets=("q", "v"), cvr="off", overwrite=True, crop_min=0.1)
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
    for args in (["--lr", "fast"], ["--gate", "door"], []):
        with pytest.raises(SystemExit) as stop:
            parse(AdaptConfig, args, "upstep-fast adapt")
        assert stop.value.code == 2
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
            flag = "--" + name.replace("_", "-")
            helps = re.findall(rf" {flag}\b(.*?)\((?:default|required)", text)
            assert any(len(words.split()) > 3 for words in helps), flag
