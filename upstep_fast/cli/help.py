"""Help of the command line: examples below every --help, suggestions for misspelled flags, shell completion."""

from __future__ import annotations

import difflib
import importlib.util
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Union

from upstep_fast.config.files import RENAMED_FLAGS, notice_renamed
from upstep_fast.config.flat import dashed, paths, undashed
from upstep_fast.errors import ConfigError
from upstep_fast.runtime import terminal

# each of them is parsed by tests/docs/test_docs.py
EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": ("upstep-fast demo", "upstep-fast demo --steps 20 --out quick-look/"),
    "adapt": (
        "upstep-fast adapt --model vit_base_patch16_224 --data photos/ --out adapted/",
        "upstep-fast adapt --config adapted/config.toml --resume",
        "upstep-fast adapt --model weights.pth --arch vit_large_patch14_dinov2 --data 'shards/*.tar' --out adapted/",
    ),
    "finetune": (
        "upstep-fast finetune --model vit_base_patch16_224 --data labeled/ --out classifier/ --json scores.json",
        "upstep-fast finetune --model vit_base_patch16_224 --data labeled/ --out classifier/ --method lora "
        "--adapter adapted/adapter --mixup 0.2",
        "upstep-fast finetune --model vit_base_patch16_224 --data clips/ --out classifier/ --frames 8 "
        "--preset-views none --cache disk",
    ),
    "predict": (
        "upstep-fast predict classifier/ --data photos/ --out predictions.csv",
        "upstep-fast predict classifier/ --data photos/ --out predictions.csv --top 5",
    ),
    "plan": (
        "upstep-fast plan --model vit_large_patch14_clip_224.openai --device cuda --fit 24GB",
        "upstep-fast plan --model vit_small_patch16_224 --batch-size 64 --calibrate",
    ),
    "eval": (
        "upstep-fast eval adapted/ --data labeled/ --json scores.json",
        "upstep-fast eval --model vit_base_patch16_224 --data labeled/",
        "upstep-fast eval adapted/ --data labeled/ --measures all",
    ),
    "embed": (
        "upstep-fast embed adapted/ --data photos/ --out features.npy",
        "upstep-fast embed adapted/ --data photos/ --out features/",
        "upstep-fast embed --model vit_base_patch16_224 --data photos/ --out features.npy",
        "upstep-fast embed adapted/ --data photos/ --tokens --dtype fp16 --out tokens.zarr",
    ),
    "explore": (
        "upstep-fast explore adapted/",
        "upstep-fast explore adapted/ --data photos/ --columns table.csv --port 8080 --no-browser",
    ),
    "curate": (
        "upstep-fast curate adapted/ --data photos/ --out curation/",
        "upstep-fast curate adapted/ --data photos/ --against test/ --apply keep.txt",
    ),
    "search": (
        "upstep-fast search adapted/ photo.jpg --data photos/",
        "upstep-fast search adapted/ photo.jpg --k 50 --json similar.json --out similar.html",
    ),
    "export": ("upstep-fast export adapted/ --format hf --out exported/",),
    "push": ("upstep-fast push adapted/ OWNER/NAME --private",),
    "models": ("upstep-fast models", "upstep-fast models '*dinov2*'"),
    "report": ("upstep-fast report adapted/", "upstep-fast report first/ second/ --out comparison.html"),
    "doctor": ("upstep-fast doctor", "upstep-fast doctor --json"),
    "bench": ("upstep-fast bench --model vit_small_patch16_224 --batch-size 8 --json times.json",),
    "completion": ("upstep-fast completion bash > ~/.local/share/bash-completion/completions/upstep-fast",),
}

EVERYWHERE = """\
every command also takes:
  --config FILE.toml   read options from a file; flags override it
  --quiet              warnings, errors and results only
  --plain              no colors, no progress bar, tables as Markdown; the default in a pipe

exit codes: 0 done, 1 failed, 2 usage or configuration, 3 data unusable, 4 adapter or quality check failed,
75 interrupted, continue with --resume"""

# flags that --help lists, with the required ones first; --help-all lists all
_RUN = (
    *("model", "data", "out", "arch", "img_size", "method", "overwrite", "resume", "batch_size", "epochs", "lr"),
    *("lora_r", "lora_targets", "preset_views", "device", "precision", "seed"),
)
COMMON: dict[str, tuple[str, ...]] = {
    "adapt": (
        *(*_RUN, "preset", "steps", "budget", "gate", "judge_every", "strength", "memory"),
        *("checkpoint_every", "objective", "unfreeze", "from_"),
    ),
    "plan": (
        *(*_RUN, "preset", "steps", "memory", "accumulate", "cuda_graphs", "shard_weights"),
        *("world_size", "fit", "calibrate", "json"),
    ),
    "finetune": (*_RUN, "adapter", "json", "test_fraction", "frames", "cache", "patience", "mixup", "losa_rank"),
}

# what other trainers call a field of ours
SYNONYMS = {
    "learning_rate": "lr",
    "output_dir": "out",
    "data_dir": "data",
    "checkpoint": "model",
    "rank": "lora_r",
    "lora_rank": "lora_r",
    "alpha": "lora_alpha",
    "target_modules": "lora_targets",
    "batch_size_per_gpu": "batch_size",
    "grad_checkpointing": "memory",
    "workers": "num_workers",
    "resume_interrupted": "resume",
    "num_prototypes": "prototypes",
    "adapter": "from_",
    "init_from": "from_",
}


def epilog(command: str) -> str:
    """Return the text below a command's options."""
    lines = [f"  {example}" for example in EXAMPLES.get(command, ())]
    more = [f"upstep-fast {command} --help-all lists all options\n"] if command in COMMON else []
    return "\n".join([*more, f"example{'s' * (len(lines) > 1)}:", *lines, "", EVERYWHERE])


def shown_flags(config_class: type, command: str, *, show_all: bool) -> list[str]:
    """Return the flags that --help lists, without those that have no effect with the method."""
    unused = getattr(config_class, "unused", ())
    listed = None if show_all else COMMON.get(command)
    return [name for name in paths(config_class) if name not in unused and (listed is None or name in listed)]


def check_flags(args: Sequence[str], config_class: type) -> None:
    """Raise ConfigError with the nearest name at the first flag that `config_class` does not have."""
    fields = list(paths(config_class))
    for arg in args:
        flag = arg.partition("=")[0]
        name = undashed(flag[2:])
        if not flag.startswith("--") or name in fields or name.removeprefix("no_") in fields:
            continue
        if name in ("help", "help_all") or name.startswith("tyro_"):
            continue
        known = {**{other: ours for other, ours in SYNONYMS.items() if ours in fields}, **{f: f for f in fields}}
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean --{dashed(known[near[0]])}?" if near else "--help lists the options"
        raise ConfigError(f"unknown option {flag}; {hint}")


def renamed_flags(args: Sequence[str]) -> list[str]:
    """Return `args` with the new names of renamed flags; each old name prints one line on stderr."""
    found = []
    for arg in args:
        flag, equals, value = arg.partition("=")
        if (old := flag.removeprefix("--").replace("-", "_")) in RENAMED_FLAGS and flag.startswith("--"):
            notice_renamed(old)
            flag = f"--{dashed(RENAMED_FLAGS[old])}"
        found.append(flag + equals + value)
    return found


def plain_help() -> None:
    """Make tyro's help and errors follow the style of this process, which it would not by itself."""
    import tyro

    # one setting for both streams: errors go to stderr although tyro looks at stdout alone
    color = terminal.has_color() and terminal.has_color(stderr=True)
    boxes = not (terminal.is_plain() or terminal.is_plain(stderr=True))
    tyro._experimental_options["ansi_codes"] = color
    tyro._experimental_options["utf8_boxes"] = boxes


def completion(shell: str, configs: Mapping[str, type]) -> None:
    """Print the script that completes commands and flags in `shell` (bash, zsh, tcsh or fish)."""
    import tyro

    from upstep_fast.cli.tyro_class import for_tyro

    if shell == "tcsh" and importlib.util.find_spec("shtab") is None:
        raise ConfigError("shell: tcsh needs shtab, which is not installed; pip install shtab")
    kinds: Any = tuple(Annotated[for_tyro(kind), tyro.conf.subcommand(name)] for name, kind in configs.items())
    options = (tyro.conf.OmitArgPrefixes,)
    tyro.cli(Union[kinds], args=["--tyro-print-completion", shell], prog="upstep-fast", config=options)  # noqa: UP007
