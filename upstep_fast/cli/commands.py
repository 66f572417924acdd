"""The commands, generated from the config dataclasses.

    upstep-fast COMMAND [--config FILE.toml] [--quiet] [--plain] [--flag value ...]

A file given with --config is read first and flags override it. Exit codes: 0 done, 1 failed, 2 usage or
configuration, 3 data unusable, 4 adapter or quality check failed, 75 interrupted (docs/reference.md).
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import itertools
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

from upstep_fast.cli import runs
from upstep_fast.cli.error_lines import describe_system_error, format_warning, print_error, print_traceback
from upstep_fast.cli.parse import HELP, parse, take
from upstep_fast.config.flat import dashed
from upstep_fast.errors import ConfigError, Interrupted, UpstepError, first_line
from upstep_fast.runtime import exit_signals

USAGE = """\
usage: upstep-fast COMMAND [--config FILE.toml] [options]

  demo        adapt a small model to hand-sign photographs, offline, in minutes
  plan        memory and time of a run, estimated before the run; batch and level that fit in a given memory
  adapt       adapt a pretrained ViT to a folder of unlabeled images
  finetune    train a classifier on labeled images or clips, the backbone frozen or not
  predict     write the class of each image by a fine-tuned model, and measure it where there are labels
  eval        k-NN and linear probe of a model, with and without an adapter
  embed       write features of images to a file, or to a folder that grows with them
  explore     look through images in a local web page: maps before and after, neighbors, search by an image
  curate      find copies, odd images, wrong classes and leaks; write the list of images to keep
  search      find the images that are most similar to an image
  export      write the adapted model for timm, transformers, PEFT, DINOv2, ONNX or torch.export
  push        push an adapter and its card to the Hugging Face Hub
  models      list the models that can be adapted, with size, input and license
  report      write a run's HTML report again, or compare several runs
  doctor      implementations chosen on this machine, with reasons; checks every kernel
  bench       time the engine against eager PyTorch and PEFT on this machine
  completion  print the script that completes commands and flags in your shell

upstep-fast COMMAND --help lists a command's options and shows examples.
example: upstep-fast adapt --model vit_base_patch16_224 --data photos/ --out adapted/"""


@dataclass(frozen=True)
class Command:
    """One command: its configuration and what runs it."""

    config: Callable[[], type]
    run: Callable[[Any], None] | None  # None: `run` of the module
    module: str | None = None  # of the package, whose import takes seconds; the start-up's progress covers it
    positional: tuple[str, ...] = ()  # the fields that may be given without their flags, in this order

    def named(self, args: Sequence[str]) -> list[str]:
        """Return `args` with the flags of those that stand in front without one; the last field takes the rest."""
        values = list(itertools.takewhile(lambda arg: not arg.startswith("-"), args))
        found: list[str] = []
        for i, field in enumerate(self.positional[: len(values)]):
            flag = f"--{dashed(field)}"
            if any(arg.partition("=")[0] == flag for arg in args):
                raise ConfigError(f"{field}: {values[i]!r} and {flag} both give it; give one of them")
            found += [flag, *(values[i:] if field == self.positional[-1] else [values[i]])]
        return [*found, *args[len(values) if found else 0 :]]


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    exit_signals.forget()
    sys.excepthook, warnings.formatwarning = print_traceback, format_warning
    try:
        _dispatch(args, debug, is_program=argv is None)
    except UpstepError as error:
        if debug:
            raise
        if isinstance(error, Interrupted) and "TORCHELASTIC_RUN_ID" in os.environ:
            # torchrun sends it to all once the first has ended; the exit code is to stay this one
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if not error.already_reported:
            print_error(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print_error("interrupted")
        sys.exit(Interrupted.exit_code)
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe; the interpreter must not flush into it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (OSError, MemoryError) as error:
        if debug:
            raise
        text, code = describe_system_error(error, args)
        print_error(text)
        sys.exit(code)
    except Exception as error:
        if debug:
            raise
        if exit_signals.was_interrupted():  # an import turned the KeyboardInterrupt into an error of its own
            print_error("interrupted")
            sys.exit(Interrupted.exit_code)
        print_error(f"{type(error).__name__}: {first_line(error)} (run again with --debug for the traceback)")
        sys.exit(1)
    sys.exit(0)


def _dispatch(args: list[str], debug: bool, is_program: bool) -> None:
    from upstep_fast.cli import help as cli_help
    from upstep_fast.runtime import progress, terminal

    terminal.set_style(plain=take(args, "--plain"), quiet=take(args, "--quiet"))
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        return
    if args[0] == "--version":
        from upstep_fast.version import __version__

        print(__version__)
        return
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
        raise ConfigError(f"unknown command {name!r}; {hint}")
    command = COMMANDS[name]
    rest = command.named(rest)
    try:
        config = parse(command.config(), rest, f"upstep-fast {name}", command.positional)
    except SystemExit as stop:
        if not stop.code and HELP & set(rest):
            print(cli_help.epilog(name))
        raise
    with progress.track(f"{name}: starting"), _without_collection(freeze=is_program):  # imports PyTorch
        from upstep_fast.report.logs import setup_logging

        setup_logging(debug)
        module = None if command.module is None else import_module(f"upstep_fast.{command.module}")
    exit_signals.started()
    if command.run is not None:
        command.run(config)
    elif module is not None:
        module.run(config)


@contextlib.contextmanager
def _without_collection(freeze: bool) -> Iterator[None]:
    """Collect no garbage within the context: imports make none, and looking for it takes 1.2 of their 4.7 s.

    freeze: never look at what they made again, which saves another .5 s up to the first step of base_tiny.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if freeze:
            gc.freeze()
        if was_enabled:
            gc.enable()


def _config(name: str, module: str = "tools") -> Callable[[], type]:
    def load() -> type:
        return getattr(import_module(f"upstep_fast.config.{module}"), name)

    return load


def _completion(config: Any) -> None:
    from upstep_fast.cli.help import completion

    completion(config.shell, {name: command.config() for name, command in COMMANDS.items()})


COMMANDS = {
    "bench": Command(_config("BenchConfig"), runs.bench, "cli.benchmark"),
    "demo": Command(_config("DemoConfig"), None, "cli.demo"),
    "plan": Command(_config("PlanConfig", "plan"), None, "cli.plan"),
    "adapt": Command(_config("AdaptConfig", "adapt"), runs.adapt, "train.adapt"),
    "finetune": Command(_config("FinetuneConfig", "finetune"), runs.finetune, "train.finetune.run"),
    "predict": Command(_config("PredictConfig", "predict"), None, "cli.predict", positional=("run",)),
    "eval": Command(_config("EvalConfig", "evaluate"), runs.evaluate, "evaluation.labeled", positional=("adapter",)),
    "embed": Command(_config("EmbedConfig", "evaluate"), runs.embed, "evaluation.embeddings", positional=("adapter",)),
    "explore": Command(_config("ExploreConfig", "explore"), None, "explorer.open", positional=("run",)),
    "curate": Command(_config("CurateConfig", "curate"), runs.curate, "report.curation", positional=("run",)),
    "search": Command(_config("SearchConfig", "search"), None, "cli.search", positional=("run", "query")),
    "export": Command(_config("ExportConfig"), runs.export, "model.export.export", positional=("adapter",)),
    "push": Command(_config("PushConfig"), runs.push, "model.hub", positional=("run", "repo")),
    "models": Command(_config("ModelsConfig"), None, "cli.models", positional=("pattern",)),
    "report": Command(_config("ReportConfig"), runs.report, "report.page", positional=("dirs",)),
    "doctor": Command(_config("DoctorConfig"), None, "cli.doctor"),
    "completion": Command(_config("CompletionConfig"), _completion, positional=("shell",)),
}
