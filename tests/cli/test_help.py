"""Help with examples, suggestions for misspelt flags, completion, and every exit code that docs/reference.md lists."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from upstep_fast import errors
from upstep_fast.cli import commands as cli
from upstep_fast.cli import help as cli_help
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.flat import dashed, defaults, from_flat, paths

ROOT = Path(__file__).resolve().parents[2]
FAST = (
    "--steps 4 --batch-size 8 --prototypes 8 --head-hidden 32 --head-dim 16 --device cpu --precision fp32 --gate none"
)


def call(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    return stop.value.code or 0, *capsys.readouterr()


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_with_examples_and_the_exit_codes(capsys, name):
    code, out, _ = call(capsys, name, "--help")
    assert code == 0 and "exit codes: 0 done" in out and "--quiet" in out
    assert cli_help.EXAMPLES[name]
    for example in cli_help.EXAMPLES[name]:
        assert f"\n  {example}\n" in out
        words = shlex.split(example.partition(" > ")[0])
        assert words[:2] == ["upstep-fast", name]
        command = cli.COMMANDS[name]
        rest = command.named(words[2:])
        if rest[:1] == ["--config"]:
            rest = rest[2:]
        cli_help.check_flags(rest, command.config())


@pytest.mark.parametrize("name", cli_help.COMMON)
def test_help_fits_on_one_screen(capsys, name):
    code, out, _ = call(capsys, name, "--help")
    rows = sum(-(-max(len(line), 1) // 100) for line in out.splitlines())  # on a terminal of 100 columns
    assert code == 0 and rows <= 50
    config = cli.COMMANDS[name].config()
    options = re.findall(r"^  --([a-z-]+)(?: \S+)*? {1,}([A-Za-z].*)$", out.partition("\nupstep-fast ")[0], re.M)
    assert [flag for flag, _ in options][: len(required(config))] == required(config)
    assert {flag for flag, _ in options} == {dashed(f) for f in cli_help.COMMON[name] if f in paths(config)}
    assert f"{name} --help-all lists all options" in out


def required(config):
    return [dashed(name) for name in paths(config) if name not in defaults(config)]


def test_the_short_help_tells_choices_and_defaults(capsys):
    lines = call(capsys, "adapt", "--help")[1].splitlines()
    (method,) = [line for line in lines if line.startswith("  --method")]
    assert method.split(None, 2)[2] == "upstep, explora, diet: adaptation method (upstep)"
    (batch,) = [line for line in lines if line.startswith("  --batch-size")]
    assert (
        batch.endswith("(64)") and from_flat(AdaptConfig, model="m", data=("d",), out="o").optimization.batch_size == 64
    )
    (model,) = [line for line in lines if line.startswith("  --model")]
    assert model.endswith("(required)")


def test_the_first_page_lists_every_command(capsys):
    _, out, _ = call(capsys)
    listed = re.findall(r"^  (\w+) {2,}\S", out, re.M)
    assert sorted(listed) == sorted(cli.COMMANDS)


@pytest.mark.parametrize(
    ("flag", "meant"),
    [
        ("--lerning-rate", "--lr"),
        ("--learning_rate", "--lr"),
        ("--batchsize", "--batch-size"),
        ("--bach-size=3", "--batch-size"),
        ("--output-dir", "--out"),
        ("--lora-rank", "--lora-r"),
        ("--no-overwrit", "--overwrite"),
        ("--ressume", "--resume"),
        ("--grad-checkpointing", "--memory"),
    ],
)
def test_a_misspelt_flag_gets_one_line_with_the_nearest(capsys, flag, meant):
    code, out, err = call(capsys, "adapt", "--model", "m", flag, "3")
    wanted = f"upstep-fast: unknown option {flag.partition('=')[0]}; did you mean {meant}?\n"
    assert (code, out, err) == (2, "", wanted)


def test_a_flag_like_no_other_leads_to_help(capsys):
    assert call(capsys, "adapt", "--xyzzy")[2] == "upstep-fast: unknown option --xyzzy; --help lists the options\n"


def test_synonyms_name_fields_and_shadow_none():
    names = set(paths(AdaptConfig))
    assert set(cli_help.SYNONYMS.values()) <= names and not names & set(cli_help.SYNONYMS)


def complete(script: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    name = re.search(r"^complete -F (\w+) upstep-fast", script.read_text(), re.M)
    assert name
    line = f"source {script}; COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}; {name[1]}"
    shown = subprocess.run(
        ["bash", "--norc", "-c", line + '; printf "%s\\n" "${COMPREPLY[@]}"'],
        capture_output=True,
        text=True,
        check=True,
    )
    return shown.stdout.split()


def test_bash_completes_commands_flags_and_choices(capsys, tmp_path):
    _, out, _ = call(capsys, "completion", "bash")
    script = tmp_path / "upstep-fast"
    script.write_text(out)
    assert set(complete(script, "upstep-fast", "")) >= set(cli.COMMANDS)
    assert complete(script, "upstep-fast", "ada") == ["adapt"]
    assert complete(script, "upstep-fast", "adapt", "--sinkhorn") == ["--sinkhorn-iterations"]
    assert set(complete(script, "upstep-fast", "adapt", "--layout", "")) == {"symmetric", "asymmetric"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_a_script_of_its_shell(capsys, tmp_path, shell):
    code, out, err = call(capsys, "completion", shell)
    assert code == 0 and not err and "adapt" in out and "--sinkhorn-iterations" in out
    if shutil.which(shell):
        (tmp_path / "script").write_text(out)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True)


# a test for each exit code, from its real cause


def adapt(capsys, model, data, out, *more):
    return call(capsys, "adapt", "--model", model, "--data", data, "--out", out, *FAST.split(), *more)


def test_the_documented_codes_are_those_of_the_errors():
    listed = re.findall(r"^\| (\d+) \|", (ROOT / "docs/reference.md").read_text(), re.M)
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    raised = {kind.exit_code for kind in kinds if issubclass(kind, errors.UpstepError)}
    assert {int(code) for code in listed} == raised | {0}
    epilog = re.findall(r"\b(\d+) [a-z]", cli_help.EVERYWHERE.partition("exit codes:")[2])
    assert {int(code) for code in epilog} == raised | {0}


def test_exit_0(capsys, model, photos, tmp_path):
    code, out, _ = adapt(capsys, model, photos, tmp_path / "out")
    assert code == 0 and (tmp_path / "out" / "adapter" / "adapter_model.safetensors").is_file() and "adapter:" in out


def test_exit_1_when_the_run_fails(capsys, model, photos, tmp_path):
    code, _, err = adapt(capsys, model, photos, tmp_path / "out", "--lr", "1e30", "--clip", "0", "--steps", "40")
    assert code == 1 and "steps in a row" in err.splitlines()[-1]


def test_exit_2_for_usage_and_configuration(capsys, model, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    for more in (["--lora-r", "0"], ["--gate", "door"], []):
        assert adapt(capsys, model, photos, tmp_path / "out", *more)[0] == 2


def test_exit_3_for_data(capsys, model, tmp_path):
    assert adapt(capsys, model, tmp_path / "nowhere", tmp_path / "out")[0] == 3


def test_exit_4_when_the_adapter_learned_nothing(capsys, model, photos, tmp_path):
    # so small that no feature moves in fp32
    code, _, err = adapt(capsys, model, photos, tmp_path / "out", "--lr", "1e-35")
    assert code == 4 and "adapter" in err.splitlines()[-1]
    assert (tmp_path / "out" / "adapter" / "adapter_config.json").is_file()


def test_exit_75_when_interrupted_and_0_after_resume(capsys, model, photos, tmp_path):
    metrics = tmp_path / "out" / "metrics.jsonl"
    done = threading.Event()

    def stop_soon() -> None:
        while not done.wait(0.01):
            if metrics.exists() and metrics.read_text().count("\n") > 2:
                os.kill(os.getpid(), signal.SIGTERM)
                return

    watcher = threading.Thread(target=stop_soon)
    watcher.start()
    try:
        code, _, err = adapt(capsys, model, photos, tmp_path / "out", "--steps", "500")
    finally:
        done.set()
        watcher.join()
    assert code == 75 and "--resume" in err.splitlines()[-1]
    steps = metrics.read_text().count("\n")
    assert 2 < steps < 500
    assert adapt(capsys, model, photos, tmp_path / "out", "--steps", "500", "--resume")[0] == 0
    assert metrics.read_text().count("\n") == 500
