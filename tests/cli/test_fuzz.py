"""Fuzz of the command line: any flags and inputs end in a documented exit code and, if not 0, one line that helps.

A try is a command with valid flags of which some are changed, from the flags' own types, and inputs that are empty,
cut, deep, endless, looping or named to do harm. Each runs in a fork of a worker process, with a limit of time.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import typing
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tally import tally

from upstep_fast.cli.commands import COMMANDS
from upstep_fast.config.explora import Dinov2Config, MaeConfig
from upstep_fast.config.flat import dashed, paths
from upstep_fast.config.value_types import field_kinds

HELPERS = Path(__file__).resolve().parents[1] / "helpers"
CODES = {0, 1, 2, 3, 4, 75}
TEXTS = (
    *("", " ", "0", "-1", "1", "2", "3", "0.5", "1.5", "nan", "inf", "-inf", "1e400", "1e-400", "-0.0", "1_0", "0x10"),
    *("99999999999999999999", "4294967296", "2147483648", "100000", "ten", "None", "True", "auto", "-", "-x", "~", "*"),
    *(
        "\x1b[2J",
        "a\nb",
        "\u202e",
        "\udcff",
        "x" * 5000,
        "[",
        "{",
        "'",
        "%s",
        "{0}",
        "\x7f",
        "٣",
        "../x",
        "first,,last",
    ),
)
OUTPUTS = (
    *("new", "new/deep/er", "full", "file", "pipe", "loop", "old", "x.npy", "x.safetensors", "x.parquet", "x.csv"),
    *("x.html", "x.json", "x.svg", "none/x.npy", "", ".", "\udcff", "a\nb", "\x1b[2J.npy", "n" * 300, "file/x.npy"),
)
INPUTS = {"model", "data", "adapter", "source", "whitening", "decoder", "dirs", "run", "query", "features"}
# inputs of one kind
ALIASES = {"source": "data", "dirs": "run", "decoder": "checkpoint", "run": "classifier", "query": "cut"}
WRITTEN = {"out", "json", "plot", "fit_whitening"}
# a large number of these is a long run and no fault
LENGTHS = {"steps", "epochs", "runs", "judge_patience", "judge_every", "patience", "accumulate", "max_skips"}
SHORT = {
    "device": ["cpu"],
    "precision": ["fp32"],
    "num_workers": ["0"],
    "batch_size": ["8"],
    "steps": ["2"],
    "prototypes": ["8"],
    "head_hidden": ["32"],
    "head_dim": ["16"],
    "lora_r": ["2"],
    "report_images": False,
    "runs": ["1"],
    "decoder_depth": ["1"],
    "decoder_width": ["16"],
    "decoder_heads": ["2"],
}
VALID = {
    "adapt": {"data": "photos", "out": "new"},
    "plan": {"data": "photos"},
    "finetune": {"data": "labeled", "out": "new", "epochs": "1"},
    "predict": {"run": "classifier", "data": "labeled", "out": "x.csv"},
    "eval": {"data": "labeled", "k": "3"},
    "embed": {"data": "photos", "out": "new.npy"},
    "curate": {"run": "run", "data": "labeled", "out": "new"},
    "search": {"run": "run", "query": "photos/00.png", "data": "photos", "k": "3"},
    "export": {"out": "new"},
    "push": {"run": "run", "repo": "someone/adapted"},  # refused here: there is no token
    "models": {"pattern": "vit_tiny_patch16_224"},
    "report": {"dirs": "run", "out": "new.html"},
    "completion": {"shell": "bash"},
    "bench": {},
    "doctor": {"device": "cuda"},  # refused here: its checks of every kernel take a while
    "demo": {"device": "cuda"},
}
WEIGHTS = {
    "adapt": 6,
    "finetune": 4,
    "predict": 3,
    "embed": 5,
    "search": 3,
    "eval": 4,
    "curate": 3,
    "export": 3,
    "push": 1,
    "report": 3,
    "plan": 2,
    "bench": 0.3,
    "completion": 0.4,
    "explore": 0,  # serves until it is interrupted
}


class Worker:
    """The process that runs the tries; started again if it dies."""

    def __init__(self, world: Path):
        self.world, self.process = world, None
        self.start()

    def start(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment["TQDM_DISABLE"] = "1"  # as the command sets it in a pipe, before it imports tqdm
        self.process = subprocess.Popen(
            [sys.executable, HELPERS / "fuzz_worker.py", self.world],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self, argv: list[str]) -> dict:
        self.process.stdin.write(json.dumps(argv) + "\n")
        self.process.stdin.flush()
        if line := self.process.stdout.readline():
            return json.loads(line)
        self.start()
        return {"code": "the worker died", "out": "", "err": "", "wrong": None, "seconds": 0.0}


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    found = Worker(tmp_path_factory.mktemp("fuzz") / "world")
    yield found
    found.process.stdin.close()
    found.process.wait(timeout=30)


def command_line(rng: random.Random, world: Path) -> list[str]:
    """Return a command's arguments: valid ones, with some changed, left out, misspelled or added."""
    name = rng.choices(list(COMMANDS), [WEIGHTS.get(name, 1) for name in COMMANDS])[0]
    flags = changed_flags(name, rng, world)
    argv = [name]
    if rng.random() < 0.07:
        argv += ["--config", str(rng.choice(sorted((world / "odd").glob("*"))))]
    elif name == "adapt" and rng.random() < 0.15:  # the run that lies in every try's folder
        argv += ["--config", f"{world}/good/run/config.toml"]
        flags["out"] = ["old"]
        flags |= rng.choice(({"resume": True}, {"overwrite": True}, {"resume": True, "steps": ["3"]}, {}))
    for flag, value in flags.items():
        if isinstance(value, bool):
            argv.append(f"--{dashed(flag)}" if value else f"--no-{dashed(flag)}")
        elif len(value) == 1 and rng.random() < 0.3:
            argv.append(f"--{dashed(flag)}={value[0]}")
        else:
            argv += [f"--{dashed(flag)}", *value]
    if rng.random() < 0.04:
        stray = rng.choice(("--stepz", "stray", "--", "--no-lr", "-h", "--=", "\x1b[2J"))
        argv.insert(rng.randint(0, len(argv)), stray)
    return argv


def changed_flags(name: str, rng: random.Random, world: Path) -> dict[str, Any]:
    """Return {flag: texts, or True or False} of a command: those of a short run, a few of them changed."""
    kinds = dict(field_kinds(COMMANDS[name].config()))
    flags: dict[str, Any] = {flag: value for flag, value in SHORT.items() if flag in kinds}
    if "model" in kinds and name != "predict":
        flags["model"] = [f"local-dir:{world}/good/model"]
    flags |= {flag: [value] for flag, value in VALID[name].items()}
    for flag in INPUTS & set(flags) - {"model"}:
        flags[flag] = [f"{world}/good/{flags[flag][0]}"]
    if name in ("adapt", "plan") and rng.random() < 0.3:
        objective = rng.choice(("dinov2", "mae"))
        flags |= {"method": ["explora"], "objective": [objective]}
        kinds |= field_kinds(Dinov2Config if objective == "dinov2" else MaeConfig)
        flags = {flag: value for flag, value in flags.items() if flag in paths(MaeConfig) or name == "plan"}
    changed = rng.sample(sorted(kinds), min(len(kinds), rng.choice((0, 1, 1, 2, 3))))
    if (files := sorted((INPUTS | WRITTEN) & set(kinds))) and rng.random() < 0.5:
        changed.append(rng.choice(files))
    for flag in sorted(set(changed) - {"debug", "device" if name in ("doctor", "demo") else "debug"}):
        flags[flag] = value_of(flag, kinds[flag], rng, world)
    if "model" in flags and not flags["model"][0].startswith("local-dir:") and rng.random() < 0.8:
        flags["model"] = [str(rng.choice(sorted((world / "odd").glob("checkpoint*"))))]
        flags["arch"] = ["vit_tiny_patch16_224"]
    if rng.random() < 0.07 and flags:
        del flags[rng.choice(sorted(flags))]
        if name in ("doctor", "demo"):
            flags["device"] = ["tpu"]
    return flags


def value_of(flag: str, kind: Any, rng: random.Random, world: Path) -> Any:
    """Return a value for a flag: True or False, or one or several texts."""
    if kind is bool:
        return rng.random() < 0.5
    choices = [text for part in (kind, *typing.get_args(kind)) if typing.get_origin(part) is typing.Literal
               for text in typing.get_args(part)]  # fmt: skip
    if choices and rng.random() < 0.8:
        return [rng.choice(choices)]
    if flag in WRITTEN and rng.random() < 0.9:
        return [rng.choice(OUTPUTS)]
    if flag in INPUTS and rng.random() < 0.9:
        found = rng.choice([*sorted(world.glob("*/*")), world / "nowhere"])
        likely = sorted((world / "odd").glob(f"{ALIASES.get(flag, flag)}*"))
        path = rng.choice(likely) if likely and rng.random() < 0.7 else found
        if flag == "model":
            prefix = "local-dir:" if path.is_dir() else rng.choice(("", "", "local-dir:", "hf-hub:"))
            return [f"{prefix}{path}"]
        if flag in ("data", "dirs"):
            return [rng.choice(("", "", "", "", "hf:")) + str(path), *[str(found)] * (rng.random() < 0.2)]
        return [str(path)]
    texts = [text for text in TEXTS if flag not in LENGTHS or not (text.isdigit() and int(text) > 3)]
    if flag == "pattern":  # every model's blueprint takes minutes
        texts.remove("*"), texts.remove("")
    several = "tuple" in str(kind)
    return [rng.choice(texts) for _ in range(rng.choice((0, 1, 2, 3)) if several else 1)]


KNOWN = {word for command in COMMANDS.values() for name in paths(command.config()) for word in (name, dashed(name))}
KNOWN |= set(paths(MaeConfig)) | set(paths(Dinov2Config)) | set(COMMANDS) | {"config", "option", "command", "flag"}
LOGGED = re.compile(r"(INFO|WARNING|ERROR) |step \d+/|usage: |epoch \d+/|[a-z: ]+: .* (so far|left)$")


def fault(argv: list[str], answer: dict) -> str | None:
    """Return what is wrong with how a command ended; None if nothing is."""
    code, err = answer["code"], answer["err"]
    if code not in CODES:
        return f"exit code {code}"
    if "Traceback (most recent call last)" in err or "--debug" in err:
        return "a traceback, or the advice to look at one"
    if argv[0] != "completion":
        for text in (answer["out"], err):
            if steering := {char for char in text if unicodedata.category(char) in ("Cc", "Cf", "Cs")} - {"\n"}:
                return f"control characters {steering}"
    if code == 0:
        return answer["wrong"]
    lines = [line for line in err.splitlines() if not LOGGED.match(line)]
    if len(lines) != 1 or not lines[0].startswith("upstep-fast: "):
        return f"{len(lines)} lines of error"
    text = lines[0].removeprefix("upstep-fast: ")
    if re.match(r"\w*(Error|Exception)\b", text):
        return "an exception's name in place of a message"
    if not KNOWN & set(re.findall(r"[a-z0-9_-]+", text)) and not any(arg and arg in text for arg in argv):
        return "a message without a field or path"
    return None


def sweep(worker: Worker, seed: int, count: int) -> list[str]:
    rng, faults, codes, wrong = random.Random(seed), [], {}, 0
    for _ in range(count):
        argv = command_line(rng, worker.world)
        answer = worker(argv)
        codes[answer["code"]] = codes.get(answer["code"], 0) + 1
        if reason := fault(argv, answer):
            wrong += answer["wrong"] is not None
            last = answer["err"].strip().splitlines()[-1:]
            faults.append(
                f"{reason}: upstep-fast {' '.join(map(ascii, argv))[:1500]} -> {last} {answer['seconds']:.1f} s"
            )
    tally("command line", f"seed {seed}", count, wrong=wrong, tracebacks=len(faults) - wrong)
    print(f"{count} tries, exit codes {codes}, {len(faults)} faults")
    return faults


@pytest.mark.timeout(900)
def test_200_tries(worker):
    faults = sweep(worker, 0, 200)
    assert not faults, "\n".join(faults)


@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", range(1, 26))
def test_5000_tries(worker, seed):
    faults = sweep(worker, seed, 200)
    assert not faults, "\n".join(faults)
