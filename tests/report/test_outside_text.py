"""Names that others chose reach terminals, logs, tables and CSV files as one harmless line or cell."""

from __future__ import annotations

import csv
import io
import logging
import os
import subprocess
import unicodedata
import warnings

import pytest

from upstep_fast.cli import commands
from upstep_fast.cli.error_lines import format_warning
from upstep_fast.data.loading.skipped_images import csv_cell, write_skipped
from upstep_fast.errors import MAX_LINE, DataError
from upstep_fast.report import logs
from upstep_fast.report.next_steps import shell_command
from upstep_fast.runtime import terminal

HOSTILE = {
    "title": "\x1b]0;title\x07\x1b[2J",
    "C1": "\x9b31m\x85",
    "forged": "a\n2026-11-30 10:00:00,000 ERROR forged",
    "forged by a carriage return": "a\rERROR forged",
    "separators": "a\u2028ERROR b\u2029c\x0bd\x0c",
    "reversed": "\u202egpj.exe\u2066\u200b",
    "surrogate": os.fsdecode(b"\xff\xfe.jpg"),
    "markup": "[red]:smile:[/red] [link=http://x]y[/link]",
    "long": "n" * 900_000,
}
KINDS = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def check_line(text: str) -> None:
    """Fail unless `text` is one line that steers no terminal."""
    assert text.endswith("\n") and text.count("\n") == 1
    assert not {unicodedata.category(char) for char in text[:-1]} & KINDS
    assert (len(text) < MAX_LINE + 100 and text.isprintable()) or text[:-1].isprintable()


@pytest.fixture(params=HOSTILE)
def name(request):
    return HOSTILE[request.param]


@pytest.fixture
def logger():
    log = logging.getLogger("upstep_fast")
    handlers, level = log.handlers[:], log.level
    yield log
    log.handlers[:] = handlers
    log.setLevel(level)


def test_the_final_error_is_one_line(name, capsys, monkeypatch):
    def fail(config):
        raise DataError(f"data: {name} cannot be read; give another")

    monkeypatch.setitem(commands.COMMANDS, "models", commands.Command(commands.COMMANDS["models"].config, fail))
    with pytest.raises(SystemExit) as stop:
        commands.main(["models"])
    error = capsys.readouterr().err
    check_line(error)
    assert stop.value.code == 3 and error.startswith("upstep-fast: data: ") and "give another" in error


def test_console_and_train_log_have_one_line_per_record(name, capsys, tmp_path, logger):
    logs.setup_logging()
    with pytest.raises(DataError), logs.train_log(tmp_path / "train.log"):
        logger.warning("data: %s", name)
        raise DataError(f"data: {name}")
    check_line(capsys.readouterr().err)
    lines = (tmp_path / "train.log").read_text().splitlines(keepends=True)
    assert len(lines) == 2 and all(" data: " in line for line in lines)
    for line in lines:
        check_line(line)


def test_warnings_of_libraries_are_one_line(name, capsys, logger):
    logs.setup_logging()
    assert logging.lastResort is not None
    logging.lastResort.handle(
        logging.makeLogRecord({"name": "timm", "levelno": 30, "levelname": "WARNING", "msg": name})
    )
    check_line(capsys.readouterr().err)


def test_a_traceback_in_train_log_forges_no_record(tmp_path, logger):
    with pytest.raises(RuntimeError), logs.train_log(tmp_path / "train.log"):
        raise RuntimeError(HOSTILE["forged"])
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert " ERROR RuntimeError: a" in lines[0] and all(line.startswith("    ") for line in lines[2:])


def test_rich_shows_the_same_on_a_terminal(name, monkeypatch, logger):
    # a real terminal is in test_terminal.py; here only what rich adds to it: no markup, emoji or control characters
    monkeypatch.setattr(terminal, "is_plain", lambda **_: False)
    logs.setup_logging()
    output = logger.handlers[0].console.file = io.StringIO()
    logger.warning("data: %s", name)
    table = terminal.Table("name")
    table.add_row(name)
    console = terminal.console()
    console.file = output
    console.print(table)
    assert not {unicodedata.category(char) for char in output.getvalue().replace("\n", "")} & KINDS
    assert "[red]:smile:" in output.getvalue() or name != HOSTILE["markup"]


def test_results_and_warnings_are_one_line(name, capsys):
    terminal.print_line(f"features: {name[:1000]}")
    check_line(capsys.readouterr().out)
    with warnings.catch_warnings():
        warnings.formatwarning = format_warning
        check_line(warnings.formatwarning(UserWarning(name), UserWarning, "file.py", 1))


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", "\n=", " =", "\uff1d", "x\r=", "x\n=", "x\n\r="])
def test_a_csv_cell_is_text_to_every_reader(start, tmp_path):
    name = f'{start}SUM(1+1),"b";.jpg'
    write_skipped(tmp_path / "skipped.csv", [(name, name), ("plain.jpg", "no image")])
    raw = (tmp_path / "skipped.csv").read_bytes()
    assert not any(byte < 32 and byte != 10 for byte in raw)
    rows = list(csv.reader(io.StringIO(raw.decode(), newline="")))
    assert rows[1:] == [[csv_cell(name)] * 2, ["plain.jpg", "no image"]]
    check_cells(rows)
    pandas = pytest.importorskip("pandas", reason="the second reader")
    frame = pandas.read_csv(tmp_path / "skipped.csv")
    check_cells([list(frame.columns), *frame.values.tolist()])


def check_cells(rows: list[list[str]]) -> None:
    assert [len(row) for row in rows] == [2, 2, 2]
    for line in [line for row in rows for cell in row for line in cell.splitlines()]:
        assert not line.lstrip().startswith(("=", "+", "-", "@", "\uff1d"))


@pytest.mark.parametrize("part", [*list(HOSTILE.values())[:-1], "it's", "back\\slash\n", "\udcffab"])
def test_a_command_to_copy_is_that_command(part):
    line = shell_command(["printf", "%s", part])
    assert line.isprintable()
    run = subprocess.run(
        ["bash", "-c", line], capture_output=True, env={"LC_ALL": "C.UTF-8", "PATH": os.environ["PATH"]}
    )
    assert run.stdout == os.fsencode(part)
