"""The report: its numbers are those that the run wrote, and every text is escaped."""

import itertools
import json
import logging
import math
import re
import shlex
from html.parser import HTMLParser

import pytest
import timm
import torch
from adapt_configs import upstep_config
from PIL import Image

import upstep_fast
from upstep_fast.cli import commands as cli
from upstep_fast.cli import parse
from upstep_fast.cli.commands import main
from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.evaluate import EmbedConfig, EvalConfig
from upstep_fast.config.explore import ExploreConfig
from upstep_fast.config.files import to_toml
from upstep_fast.config.flat import flat
from upstep_fast.config.search import SearchConfig
from upstep_fast.config.tools import ExportConfig, ReportConfig
from upstep_fast.data.loading.skipped_images import write_skipped
from upstep_fast.errors import ConfigError, Interrupted
from upstep_fast.report import accuracy, charts, logs
from upstep_fast.report import metrics as report
from upstep_fast.report import page as report_page
from upstep_fast.report.charts import Line
from upstep_fast.report.next_steps import embed_command, next_steps
from upstep_fast.report.run_record import number, read_record
from upstep_fast.train import loop as trainer

VOID = {"meta", "br"}
HOSTILE = (
    "<script>alert(1)</script>.jpg",
    '"><img src=x onerror=alert(1)>.png',
    "</style></pre><h1>mine</h1>",
    "'; DROP TABLE runs; --&amp;&lt;",
    "ab\u202egpj.exe",
    "line\u2028break\x00\x1b[31m",
)


@pytest.fixture(autouse=True)
def own_logger():
    """Reset the package's logger, which the commands configure for the process."""
    logger = logging.getLogger("upstep_fast")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers[:], logger.propagate = [], True
    yield
    logger.handlers[:], logger.level, logger.propagate = before


class Page(HTMLParser):
    """Elements, attributes and texts of a page; asserts that every element is closed, in order."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.texts, self._open = [], [], [], []
        self.rows, self.tiles = [], {}
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if self._open and self._open[-1] == "dt":
            self._label = data
        if self._open and self._open[-1] == "dd":
            self.tiles[self._label] = data

    @property
    def text(self):
        return "\n".join(self.texts)


def row(step, **changes):
    return {
        "step": step,
        "loss": 6 - 0.01 * step,
        "center": 0.5 / (1 + step),
        "open": True,
        "lr": 1e-3,
        "bad": None,
        "images_per_s": 100.0 + step,
        "data_wait": 0.002,
        "epoch": 0,
        "replaced": 0,
    } | changes


def make_run(folder, rows, *, skipped=(), scores=None, log="", **options):
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(model="vit_base_patch16_224", data=("photos",), out=str(folder), steps=len(rows) or 5, batch_size=10)
    (folder / "config.toml").write_text(to_toml(upstep_config(**config | options)))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    write_skipped(folder / "skipped.csv", skipped)
    if scores is not None:
        (folder / "eval.json").write_text(json.dumps(scores))
    if log:
        (folder / "train.log").write_text(log)
    return folder


def page_of(folder):
    return Page(report_page.write(folder).read_text(encoding="utf-8"))


def check_harmless(page):
    assert not {"script", "img", "iframe", "link", "object", "a", "form"} & set(page.tags)
    names = {name for name, _ in page.attributes}
    assert not {name for name in names if name.startswith("on")} and not {"src", "srcset", "style"} & names
    # only thumbnails: their bytes, or a reference by number
    for name, value in page.attributes:
        assert name != "href" or re.fullmatch(r"#t\d+|data:image/webp;base64,[A-Za-z0-9+/=]+", value)


def test_shows_the_numbers_of_metrics_jsonl(tmp_path):
    rows = [row(i, open=i % 4 != 3, loss=None if i % 4 == 3 else 6.25 - 0.013 * i) for i in range(40)]
    page = page_of(make_run(tmp_path / "run", rows))
    tiles = page.tiles
    assert tiles["steps"] == "40 of 40" and tiles["steps with an update"] == "30" and tiles["images seen"] == "400"
    ends = [float(v) for v in tiles["loss, first and last"].split(" → ")]
    assert ends == pytest.approx([rows[0]["loss"], rows[38]["loss"]], rel=1e-3)
    ends = [float(v) for v in tiles["center length, first and last"].split(" → ")]
    assert ends == pytest.approx([rows[0]["center"], rows[39]["center"]], rel=1e-3)
    assert float(tiles["images/s, median"]) == pytest.approx(119.5, rel=1e-3)
    seconds = sum(10 / r["images_per_s"] for r in rows)
    assert float(tiles["time waiting for images"].split()[0]) == pytest.approx(100 * 40 * 0.002 / seconds, abs=0.06)
    assert page.tags.count("svg") == 4 and page.tags.count("polyline") == 4 and page.tags.count("rect") == 10
    assert "finished" in page.texts and "not finished" not in page.texts


def test_nothing_is_loaded_or_run_and_names_are_only_text(tmp_path):
    folder = tmp_path / "out <b>&"
    skipped = [(name, name) for name in HOSTILE]
    scores = {"base": {"knn": HOSTILE[0]}, "n_test": HOSTILE[1], "k": HOSTILE[2], "source": HOSTILE}
    log = "".join(f"2026-11-21 03:50:02,123 WARNING {name}\n" for name in HOSTILE)
    make_run(
        folder,
        [row(0, loss=HOSTILE[0], center=HOSTILE, images_per_s={}), row(1, bad=HOSTILE[0])],
        skipped=skipped,
        scores=scores,
        log=log,
        model=HOSTILE[1],
        data=HOSTILE,
    )
    source = report_page.write(folder).read_text(encoding="utf-8")
    page = Page(source)
    check_harmless(page)
    assert "Content-Security-Policy" in source and "default-src 'none'" in source
    assert not re.search(r"https?://|url\(|@import", source)
    for name in HOSTILE[:4]:
        assert [name, name] in page.rows
    # characters that reverse or hide text are replaced by their codes
    assert all(c.isprintable() or c == "\n" for c in page.text) and "\\u{202e}" in page.text
    check_harmless(Page(report_page.comparison_page([read_record(folder)] * 2)))


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [row(0)],
        [row(i, open=False, loss=None) for i in range(9)],
        [row(i, loss=None, bad="the loss is nan") for i in range(3)],
        [row(i, loss=math.nan, center=math.inf, images_per_s=-math.inf, data_wait=math.nan) for i in range(3)],
        [row(i, loss=(-1) ** i * 1.7e308, center=1e-320, images_per_s=0.0, data_wait=0) for i in range(4)],
        [row(i, loss=3.0, center=0.0) for i in range(4)],
        [{"step": i} for i in range(4)],
        [{}, {"step": "x"}, {"step": True}, {"step": 10**400}, 7, None],
    ],
)
def test_any_run_has_a_page(tmp_path, rows):
    page = page_of(make_run(tmp_path / "run", rows))
    check_harmless(page)
    for name, value in page.attributes:
        if name in ("points", "d", "x", "y", "cx", "cy", "width"):
            assert "nan" not in value and "inf" not in value
    assert "nan" not in " ".join(page.tiles.values()) and "inf" not in " ".join(page.tiles.values())


def test_broken_files_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run", [row(0), row(1)])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 1.')
    (folder / "eval.json").write_text("[1, 2")
    (folder / "skipped.csv").write_bytes(b'name,reason\n"\xff\xfe,torn')
    (folder / "train.log").write_bytes(b"\xff WARNING \x00\n" * 3)
    (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
    (folder / "checkpoints" / "step-00000001" / "manifest.json").write_text('{"environment": []}')
    assert page_of(folder).tiles["steps"] == "2 of 2"
    for name in ("metrics.jsonl", "eval.json", "skipped.csv", "train.log"):
        (folder / name).unlink()
    assert page_of(folder).tiles["steps"].startswith("0")


def test_accuracies_have_their_binomial_errors(tmp_path):
    scores = {
        "base": {"knn": 50.0, "knn_whitened": 50.0, "linear": 80.0, "linear_whitened": 81.0},
        "adapted": {"knn": 90.0, "knn_whitened": 80.0, "linear": 100.0, "linear_whitened": 90.0},
        "ensemble": {"knn": 75.0, "knn_whitened": 85.0, "linear": 85.0, "linear_whitened": 75.0},
        "source": {"base": 47.1, "adapted": 46.0, "ensemble": 47.3},
        "source_whitened": {"base": 46.9, "adapted": 45.0, "ensemble": 47.0},
        "n_train": 900,
        "n_test": 400,
        "k": 20,
    }
    page = page_of(make_run(tmp_path / "run", [row(0)], scores=scores))
    # closed form: sqrt(.5 * .5 / 400) = 2.5 points; .8 * .2: 2; .9 * .1: 1.5; .75 * .25: 2.165; .85 * .15: 1.785
    assert ["base", "50.0 ± 2.5", "50.0 ± 2.5", "80.0 ± 2.0", "81.0 ± 2.0", "47.1", "46.9"] in page.rows
    assert ["adapted", "90.0 ± 1.5", "80.0 ± 2.0", "100.0 ± 0.0", "90.0 ± 1.5", "46.0", "45.0"] in page.rows
    assert ["ensemble", "75.0 ± 2.2", "85.0 ± 1.8", "85.0 ± 1.8", "75.0 ± 2.2", "47.3", "47.0"] in page.rows
    assert accuracy.standard_error(50, 400) == 2.5


def test_changes_within_their_error_and_notes_are_said(tmp_path):
    scores = {
        "base": {"knn": 50.0},
        "adapted": {"knn": 49.0, "linear": 60.0},
        "gains": {"adapted": {"knn": {"points": -1.0, "within_error": True}, "linear": {"within_error": False}}},
        "notes": ["one class, 'a': \x1b[2J <b>", 7],
        "n_test": 40,
    }
    folder = make_run(tmp_path / "run", [row(0)], scores=scores)
    assert accuracy.accuracy_notes(scores) == [
        "Changes from the base model within the error (95 % interval holds 0): adapted k-NN",
        "one class, 'a': \\x1b[2J <b>",
    ]
    html = (page_of(folder), (folder / "report.html").read_text())[1]
    assert "holds 0): adapted k-NN" in html and "&lt;b&gt;" in html and "\x1b" not in html
    assert "(k-NN accuracy 50.0 -&gt; 49.0 %, within the error)" in html
    for hostile in ({"gains": []}, {"gains": {"adapted": 3}}, {"notes": {"a": 1}}, {"notes": [None]}):
        assert accuracy.accuracy_notes(hostile) == []


def test_measures_and_classes_are_tables(tmp_path):
    gain = {"points": -0.04, "interval": [-2.0, 2.0], "within_error": True}
    base, adapted = {"knn": 50.0, "recall_at_1": 40.0, "map": 61.25}, {"map": 61.21}
    scores = {
        "base": base,
        "adapted": adapted,
        "intervals": {"base": {"map": [60.0, 63.0]}, "adapted": {"map": [59.0, 64.0]}},
        "gains": {"adapted": {"map": gain}},
        "per_class": [
            {
                "class": "<b>\x1b[2J",
                "n_train": 9,
                "n_test": 3,
                "base": {"knn": 0.0},
                "intervals": {"base": {"knn": [0, 20]}},
            },
            7,
            {"class": ["a"], "n_test": "three", "base": 1},
        ],
    }
    folder = make_run(tmp_path / "run", [row(0)], scores=scores)
    page, html = page_of(folder), (folder / "report.html").read_text()
    assert ["base", "40.0", "", "", "61.2 ± 1.5", ""] in page.rows
    assert ["adapted", "", "", "", "61.2 ± 2.5 (~+0.0)", ""] in page.rows
    assert ["<b>\\x1b[2J", "9", "3", "0.0 ± 10.0", ""] in page.rows and ["['a']", "", "", "", ""] in page.rows
    assert "\x1b" not in html and "&lt;b&gt;" in html and "Classes, the worst first" in html
    for forged in ({"per_class": {}}, {"per_class": [None]}, {"gains": [], "intervals": 3}, {"base": []}):
        page_of(make_run(tmp_path / f"forged {forged}".replace("/", ""), [row(0)], scores=scores | forged))


def test_commands_shown_are_commands(tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path / "it's a run", [row(i) for i in range(3)], arch="vit_tiny_patch16_224", img_size=64)
    classes = {"eval": EvalConfig, "embed": EmbedConfig, "export": ExportConfig, "adapt": AdaptConfig}
    looks = {"explore": ExploreConfig, "search": SearchConfig}
    (folder / "adapter").mkdir()
    base = {"base_model_name_or_path": read_record(folder).config["model"]}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(base))
    stopped = make_run(tmp_path / "stopped", [row(0)], steps=9)
    seen = set()
    for at in (folder, stopped):
        for line in "\n".join(command for _, command in next_steps(read_record(at))).splitlines():
            program, name, *rest = shlex.split(line)
            assert program == "upstep-fast" and name in cli.COMMANDS
            seen.add(name)
            if name in classes:
                rest = cli.COMMANDS[name].named(rest)
                config = parse.parse(classes[name], rest, prog=name)
                assert name == "adapt" or (config.model.arch, config.model.img_size) == ("vit_tiny_patch16_224", 64)
            if name in looks:
                assert parse.parse(looks[name], cli.COMMANDS[name].named(rest), prog=name).run == str(folder)
    assert seen == {"eval", "embed", "explore", "search", "export", "adapt", "report"}


def test_hints(tmp_path):
    def hints(rows):
        return " ".join(why for why, _ in next_steps(read_record(make_run(tmp_path / "run", rows))))

    assert "--num-workers" in hints([row(i, images_per_s=10.0, data_wait=0.5) for i in range(3)])
    assert "--num-workers" not in hints([row(i) for i in range(3)])
    assert "--gate none" in hints([row(i, open=False, loss=None) for i in range(3)])
    assert "--lr" in hints([row(i, bad="the loss is inf") for i in range(3)])


def test_comparison(tmp_path, capsys):
    one = make_run(tmp_path / "a" / "run", [row(i) for i in range(5)], lr=1e-3)
    two = make_run(
        tmp_path / "b" / "run", [row(i, loss=2.5) for i in range(5)], lr=3e-3, scores={"adapted": {"knn": 61.0}}
    )
    out = tmp_path / "both.html"
    with pytest.raises(SystemExit) as stop:
        main(["report", str(one), str(two), "--out", str(out)])
    assert stop.value.code == 0 and str(out) in capsys.readouterr().out
    page = Page(out.read_text())
    check_harmless(page)
    assert page.tags.count("polyline") == 8
    assert ["lr", "0.001", "0.003"] in page.rows and not any(r[0] == "batch_size" for r in page.rows)
    header, first, second = page.rows[:3]
    assert first[0] == str(one) and second[0] == str(two)  # equal names are told apart by their paths
    assert second[header.index("loss, first and last")] == "2.5 → 2.5"
    assert second[header.index("knn, adapted")] == "61.0" and first[header.index("knn, adapted")] == ""


def test_command_errors(tmp_path, capsys):
    def fails(*args):
        with pytest.raises(SystemExit) as stop:
            main(["report", *map(str, args)])
        return stop.value.code, capsys.readouterr().err

    code, err = fails(tmp_path / "none")
    assert code == 2 and "holds no run" in err and "Traceback" not in err
    run = make_run(tmp_path / "run", [row(0)])
    code, err = fails(run, run, "--out", tmp_path / "no" / "x.html")
    assert code == 2 and "cannot write" in err
    code, err = fails(run, run, "--out", run / "config.toml")
    assert code == 2 and ".html" in err and (run / "config.toml").read_text().startswith("method")
    with pytest.raises(ConfigError, match="dirs"):
        ReportConfig(dirs=())


def test_the_report_is_written_however_the_run_ends(tmp_path, caplog):
    folder = make_run(tmp_path / "run", [row(0)], steps=9)
    for error in (Interrupted("stopped"), ValueError("first"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, report_page.written_after(folder):
            raise error
        assert caught.value is error and (folder / "report.html").exists()
        (folder / "report.html").unlink()
    # a failure to write the page is logged, and hides neither an error nor a success
    (folder / "config.toml").unlink()
    with caplog.at_level(logging.WARNING, logger="upstep_fast"):
        with pytest.raises(ValueError, match="first"), report_page.written_after(folder):
            raise ValueError("first")
        with report_page.written_after(folder):
            pass
    assert caplog.text.count("report: not written") == 2


def test_train_log_has_messages_and_the_error_that_ended_the_run(tmp_path):
    path, log = tmp_path / "train.log", logging.getLogger("upstep_fast")
    with pytest.raises(ValueError), logs.train_log(path):
        log.warning("ab\udcff %s", "name")
        logging.getLogger("upstep_fast.kernels._dispatch").error("from a module below")
        raise ValueError("this")
    log.warning("not this")
    with pytest.raises(Interrupted), logs.train_log(path):
        raise Interrupted("stopped after 3 of 9 steps")
    lines = path.read_text().splitlines()
    assert "WARNING ab\\udcff name" in lines[0] and "ERROR from a module below" in lines[1]
    assert "ERROR ValueError: this" in lines[2] and lines[3].startswith("Traceback")
    assert "WARNING Interrupted: stopped after 3 of 9 steps" in lines[-1]
    assert "not this" not in path.read_text() and not any(isinstance(h, logging.FileHandler) for h in log.handlers)


def test_the_log_ignores_a_full_disk(capsys):
    with logs.train_log("/dev/full"):
        logging.getLogger("upstep_fast").error("x" * 100_000)
    assert "Logging error" not in capsys.readouterr().err


def test_tensorboard_holds_what_metrics_jsonl_holds(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with report.Metrics(tmp_path / "metrics.jsonl", log_to=("tensorboard",)) as metrics:
        for i in range(3):
            metrics.write(row(i, loss=None if i == 1 else math.nan if i == 2 else 5.5))
    # as a run that was killed after two steps and resumed
    with report.Metrics(tmp_path / "metrics.jsonl", 2, ("tensorboard",)) as metrics:
        metrics.write(row(2, loss=4.5))
    events = accumulator.EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(0, 5.5), (2, 4.5)]
    assert [e.step for e in events.Scalars("open")] == [0, 1, 2]
    assert "bad" not in events.Tags()["scalars"] and "step" not in events.Tags()["scalars"]


def test_missing_tensorboard_is_reported_before_the_run(monkeypatch):
    from upstep_fast.config import training as config

    monkeypatch.setattr(config.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"tensorboard.*pip install"):
        upstep_config(model="m", data=("d",), out="o", tensorboard=True)


def test_reduced_lines_keep_mean_and_range():
    y = [float(i % 7) for i in range(3000)]
    points = charts.reduce(Line("y", list(range(3000)), y))
    assert len(points) == charts.POINTS and all(len({0.0, 6.0} & {p.low, p.high}) == 2 for p in points)
    assert sum(p.mean for p in points) / len(points) == pytest.approx(sum(y) / 3000, abs=1e-9)
    assert charts.reduce(Line("y", [1, 2, 3], [None, 5.0, None])) == [charts.Point(2.0, 5.0, 5.0, 5.0)]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.7, 12.9), (1e-12, 3e-12), (4.46, 6.2), (1e200, 9e200), (0, 399)])
def test_ticks_are_few_round_and_inside(low, high):
    found = charts.ticks(low, high)
    assert 3 <= len(found) <= 7 and all(low <= t <= high or t == pytest.approx(low) for t in found)
    step = found[1] - found[0]
    assert f"{step:.0e}"[0] in "125" and [b - a for a, b in itertools.pairwise(found)] == pytest.approx(
        [step] * (len(found) - 1)
    )


def test_a_point_is_drawn_where_its_value_is():
    svg = charts.line_chart("y", [Line("a", [0, 10], [0.0, 8.0]), Line("b", [5], [4.0])])
    (x0, y0), (x1, y1) = (map(float, p.split(",")) for p in re.search(r'polyline[^>]*points="([^"]*)"', svg)[1].split())
    cx, cy = (float(re.search(rf'{name}="([\d.]+)"', svg)[1]) for name in ("cx", "cy"))
    assert (cx, cy) == pytest.approx(((x0 + x1) / 2, (y0 + y1) / 2), abs=0.11) and y1 < y0 and x0 < x1


def test_numbers():
    assert [number(v) for v in (1, 2.5, True, None, "3", math.nan, math.inf, 10**400)] == [1, 2.5] + [None] * 6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    small = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=5)
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **small)
    timm.models.save_for_hf(vit, folder, model_args=small, safe_serialization=True)
    return f"local-dir:{folder}"


@pytest.fixture
def options(model, tmp_path):
    photos = tmp_path / "photos of <mine>"
    photos.mkdir()
    for i in range(9):
        Image.new("RGB", (40, 40), (25 * i, 200 - 20 * i, 90)).save(photos / f"{i}.png")
    (photos / HOSTILE[0].replace("/", "")).write_text("no image")
    return dict(
        model=model,
        data=photos,
        out=tmp_path / "my run",
        steps=4,
        batch_size=64,
        prototypes=8,
        head_hidden=16,
        head_dim=8,
        lora_r=2,
        precision="fp32",
        device="cpu",
        num_workers=0,
        max_bad_fraction=0.5,
        log_every=2,
    )


def test_a_run_has_its_report_and_its_log(options, monkeypatch):
    logging.getLogger("upstep_fast").setLevel(logging.INFO)  # as the command does
    upstep_fast.adapt(**options)
    out = options["out"]
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    check_harmless(page)
    assert "finished" in page.texts and page.tiles["steps"] == "4 of 4"
    assert ["torch", torch.__version__] in page.rows and ["precision", "fp32"] in page.rows
    assert any(r[0].endswith(HOSTILE[0].replace("/", "")) for r in page.rows)
    assert "batch_size: reduced from 64 to the 10 images there are" in page.text
    log = (out / "train.log").read_text()
    assert "INFO upstep-fast" in log and "INFO step 2/4" in log and "INFO step 4/4" in log and "ERROR" not in log
    line = embed_command(flat(upstep_config(**options | {"data": ("hf:x",), "image_column": "left"})), out)
    assert f" embed {shlex.quote(str(out))} --data hf:x --image-column left --out " in line
    line = embed_command(flat(upstep_config(**options | {"data": ("a b",)})), out)
    command = parse.parse(EmbedConfig, ["--adapter", *shlex.split(line)[2:]], prog="embed")
    assert command.data.paths == ("a b",)
    assert command.model.name == options["model"] and command.adapter == str(out / "adapter")


def test_a_run_that_fails_keeps_its_error_and_has_a_report(options, monkeypatch):
    real, out = trainer.step, options["out"]

    def step(state, *args):
        if state.step == 2:
            raise MemoryError("the first error")
        return real(state, *args)

    monkeypatch.setattr(trainer, "step", step)
    with pytest.raises(MemoryError, match="the first error"):
        upstep_fast.adapt(**options)
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert "not finished" in page.texts and page.tiles["steps"] == "2 of 4" and "the first error" in page.text
    assert "ERROR MemoryError: the first error" in (out / "train.log").read_text()
    # and if the page cannot be rendered, the run's error is still raised
    monkeypatch.setattr(report_page, "write", lambda folder: 1 / 0)
    with pytest.raises(MemoryError, match="the first error"):
        upstep_fast.adapt(**options, overwrite=True)
