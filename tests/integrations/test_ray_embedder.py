"""The callable for Ray Data, called as Ray calls it: batches of columns in, pyarrow tables out."""

import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import upstep_fast
from upstep_fast.errors import ConfigError, DataError
from upstep_fast.evaluation.feature_files.table import read_features
from upstep_fast.integrations.ray import Embedder

CPU = dict(device="cpu", precision="fp32", num_workers=2)


@pytest.fixture(scope="module")
def m():
    return upstep_fast.load("demo", device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def embedder():
    return Embedder("demo", **CPU)


def rows(table) -> np.ndarray:
    return np.stack(table["features"].to_pandas())


def columns(paths, kind):
    names = {"path": np.array(paths, dtype=object)}
    if kind == "bytes":
        return names | {"bytes": np.array([open(path, "rb").read() for path in paths], dtype=object)}
    if kind == "image":
        return names | {"image": np.stack([np.asarray(Image.open(path)) for path in paths])}
    return names


@pytest.mark.parametrize("kind", ["path", "bytes", "image"])
@pytest.mark.parametrize("number", [1, 7])
def test_features_equal_those_of_the_model(m, embedder, photos, kind, number):
    paths = m.paths(photos)[:number]
    table = embedder(columns(paths, kind))
    assert table.column_names == ["path", "features"] and table["path"].to_pylist() == paths
    assert table.schema.field("features").type == pa.list_(pa.float32(), m.dim)
    assert np.array_equal(rows(table), m.embed(paths, batch_size=number))


def test_other_columns_stay_and_a_named_column_is_read(embedder, photos, m):
    paths = m.paths(photos)[:3]
    batch = {"id": np.arange(3), "uri": np.array(paths, object), "path": np.array(["a", "b", "c"], object)}
    table = Embedder("demo", column="uri", **CPU)(batch)
    assert table.column_names == ["id", "uri", "path", "features"] and table["id"].to_pylist() == [0, 1, 2]
    data = {"jpg": columns(paths, "bytes")["bytes"]}
    assert Embedder("demo", column="jpg", **CPU)(data).column_names == ["features"]
    with pytest.raises(DataError, match="no column bytes or image or path, but jpg; name it"):
        embedder(data)


@pytest.fixture(scope="module")
def odd_files(tmp_path_factory):
    """Files that ray.data.read_images leaves out or reads otherwise: WebP, AVIF, 16 bits, palettes, gray, turned."""
    folder = tmp_path_factory.mktemp("odd")
    ramp = np.add.outer(np.arange(40), np.arange(60)).astype(np.uint8) * 2
    color = Image.fromarray(np.stack([ramp, ramp[::-1], 255 - ramp], -1))
    color.save(folder / "a.webp")
    color.save(folder / "b.avif")
    color.quantize(16).save(folder / "c.png")
    Image.fromarray(ramp).save(folder / "d.png")
    Image.fromarray(ramp.astype(np.uint16) * 257).save(folder / "e.png")
    turned = Image.Exif()
    turned[0x0112] = 6
    color.save(folder / "f.jpg", exif=turned)
    return sorted(map(str, folder.iterdir()))


@pytest.mark.parametrize("kind", ["path", "bytes"])
def test_files_of_every_kind_are_read_by_our_readers(m, embedder, odd_files, kind):
    assert np.array_equal(rows(embedder(columns(odd_files, kind))), m.embed(odd_files))


def test_an_empty_batch(embedder):
    table = embedder({"path": np.array([], dtype=object)})
    assert table.num_rows == 0 and table.schema.field("features").type.list_size == embedder.model.dim


def test_images_that_cannot_be_used(photos, m, tmp_path, caplog):
    (tmp_path / "bad.jpg").write_bytes(b"not an image")
    paths = m.paths(photos)[:2]
    batch = columns([paths[0], str(tmp_path / "bad.jpg"), paths[1]], "path")
    with pytest.raises(DataError, match=r'images: .*bad.jpg: not an image .*; repair it, or give errors="drop"'):
        Embedder("demo", **CPU)(batch)
    with caplog.at_level(logging.WARNING):
        dropped = Embedder("demo", errors="drop", **CPU)(batch)
    assert dropped["path"].to_pylist() == paths and "ray: dropped" in caplog.text and "bad.jpg: not an" in caplog.text
    kept = Embedder("demo", errors="column", **CPU)(batch)
    assert kept["path"].to_pylist() == batch["path"].tolist() and kept["features"].null_count == 1
    assert [bool(text) for text in kept["error"].to_pylist()] == [False, True, False]
    good = kept.filter(pa.compute.is_valid(kept["features"]))
    assert np.array_equal(rows(good), rows(dropped)) and np.array_equal(rows(dropped), m.embed(paths))
    with pytest.raises(ConfigError, match="errors: got 'keep', must be raise, drop or column"):
        Embedder("demo", errors="keep")


def test_a_folder_of_its_files_is_read_with_the_facts_of_embed(embedder, photos, m, tmp_path, tmp_path_factory):
    paths = m.paths(photos)
    for i, part in enumerate((paths[10:], paths[:10])):
        pq.write_table(embedder(columns(part, "path")), tmp_path / f"{i}.parquet")
    table, written = (
        read_features(tmp_path),
        upstep_fast.embed("demo", photos, tmp_path_factory.mktemp("one") / "f.parquet", **CPU),
    )
    expected = read_features(written)
    assert table.names == expected.names and np.abs(table.x - expected.x).max() < 1e-6
    assert table.facts == expected.facts
    pq.write_table(embedder(columns(paths[:1], "path")), tmp_path / "again.parquet")
    with pytest.raises(DataError, match=r"names .* twice; write each result to a folder of its own"):
        read_features(tmp_path)


def test_missing_pyarrow_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "upstep_fast\[parquet\]"'):
        Embedder("demo")
