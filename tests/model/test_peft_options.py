"""Every option of peft.LoraConfig: the adapter is read as PEFT reads it, or refused by the option's name."""

import dataclasses
import re
import typing

import peft
import peft_cases
import pytest
from peft_cases import CASES

from upstep_fast.model import peft_config

pytest.importorskip("peft", minversion="0.21")  # earlier versions lack some of the options


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return peft_cases.base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_read_as_peft_reads_it_or_refused_by_name(base, tmp_path, case):
    difference, effect, refusal = peft_cases.outcome(case, base, tmp_path)
    if case.is_read:
        assert not refusal and difference <= 1e-5
        assert effect > 0.05 or case.options.get("lora_alpha") == 0
    else:
        named = [name for name in (*case.options, *case.edits) if name in refusal]
        assert named or "patch_embed.proj is a Conv2d" in refusal or "not a LoRA" in refusal, refusal
        assert "\n" not in refusal and str(tmp_path) in refusal


def test_every_option_of_this_peft_is_classified():
    tables = (peft_config.READ, peft_config.WITHOUT_EFFECT, tuple(peft_config.REFUSED))
    fields = {f.name: f for f in dataclasses.fields(peft.LoraConfig)}
    assert not {name for name in fields if sum(name in table for table in tables) != 1}
    default = peft.LoraConfig()
    for name, harmless in peft_config.REFUSED.items():
        assert getattr(default, name) in harmless
    # PEFT marks the options that make another layer of LoRA
    assert {name for name, f in fields.items() if f.metadata.get("is_lora_variant")} <= set(peft_config.REFUSED)


def test_every_option_and_every_initialization_has_a_case():
    tried = {name for case in CASES for name in (*case.options, *case.edits)} | {"target_modules", "r", "lora_alpha"}
    assert {f.name for f in dataclasses.fields(peft.LoraConfig)} <= tried
    annotation = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    (literal,) = (t for t in typing.get_args(annotation) if typing.get_origin(t) is typing.Literal)
    starts = {str((case.options | case.edits).get("init_lora_weights")) for case in CASES}
    for start in typing.get_args(literal):
        pattern = re.escape(start).replace(re.escape("[number of iters]"), r"\d+")
        assert any(re.fullmatch(pattern, tried_start) for tried_start in starts), start
