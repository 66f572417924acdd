"""The notebooks of docs/ run from the first cell to the last, on few steps."""

import json
import shutil
from pathlib import Path

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs/notebooks/first_hour.ipynb"
SHORT = 'resume=True, steps=2, batch_size=8, prototypes=8, device="cpu")'


@pytest.fixture
def notebook(model, photos, tmp_path, monkeypatch):
    """The notebook with a short run of a toy model, in a folder with photos/."""
    shutil.copytree(photos, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    read = json.loads(NOTEBOOK.read_text())
    for cell in read["cells"]:
        text = "".join(cell["source"]).replace('"demo"', repr(model)).replace("resume=True)", SHORT)
        cell["source"] = text.splitlines(keepends=True)
    assert "steps=2" in str(read) and model in str(read)
    return read


def cells(notebook):
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_it_is_short_and_holds_no_outputs(notebook):
    assert sum(bool(line.strip()) for cell in cells(notebook) for line in cell.splitlines()) < 40
    assert not any(cell.get("outputs") for cell in notebook["cells"])


@pytest.mark.parametrize("times", [1, pytest.param(2, marks=pytest.mark.long)])
def test_its_cells_run_in_order_and_again(notebook, times):
    plt = pytest.importorskip("matplotlib.pyplot")
    plt.switch_backend("agg")
    for _ in range(times):
        names = {"__name__": "notebook"}
        for cell in cells(notebook):
            exec(compile(cell, "cell", "exec"), names)
    titles = [figure.get_suptitle() for figure in map(plt.figure, plt.get_fignums())]
    texts = [given.text for given in (names["result"].verdict, names["result"].measured) if given]
    assert ("\n".join(texts) or "no verdict") in titles
    assert names["after"].shape == (24, names["adapted"].dim) and names["nearest"][0] == 0
    assert names["result"].verdict is None or names["result"].verdict.text in names["result"]._repr_html_()
    plt.close("all")


def test_it_runs_in_a_kernel(notebook, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient and ipykernel (pip install '.[dev]')")
    pytest.importorskip("ipykernel", reason="needs ipykernel (pip install '.[dev]')")
    nbformat = pytest.importorskip("nbformat")
    resources = {"metadata": {"path": str(tmp_path)}}
    done = nbclient.NotebookClient(nbformat.reads(json.dumps(notebook), 4), timeout=120, resources=resources).execute()
    kinds = [set(o.get("data", {})) for cell in done.cells if cell.cell_type == "code" for o in cell.outputs]
    assert any("text/html" in kind for kind in kinds)  # the result
    assert sum("image/png" in kind for kind in kinds) == 2
