"""Features read back: what embed wrote, and what damaged, foreign or lying files hold."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from upstep_fast import embed
from upstep_fast.errors import ConfigError, DataError
from upstep_fast.evaluation.feature_files.parquet import FACTS, SKIPPED
from upstep_fast.evaluation.feature_files.table import read_features
from upstep_fast.evaluation.feature_files.write import write_table

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

GIVEN = {"model": "m", "fingerprint": "model=1", "form": "base, plain", "columns": {"features": 4}, "version": "1"}


def rows(first, count, width=4):
    return np.arange(1, count * width + 1, dtype=np.float32).reshape(count, width) + first


def names_of(first, count):
    return [f"photos/{i:04d}.png" for i in range(first, first + count)]


def write(path, names, columns, metadata):
    with open(path, "wb") as file:
        write_table(names, columns, metadata, file)


@pytest.fixture
def folder(tmp_path):
    """Two generations: 5 images in shards of 2, then 2 images in one; image 3 could not be read."""
    root = tmp_path / "features"
    root.mkdir()
    for plan, first, count, size in ((0, 0, 5, 2), (1, 5, 2, 4)):
        write(root / f"plan-{plan:03d}.parquet", names_of(first, count), {}, {FACTS: GIVEN | {"shard_size": size}})
        for k, start in enumerate(range(first, first + count, size)):
            names = [name for name in names_of(start, min(size, first + count - start)) if "0003" not in name]
            skipped = {"photos/0003.png": "truncated"} if start == 2 else {}
            columns = {"features": rows(10 * start, len(names)), "base": rows(100 * start, len(names), 3)}
            write(root / f"part-{plan:03d}-{k:05d}.parquet", names, columns, {FACTS: GIVEN, SKIPPED: skipped})
    return root


@pytest.mark.parametrize("suffix", [".npy", ".safetensors", ".parquet"])
def test_what_embed_wrote_is_read_back(model, photos, tmp_path, suffix):
    plain = embed(model, photos, tmp_path / "plain.npy", device="cpu")
    out = embed(model, photos, tmp_path / f"f{suffix}", device="cpu", with_base=suffix != ".npy")
    table = read_features(out)
    assert np.array_equal(table.x, np.load(plain)) and table.x.dtype == np.float32
    assert list(table.names) == plain.with_suffix(".txt").read_text().splitlines()
    if suffix == ".npy":
        assert table.facts == {}
        with pytest.raises(DataError, match="has no base"):
            read_features(out, "base")
        return
    assert np.array_equal(read_features(out, "base").x, table.x)  # of a model without an adapter
    assert table.facts["form"] == "base, plain" and table.facts["columns"] == {"features": 48, "base": 48}
    assert table.facts["model"] == model and "adapter=none whitening=none" in table.facts["fingerprint"]
    assert table.facts["precision"] and table.facts["version"] and table.facts["reading"]["slice"] == "auto"


def test_the_fingerprint_tells_model_input_and_whitening(model, photos, tmp_path):
    def fingerprint(name, **options):
        return read_features(embed(model, photos, tmp_path / name, device="cpu", **options)).facts["fingerprint"]

    plain, kept = fingerprint("a.parquet"), str(tmp_path / "w.safetensors")
    assert plain == fingerprint("b.safetensors", batch_size=3)
    parts = dict(part.split("=") for part in plain.split())
    other = dict(part.split("=") for part in fingerprint("c.parquet", img_size=(40, 40)).split())
    assert {name for name in parts if parts[name] != other[name]} == {"input", "model"}  # positions are resized
    mean = dict(part.split("=") for part in fingerprint("d.parquet", mean=(0.1, 0.2, 0.3)).split())
    assert {name for name in parts if parts[name] != mean[name]} == {"input"}
    fitted = fingerprint("e.parquet", fit_whitening=kept)
    assert fitted == fingerprint("f.parquet", whitening=kept) and fitted.split()[:3] == plain.split()[:3]
    assert fitted.split()[3] != "whitening=none"


def test_a_folder_is_its_shards_in_order(folder):
    table = read_features(folder)
    kept = [0, 1, 2, 4, 5, 6]
    assert table.names == tuple(f"photos/{i:04d}.png" for i in kept)
    expected = [rows(0, 2), rows(20, 1), rows(40, 1), rows(50, 2)]
    assert np.array_equal(table.x, np.concatenate(expected)) and table.facts == GIVEN
    assert read_features(folder, "base").x.shape == (6, 3)
    # what a killed write left is never read
    (folder / ".tmp-1-part-000-00000.parquet").write_bytes(b"half")
    assert len(read_features(folder)) == 6


def test_a_folder_that_is_not_complete_names_shards_and_cure(folder):
    (folder / "part-000-00001.parquet").unlink()
    (folder / "part-001-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"lacks 2 of 4 shards, the first part-000-00001.parquet; repeat the embed"):
        read_features(folder)


def replaced(folder, name, change):
    """Write a shard again with its path, columns and metadata changed."""
    table = pq.read_table(folder / name)
    facts = json.loads(table.schema.metadata[FACTS.encode()])
    columns = {k: np.stack(table.column(k).to_pylist()).astype(np.float32) for k in table.column_names[1:]}
    names = table.column("path").to_pylist()
    names, columns, facts = change(names, columns, facts)
    write(folder / name, names, columns, {FACTS: facts, SKIPPED: {}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda n, c, f: (n, c, f | {"fingerprint": "model=2"}),
            "are of another kind: fingerprint model=2, not model=1",
        ),
        (lambda n, c, f: (n, c, f | {"form": "adapted, plain"}), "are of another kind: form adapted, plain, not base"),
        (lambda n, c, f: (n[::-1], c, f), "has other names than plan-000.parquet; delete it and embed again"),
        (lambda n, c, f: (n[:1], {k: x[:1] for k, x in c.items()}, f), "has other names than plan-000"),
        (lambda n, c, f: (n, {"base": c["base"]}, f), "has no column features, but path, base"),
        (lambda n, c, f: (n, c | {"features": c["features"] * np.nan}, f), "2 of 6 rows of .* are not finite or are 0"),
        (lambda n, c, f: (n, c | {"features": c["features"] * 0}, f), "2 of 6 rows of .* are not finite or are 0"),
    ],
)
def test_a_shard_of_another_kind_is_refused(folder, change, message):
    replaced(folder, "part-000-00000.parquet", change)
    if "another kind" in message:  # facts are compared with those of the first shard
        replaced(folder, "part-000-00000.parquet", lambda n, c, f: (n, c, GIVEN))
        replaced(folder, "part-001-00000.parquet", change)
    with pytest.raises(DataError, match=message):
        read_features(folder)


def test_versions_and_precision_may_differ(folder):
    replaced(folder, "part-001-00000.parquet", lambda n, c, f: (n, c, f | {"version": "2", "precision": "bf16"}))
    assert len(read_features(folder)) == 6


@pytest.mark.parametrize("name", ["part-000-00000.parquet", "plan-000.parquet"])
@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing facts", "facts no object", "a folder", "a pipe"])
def test_damaged_files_are_one_line(folder, name, damage):
    path = folder / name
    data = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "a pipe":
        os.mkfifo(path)
    elif damage.startswith(("missing", "facts")):
        value = {} if damage.startswith("missing") else {FACTS: [1]}
        write(path, ["a", "b"], {"features": rows(0, 2)}, value)
    else:
        path.write_bytes({"cut": data[: len(data) // 2], "empty": b"", "text": b"no parquet"}[damage])
    with pytest.raises(DataError) as error:
        read_features(folder)
    assert "\n" not in str(error.value) and name in str(error.value)


@pytest.mark.parametrize(
    ("schema", "columns", "message"),
    [
        ({"path": pa.string(), "features": pa.list_(pa.float32())}, (["a"], [[1.0, 2.0]]), "not fixed-size lists"),
        ({"path": pa.string(), "features": pa.float32()}, (["a"], [1.0]), "not fixed-size lists"),
        ({"path": pa.string(), "features": pa.list_(pa.string(), 2)}, (["a"], [["x", "y"]]), "not fixed-size lists"),
        ({"path": pa.int64(), "features": pa.list_(pa.float32(), 2)}, ([1], [[1.0, 2.0]]), "rows without a path"),
        ({"path": pa.string(), "features": pa.list_(pa.float32(), 2)}, ([None], [[1.0, 2.0]]), "rows without a path"),
        ({"path": pa.string(), "features": pa.list_(pa.float32(), 2)}, (["a"], [None]), "rows without features"),
        ({"path": pa.string(), "features": pa.list_(pa.float32(), 2)}, (["a"], [[1.0, None]]), "not finite or are 0"),
        (
            {"file": pa.string(), "features": pa.list_(pa.float32(), 2)},
            (["a"], [[1.0, 2.0]]),
            "no column path, but file",
        ),
    ],
)
def test_foreign_parquet_is_one_line(tmp_path, schema, columns, message):
    arrays = [pa.array(values, kind) for values, kind in zip(columns, schema.values(), strict=True)]
    pq.write_table(pa.table(arrays, names=list(schema)), tmp_path / "f.parquet")
    with pytest.raises(DataError, match=message):
        read_features(tmp_path / "f.parquet")


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
def test_slices_and_chunks_keep_their_rows(tmp_path, kind):
    """`FixedSizeListArray.values` ignores that an array is a slice, and a table may have several chunks."""
    x = rows(0, 10)
    flat = pa.array(x.ravel().astype(kind.to_pandas_dtype()))
    whole = pa.table({"path": names_of(0, 10), "features": pa.FixedSizeListArray.from_arrays(flat, 4)})
    pq.write_table(pa.concat_tables([whole.slice(3, 4), whole.slice(8, 2)]), tmp_path / "f.parquet", row_group_size=3)
    table = read_features(tmp_path / "f.parquet")
    kept = [3, 4, 5, 6, 8, 9]
    assert table.names == tuple(f"photos/{i:04d}.png" for i in kept) and np.array_equal(table.x, x[kept])
    assert table.facts == {}


def test_permuted_views_keep_their_values(tmp_path):
    """pyarrow writes a view of permuted axes in the order of its memory."""
    x = rows(0, 6, 4)
    for view in (np.asfortranarray(x), x[::-1][::-1], torch.tensor(x.T.copy()).T.numpy(), x.astype(np.float64)):
        write(tmp_path / "f.parquet", names_of(0, 6), {"features": view}, {})
        assert np.array_equal(read_features(tmp_path / "f.parquet").x, x)


@pytest.mark.parametrize(
    ("metadata", "tensors", "message"),
    [
        ({"paths": '["a"]'}, {"features": torch.ones(2, 3)}, r"features \[2, 3\] and 1 names"),
        ({"paths": '["a", "b"]'}, {"x": torch.ones(2, 3)}, "has no tensor features, but x"),
        ({}, {"features": torch.ones(2, 3)}, "names no images"),
        ({"paths": "[1, 2]"}, {"features": torch.ones(2, 3)}, "names no images"),
        ({"paths": '["a", "b"]', FACTS: "[]"}, {"features": torch.ones(2, 3)}, "names no images"),
        ({"paths": '["a", "b"'}, {"features": torch.ones(2, 3)}, "cannot read"),
        ({"paths": '["a", "b"]'}, {"features": torch.ones(2)}, r"features \[2\] and 2 names"),
        ({"paths": '["a", "b"]'}, {"features": torch.zeros(2, 3)}, "not finite or are 0"),
    ],
)
def test_foreign_safetensors_are_one_line(tmp_path, metadata, tensors, message):
    save_file(tensors, tmp_path / "f.safetensors", metadata)
    with pytest.raises(DataError, match=message):
        read_features(tmp_path / "f.safetensors")


def test_what_is_not_there_or_no_features(tmp_path, photos):
    shutil.copy(next(photos.iterdir()), tmp_path / "f.parquet")
    for path, message in (
        (photos, r"holds no features; `upstep-fast embed RUN --data \.\.\. --out FOLDER/` writes them"),
        (tmp_path / "no.npy", "cannot read"),
        (tmp_path, "cannot read"),  # its only Parquet file is damaged
    ):
        with pytest.raises(DataError, match=message):
            read_features(path)
    with pytest.raises(DataError, match="must be a"):
        read_features(tmp_path / "f.csv")
    with pytest.raises(DataError, match="cannot read"):
        read_features(tmp_path / "f.parquet")


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e25, 1e38])
def test_rows_whose_squares_leave_fp32_are_features(tmp_path, scale):
    x = (rows(1, 6) / 1000 * scale).astype(np.float32)
    np.save(tmp_path / "f.npy", x)
    (tmp_path / "f.txt").write_text("".join(f"{name}\n" for name in names_of(0, 6)))
    assert np.array_equal(read_features(tmp_path / "f.npy").x, x)


@pytest.mark.parametrize("kind", [np.complex64, bool, "U3", "M8[s]"])
def test_a_npy_of_other_values_is_refused(tmp_path, kind):
    np.save(tmp_path / "f.npy", np.ones((2, 3)).astype("i8").astype(kind))
    (tmp_path / "f.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match="not real numbers"):
        read_features(tmp_path / "f.npy")


def test_a_shard_whose_width_is_not_what_it_says(folder):
    path = folder / "part-001-00000.parquet"
    columns = {"features": rows(50, 2, 1), "base": rows(500, 2, 3)}
    write(path, names_of(5, 2), columns, {FACTS: GIVEN})
    with pytest.raises(DataError, match=r"cannot read .*reshape"):
        read_features(folder)


def test_a_npy_has_no_second_column(model, photos, tmp_path):
    with pytest.raises(ConfigError, match=r"with_base: a .npy holds one array"):
        embed(model, photos, tmp_path / "f.npy", device="cpu", with_base=True)
