"""The result of a run in a notebook: its model, its report, and HTML in which every value is escaped."""

import html.parser
import shutil

import numpy as np
import pytest

import upstep_fast

NAME = "p<b>hotos'"


@pytest.fixture(scope="module")
def result(short_run, model, photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(photos, folder / NAME)
    return upstep_fast.adapt(model, folder / NAME, folder / "o<u>t", **short_run | dict(steps=3, report_images=True))


class Text(html.parser.HTMLParser):
    """Text and tags of a page, and tags that were left open."""

    def __init__(self, page):
        super().__init__()
        self.text, self.tags, self.open = "", [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open += [tag] if tag != "img" else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_a_result_gives_model_and_report(result, photos):
    assert result.report.read_text().startswith("<!doctype html>") and result.report.parent == result.adapter.parent
    m = result.model(device="cpu", precision="fp32")
    assert np.array_equal(
        m.embed(photos), upstep_fast.load(result.adapter, device="cpu", precision="fp32").embed(photos)
    )


def test_a_notebook_shows_outcome_neighbors_and_next_lines(result):
    page = Text(result._repr_html_())
    assert not page.open and not {"b", "u", "script", "style"} & set(page.tags)
    assert page.tags.count("img") == 3 * (1 + 4 + 4)
    lines = page.text.split("Next:")[1].split("\n")
    code = "\n".join(line for line in lines if line.startswith(("m = ", "features = ")))
    names = {"upstep_fast": upstep_fast}
    exec(code, names)
    assert names["features"].shape == (24, 48) and str(result.report) in page.text
    assert "3 of 3" in page.text and "loss, first and last" in page.text


def test_without_its_folder_a_result_has_its_plain_text(result, tmp_path):
    moved = type(result)(tmp_path / "gone" / "adapter", 3, 2, 1.0, 1.0)
    assert moved._repr_html_() is None and "gone" in repr(moved)
