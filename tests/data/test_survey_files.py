"""triage.json and statistics.json that are damaged, or no files: said, and made again; nothing of them is used."""

from __future__ import annotations

import json
import logging
import os

import pytest
from PIL import Image

from upstep_fast.data.curation import survey
from upstep_fast.data.curation.survey import mean_and_std, without_copies_and_blanks
from upstep_fast.data.sources.source import open_source

OPTIONS = {"channels": 3, "num_workers": 0, "max_bad_fraction": 0.5}


@pytest.fixture
def source(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(4):
        image = Image.new("RGB", (20, 20), (i * 50, 9, 9))
        image.paste((0, 255, 0), (0, 0, 5 + i, 9))
        image.save(tmp_path / "images" / f"{i}.png")
    return open_source(tmp_path / "images")


def changed(text: bytes, **values) -> str:
    stored = json.loads(text)
    stored["found"] |= values
    return json.dumps(stored)


DAMAGED = {
    survey.STATISTICS: [
        {"std": [float("inf")] * 3}, {"std": [float("nan"), 1, 1]}, {"std": [0, 0.1, 0.1]}, {"std": [-0.1] * 3},
        {"std": [1.5] * 3}, {"mean": [7, 0, 0]}, {"mean": ["a", 0, 0]}, {"mean": 3}, {"std": [0.1, 0.1]},
    ],
    survey.TRIAGE: [
        {"left_out": {"999": "x"}}, {"left_out": {"-1": "x"}}, {"left_out": {"a": "x"}}, {"left_out": [0]},
        {"listed": {"4": "x"}}, {"counts": {}}, {"counts": None}, {"counts": {"images": float("inf")}},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_made_again(source, tmp_path, name, caplog):
    def run():
        if name == survey.TRIAGE:
            result = without_copies_and_blanks(source, tmp_path, **OPTIONS)
            return [result[0].name(i) for i in range(len(result[0]))], result[1]
        return mean_and_std(source, tmp_path, **OPTIONS)

    want = run()
    path = tmp_path / name
    path.write_bytes(want[-1])
    caplog.clear()
    with caplog.at_level(logging.WARNING, "upstep_fast"):
        assert run() == want and not caplog.records
    texts = [changed(want[-1], **values) for values in DAMAGED[name]]
    for text in [*texts, "{", "[" * 100_000, '{"of": 1e999}', "\xff\xfe"]:
        path.write_text(text, encoding="latin-1")
        caplog.clear()
        with caplog.at_level(logging.WARNING, "upstep_fast"):
            assert run() == want, text
        assert [record.message.count(f"{name} is damaged and is made again") for record in caplog.records] == [1], text


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_what_is_no_file_is_not_read(source, tmp_path, kind):
    path = tmp_path / survey.STATISTICS
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    assert len(mean_and_std(source, tmp_path, **OPTIONS)[0]) == 3
