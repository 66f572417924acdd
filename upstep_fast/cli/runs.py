"""Commands that print lines of their own at their end. Modules are imported when a command needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def adapt(config: Any) -> None:
    """Adapt a model, and print the verdict and where things are."""
    from upstep_fast.report.next_steps import embed_command, look_commands
    from upstep_fast.report.run_record import read_config
    from upstep_fast.report.tables import print_verdicts
    from upstep_fast.runtime.distributed import is_first
    from upstep_fast.runtime.terminal import counted, format_duration, print_line
    from upstep_fast.train.adapt import run

    result, out = run(config), Path(config.output.out)
    if not is_first():
        return
    duration = format_duration(result.seconds)
    print_verdicts(result.verdict, result.measured)
    print_line(
        f"adapter: {result.adapter}  ({counted(result.steps, 'step')}, {result.opened} with an update, {duration})"
    )
    print_line(f"report: {out / 'report.html'}")
    for command in (embed_command(read_config(out), out), *look_commands(out)):
        print_line(f"next: {command}")


def evaluate(config: Any) -> None:
    """Measure a model, and print its accuracies."""
    from upstep_fast.evaluation.labeled import run
    from upstep_fast.report.tables import print_scores

    run(config, print_scores)


def finetune(config: Any) -> None:
    """Train a classifier, and print its accuracy."""
    from upstep_fast.report.next_steps import predict_command
    from upstep_fast.runtime.terminal import counted, format_duration, print_line
    from upstep_fast.train.finetune.run import run

    done = run(config)
    print_line(
        f"model: {done.model}  ({counted(done.epochs, 'epoch')}, {format_duration(done.metrics['seconds'])}, "
        f"{done.metrics['trainable_parameters']:,} trainable parameters)"
    )
    print(f"test: top-1 {done.metrics['top1']:.1f}, balanced {done.metrics['balanced']:.1f}")
    print_line(f"next: {predict_command(config)}")
    print_line(f"in Python: upstep_fast.load_finetuned({str(done.model)!r})")


def embed(config: Any) -> None:
    """Write features, and print what they are."""
    from upstep_fast.evaluation.embeddings import run_embed
    from upstep_fast.runtime.distributed import is_first
    from upstep_fast.runtime.terminal import print_line

    done = run_embed(config)
    if is_first():
        end, counts = ("/", f"; {done.counts}") if done.counts else ("", "")
        what = "tokens" if config.tokens else "features"
        print_line(f"{what}: {done.out}{end}  ({done.form}; {' x '.join(f'{n:,}' for n in done.shape)}{counts})")


def curate(config: Any) -> None:
    """Find what is wrong with a set of images, and print how much."""
    from upstep_fast.report.curation import PAGE, run_curate
    from upstep_fast.runtime.terminal import counted, print_line

    found = run_curate(config)
    for note in found.notes:
        print_line(note)
    print_line(f"{counted(len(found.names), 'image')}: " + ", ".join(f"{n:,} {k}" for k, n in found.counts.items()))
    if config.apply is not None:
        print_line(f"list: {config.apply}  ({counted(len(found.kept), 'image')} kept)")
    print_line(f"report: {found.out / PAGE}")


def export(config: Any) -> None:
    """Write the adapted model in another format."""
    from upstep_fast.model.export.export import run
    from upstep_fast.runtime.terminal import print_line

    done = run(config)
    print_line(f"export: {done.folder}  (features differ by at most {done.difference:.1e} on {done.images})")


def push(config: Any) -> None:
    """Push an adapter to the hub."""
    from upstep_fast.model.hub import push
    from upstep_fast.runtime.terminal import print_line

    print_line(f"pushed: {push(config)}")


def bench(config: Any) -> None:
    """Time the engine, and print the times."""
    from upstep_fast.cli.benchmark import run
    from upstep_fast.report.tables import print_timings

    print_timings(run(config))


def report(config: Any) -> None:
    """Write a report."""
    from upstep_fast.report.page import run
    from upstep_fast.runtime.terminal import print_line

    print_line(f"report: {run(config)}")
