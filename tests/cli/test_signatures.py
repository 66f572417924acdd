"""The Python functions' keywords: explicit, as fresh as the configuration, and of the right types."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import upstep_fast
from upstep_fast.config import options, signatures
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.flat import defaults
from upstep_fast.errors import ConfigError

GIVEN = dict(model="m", data="d", out="o")


def test_the_generated_options_are_fresh():
    text = signatures.options_module()
    assert Path(options.__file__).read_text() == text, "run python -m upstep_fast.config.signatures"


@pytest.mark.parametrize("name", ["adapt", "finetune", "evaluate", "embed"])
def test_signatures_list_every_keyword(name):
    function = getattr(upstep_fast, name)
    parameters = inspect.signature(function).parameters
    assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    typed = getattr(options, f"{name.title()}Options").__annotations__
    assert set(typed) == set(parameters) - {"model", "data", "out"}


def test_defaults_shown_are_those_of_upstep():
    parameters = inspect.signature(upstep_fast.adapt).parameters
    for name, default in defaults(AdaptConfig).items():
        assert parameters[name].default == default


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": torch.nn.Linear(2, 2)}, "model: got an object of type Linear, must be a model's name"),
        ({"data": torch.zeros(3)}, "data: got an object of type Tensor, must be a path or several"),
        ({"data": [torch.zeros(3)]}, "data: got a list with an object of type Tensor"),
        ({"lr": "fast"}, "lr: got 'fast', must be a number"),
        ({"steps": 3.5}, "steps: got 3.5, must be an integer or None"),
        ({"overwrite": "yes"}, "overwrite: got 'yes', must be True or False"),
        ({"gate": "door"}, "gate: got 'door', must be one of 'none', "),
        ({"lora_targets": "q"}, "lora_targets: got 'q', must be a list of text"),
        ({"crop_ratio": (1,)}, "crop_ratio: got [1], must be 2 numbers or None"),
        ({"strength": "much"}, "strength: got 'much', must be a number or 'auto'"),
    ],
)
def test_a_wrong_type_is_named_in_one_line(options, message):
    with pytest.raises(ConfigError) as error:
        upstep_fast.adapt(**GIVEN | options)
    assert str(error.value).startswith(f"adapt: {message}") and "\n" not in str(error.value)


def test_old_names_are_accepted_with_a_notice(capsys):
    with pytest.raises(ConfigError, match=r"^gray: got 2, must lie in 0 to 1"):
        upstep_fast.adapt(**GIVEN, grey=2)
    assert capsys.readouterr().err == "upstep-fast: grey is now called gray; the old name still works\n"


def test_dir_lists_the_public_names_and_imports_nothing():
    # Embedder needs scikit-learn, so `from upstep_fast import *` leaves it out
    names = "sorted([*upstep_fast.__all__, 'Embedder'])"
    code = f"import sys, upstep_fast; print(dir(upstep_fast) == {names}, 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "True False\n"
