"""A folder of features: resumed, extended, refused. What it should hold: the features of one file, and the names."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image

from upstep_fast import embed
from upstep_fast.cli.commands import main
from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.config.files import from_options
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import ConfigError, DataError, RunFailedError
from upstep_fast.evaluation.embeddings import run_embed
from upstep_fast.evaluation.feature_files import folder as feature_folder
from upstep_fast.evaluation.feature_files import shards as feature_shards
from upstep_fast.evaluation.feature_files.folder import NameIndex, default_shard_size
from upstep_fast.evaluation.feature_files.moved import moved, parse_moved
from upstep_fast.evaluation.feature_files.parquet import read_plans
from upstep_fast.evaluation.feature_files.table import read_features

pytest.importorskip("pyarrow")
SIZE = dict(shard_size=5, batch_size=2, device="cpu", precision="fp32", num_workers=0)


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def run(model, data, out, **options):
    return run_embed(
        from_options(EmbedConfig, {"model": model, "data": data, "out": str(out), **SIZE, **options}, "embed")
    )


class Killed(BaseException):
    """In place of SIGKILL."""


def kill_at(monkeypatch, shard):
    """Let the `shard`-th write of a shard be the end, its temporary file half written."""
    real, calls = feature_shards.write_atomic, iter(range(10**6))

    def write(path, content):
        if next(calls) == shard:
            path.with_name(f".tmp-1-{path.name}").write_bytes(b"PAR1 half")
            raise Killed
        return real(path, content)

    monkeypatch.setattr(feature_shards, "write_atomic", write)


@pytest.fixture
def images(photos, tmp_path):
    """12 pictures, to be added to and damaged."""
    folder = tmp_path / "in"
    folder.mkdir()
    for path in sorted(photos.iterdir())[:12]:
        shutil.copy(path, folder / path.name)
    return folder


@pytest.fixture
def more(photos):
    return sorted(photos.iterdir())[12:]


def test_a_folder_holds_the_features_of_a_file(model, images, tmp_path):
    file = embed(model, images, tmp_path / "f.npy", device="cpu", precision="fp32")
    done = run(model, images, tmp_path / "out", with_base=True)
    assert sorted(files_of(tmp_path / "out")) == [*(f"part-000-0000{k}.parquet" for k in range(3)), "plan-000.parquet"]
    table = read_features(tmp_path / "out")
    assert list(table.names) == file.with_suffix(".txt").read_text().splitlines()
    np.testing.assert_allclose(table.x, np.load(file), atol=2e-6)
    assert np.array_equal(read_features(tmp_path / "out", "base").x, table.x)
    assert done.shape == (12, 48) and done.counts.startswith("0 there, 12 new in 3 shards")
    assert table.facts["form"] == "base, plain"


@pytest.mark.parametrize("shard", range(3))
def test_a_killed_folder_is_completed_bit_for_bit(model, images, monkeypatch, tmp_path, shard):
    run(model, images, tmp_path / "whole")
    with monkeypatch.context() as patch:
        kill_at(patch, shard)
        with pytest.raises(Killed):
            run(model, images, tmp_path / "out")
    with pytest.raises(
        DataError, match=f"lacks {3 - shard} of 3 shards, the first part-000-0000{shard}.parquet; repeat"
    ):
        read_features(tmp_path / "out")
    done = run(model, images, tmp_path / "out", shard_size=7)  # the size of the plan holds
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")
    assert done.counts.startswith(f"{5 * shard} there, {12 - 5 * shard} new in {3 - shard} shard")
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".tmp-")]


def test_new_images_are_the_next_generation(model, images, more, monkeypatch, tmp_path):
    out = tmp_path / "out"
    run(model, images, out)
    before = files_of(out)
    assert run(model, images, out).counts == "12 there, 0 new" and files_of(out) == before
    shutil.copy(more[0], images / "000-first.png")  # its place in the order is the first
    shutil.copy(more[1], images / "zzz-last.png")
    with monkeypatch.context() as patch:
        kill_at(patch, 0)
        with pytest.raises(Killed):
            run(model, images, out)
    shutil.copy(more[2], images / "later.png")  # it comes between the kill and the next command
    done = run(model, images, out)
    assert done.counts.startswith("12 there, 3 new in 2 shards") and done.shape == (15, 48)
    after = files_of(out)
    assert {name: after[name] for name in before} == before
    names = read_features(out).names
    assert [Path(name).name for name in names[12:]] == ["000-first.png", "zzz-last.png", "later.png"]
    assert len(set(names)) == 15
    # of one file, by name
    file = embed(model, images, tmp_path / "f.npy", device="cpu", precision="fp32")
    rows = dict(zip(file.with_suffix(".txt").read_text().splitlines(), np.load(file), strict=True))
    np.testing.assert_allclose(read_features(out).x, np.stack([rows[name] for name in names]), atol=2e-6)


def test_unreadable_images_are_recorded_not_lost(model, images, monkeypatch, tmp_path, capsys):
    bad = sorted(images.iterdir())[3]
    bad.write_bytes(b"no picture")
    options = dict(max_bad_fraction=0.1)
    done = run(model, images, tmp_path / "out", **options)
    assert done.shape == (11, 48) and "0 there, 11 new in 3 shards, 1 skipped" in done.counts
    assert str(bad) not in read_features(tmp_path / "out").names
    # it is neither missing nor tried again, and stays counted
    monkeypatch.setattr(feature_shards, "make_extractor", None)
    assert run(model, images, tmp_path / "out", **options).counts == "11 there, 0 new, 1 skipped"
    with pytest.raises(DataError, match=r"1 of 12 images cannot be used, more than the 1.00% allowed; the first: .*3"):
        run(model, images, tmp_path / "out")


def test_a_shard_may_hold_no_image_that_can_be_read(model, images, tmp_path):
    for path in sorted(images.iterdir())[5:10]:
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"5 of 12 images cannot be used"):  # before the shard is written
        run(model, images, tmp_path / "out", max_bad_fraction=0.3)
    assert [plan.missing() for plan in read_plans(tmp_path / "out")] == [[1, 2]]
    run(model, images, tmp_path / "out", max_bad_fraction=0.5)
    assert read_features(tmp_path / "out").x.shape == (7, 48)


def test_lost_and_moved_images(model, images, monkeypatch, tmp_path):
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    kill_at(monkeypatch, 1)
    with pytest.raises(Killed):
        run(model, images, out)
    monkeypatch.undo()
    shutil.move(images, elsewhere)
    with pytest.raises(
        DataError, match=r"7 images that .*out has yet to embed are not in --data, the first .*--moved OLD"
    ):
        run(model, elsewhere, out)
    with pytest.raises(ConfigError, match="moved: got here, must be OLD=NEW"):
        run(model, elsewhere, out, moved=("here",))
    done = run(model, elsewhere, out, moved=(f"{images}={elsewhere}",))
    assert done.counts.startswith("5 there, 7 new in 2 shards")  # none twice
    assert all(name.startswith(f"{images}/") for name in read_features(out).names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("/a/b/c.png", "/x/b/c.png"),
        ("/a", "/x"),
        ("/ab/c.png", "/ab/c.png"),
        ("/a#z=1", "/x#z=1"),
        ("b/a/c", "b/a/c"),
        ("/q/r", "/s/r"),
    ],
)
def test_moved_names(name, expected):
    assert moved(name, parse_moved(["/a/=/x", "/q=/s/"])) == expected


def test_moved_folders_with_equals_signs_in_their_names(tmp_path):
    new = tmp_path / "rank=8" / "b=1"
    new.mkdir(parents=True)
    assert parse_moved([f"/old/k=v={new}", "/a=/b"]) == [("/old/k=v", str(new)), ("/a", "/b")]
    with pytest.raises(ConfigError, match="several =, and none is before a folder that is there"):
        parse_moved([f"/old/k=v={new}x"])
    with pytest.raises(ConfigError, match="must be OLD=NEW"):
        parse_moved(["/old="])


def change_model(model, tmp_path):
    import timm
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "other"
    shutil.copytree(model.removeprefix("local-dir:"), folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["norm.weight"] += 0.1
    save_file(tensors, file)
    assert timm
    return f"local-dir:{folder}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            dict(mean=(0.1, 0.2, 0.3)),
            r"holds other features: the input has changed \(.*\); choose another --out",
        ),
        (dict(tiles="32"), "holds other features: reading is .*tiles=32.*, there it is .*tiles=none"),
        (dict(with_base=True), "holds other features: columns is features=48 base=48, there it is features=48"),
        (dict(model="other"), "holds other features: the model has changed"),
        (dict(whitening="fitted"), "holds other features: the whitening has changed"),
    ],
)
def test_other_features_are_refused(model, images, tmp_path, options, message):
    out = tmp_path / "out"
    run(model, images, out)
    before = files_of(out)
    if "model" in options:
        options = {}
        model = change_model(model, tmp_path)
    elif "whitening" in options:
        options = dict(whitening=str(tmp_path / "w"))
        embed(model, images, tmp_path / "f.npy", device="cpu", fit_whitening=str(tmp_path / "w"))
    with pytest.raises(ConfigError, match=message) as error:
        run(model, images, out, **options)
    assert "\n" not in str(error.value) and files_of(out) == before
    run(model, images, out, overwrite=True, **options)
    assert files_of(out) != before and len(read_features(out)) > 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_the_base_column_of_a_folder_is_kept_without_the_flag(model, images, more, tmp_path):
    run(model, images, tmp_path / "out", with_base=True)
    shutil.copy(more[0], images / "new.png")
    run(model, images, tmp_path / "out")
    assert len(read_features(tmp_path / "out", "base")) == 13


def test_a_killed_overwrite_leaves_the_old_folder(model, images, monkeypatch, tmp_path):
    out = tmp_path / "out"
    run(model, images, out)
    before = files_of(out)
    for point in range(3):
        with monkeypatch.context() as patch:
            kill_at(patch, point)
            with pytest.raises(Killed):
                run(model, images, out, overwrite=True, shard_size=4)
        assert files_of(out) == before and len(read_features(out)) == 12
    run(model, images, out, overwrite=True, shard_size=4)
    assert len(files_of(out)) == 4 and read_plans(out)[0].size == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def test_what_is_no_folder_of_features_is_not_touched(model, images, tmp_path):
    for options in ({}, {"overwrite": True}):
        with pytest.raises(ConfigError, match=r"out: .*in holds .*png, which is no file of features; choose another"):
            run(model, images, images, **options)
    out = tmp_path / "out"
    run(model, images, out)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds notes.txt, which is no file of features"):
        run(model, images, out, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"out: cannot write to .*file"):
        run(model, images, tmp_path / "file")
    with pytest.raises(ConfigError, match="fit_whitening: needs all features at once"):
        run(model, images, tmp_path / "new", fit_whitening=str(tmp_path / "w"))
    assert not (tmp_path / "new").exists()
    for flag in (dict(shard_size=2), dict(moved=("a=b",))):
        with pytest.raises(ConfigError, match=f"{next(iter(flag))}: .*f.npy is one file"):
            embed(model, images, tmp_path / "f.npy", **flag)


def test_a_second_writer_is_refused(model, images, tmp_path):
    out = tmp_path / "out"
    with feature_folder.locked(out, from_options(EmbedConfig, dict(model=model, data=images, out=str(out)), "embed")):
        script = "import filelock; filelock.FileLock('out/.lock').acquire(0)"  # in another process
        held = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
        assert "Timeout" in held.stderr
        with pytest.raises(ConfigError, match=r"out: .*out is in use by another embed; wait"):
            run(model, images, out)
    run(model, images, out)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_fails_leaves_what_was_written(model, images, monkeypatch, tmp_path, code):
    real, calls = os.fsync, iter(range(100))

    def fails(descriptor):
        if next(calls) == 3:  # plan and its folder's name, then the first shard's content
            raise OSError(code, os.strerror(code))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(
        RunFailedError, match=rf"out: cannot write .*: {os.strerror(code)}; what was written is complete: make"
    ):
        run(model, images, tmp_path / "out")
    monkeypatch.undo()
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".tmp-")]
    run(model, images, tmp_path / "out")
    run(model, images, tmp_path / "whole")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_folder_that_cannot_be_written_is_refused_before_slow_work(model, images, monkeypatch, tmp_path):
    def refused(folder):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(feature_folder, "probe", refused)
    with pytest.raises(ConfigError, match=r"out: cannot write to .*out: Read-only file system; choose another folder"):
        run(model, images, tmp_path / "out")


def test_a_damaged_shard_is_named(model, images, tmp_path):
    out = tmp_path / "out"
    run(model, images, out)
    path, whole = out / "part-000-00001.parquet", files_of(out)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"part-000-00001.parquet is damaged .*; delete it and repeat embed"):
        run(model, images, out)
    path.unlink()
    run(model, images, out)
    assert files_of(out) == whole


@pytest.mark.parametrize("name", ["part-000-00001.parquet", "plan-000.parquet"])
def test_a_flipped_bit_is_noticed(model, images, tmp_path, name):
    """At places spread over the file; of those in the pages of values and names, by their checksum."""
    out = tmp_path / "out"
    run(model, images, out)
    path, table = out / name, read_features(out)
    data = path.read_bytes()
    noticed = 0
    for at in range(4, len(data), len(data) // 40):
        path.write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
        try:
            found = read_features(out)
            assert found.names == table.names and np.array_equal(found.x, table.x)  # no bit of a name or a value
        except DataError as error:
            assert "\n" not in str(error)
            noticed += 1
    assert noticed > 5


def test_a_damaged_plan_is_told_by_embed_too(model, images, more, tmp_path):
    out = tmp_path / "out"
    run(model, images, out)
    path = out / "plan-000.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:30] + bytes([data[30] ^ 1]) + data[31:])
    shutil.copy(more[0], images / "new.png")
    with pytest.raises(DataError, match=r"plan-000.parquet is damaged \(.*\); .* --overwrite"):
        run(model, images, out)


def test_images_that_are_gone_after_a_kill_are_skipped(model, images, monkeypatch, tmp_path):
    out, gone = tmp_path / "out", sorted(images.iterdir())[7]
    kill_at(monkeypatch, 1)
    with pytest.raises(Killed):
        run(model, images, out)
    monkeypatch.undo()
    gone.unlink()
    with pytest.raises(DataError, match=r"1 of 12 images cannot be used, .*07.png: not in --data any more; repair"):
        run(model, images, out)
    assert run(model, images, out, max_bad_fraction=0.1).counts.startswith("5 there, 6 new in 2 shards, 1 skipped")
    table = read_features(out)
    assert len(table) == 11 and str(gone) not in table.names
    oracle = run(model, images, tmp_path / "oracle") and read_features(tmp_path / "oracle")
    assert table.names == oracle.names
    np.testing.assert_allclose(table.x, oracle.x, atol=2e-6)


def test_all_images_of_a_shard_are_gone(model, images, monkeypatch, tmp_path):
    kill_at(monkeypatch, 1)
    with pytest.raises(Killed):
        run(model, images, tmp_path / "out")
    monkeypatch.undo()
    for path in sorted(images.iterdir())[5:10]:
        path.unlink()
    run(model, images, tmp_path / "out", max_bad_fraction=0.5)
    assert read_features(tmp_path / "out").names == tuple(map(str, sorted(images.iterdir())))


def test_replaced_images_are_told(model, images, tmp_path, caplog):
    out, paths = tmp_path / "out", sorted(images.iterdir())
    paths[3].write_bytes(b"no picture")
    run(model, images, out, max_bad_fraction=0.1)
    run(model, images, out, max_bad_fraction=0.1)
    assert "by their size" not in caplog.text
    shutil.copy(paths[4], paths[3])  # repaired
    Image.new("RGB", (50, 40), "red").save(paths[8])
    run(model, images, out, max_bad_fraction=0.1)
    assert "(by their size): 2, the first" in caplog.text and f"{paths[3].name}; their features" in caplog.text
    assert "delete" in caplog.text and "part-000-00000.parquet and 1 more and embed again" in caplog.text
    for k in range(2):  # the cure
        (out / f"part-000-0000{k}.parquet").unlink()
    run(model, images, out)
    caplog.clear()
    run(model, images, out)
    assert "by their size" not in caplog.text
    oracle = run(model, images, tmp_path / "oracle") and read_features(tmp_path / "oracle")
    np.testing.assert_allclose(read_features(out).x, oracle.x, atol=2e-6)


def test_a_lost_plan_is_refused(model, images, more, tmp_path):
    out = tmp_path / "out"
    run(model, images, out)
    shutil.copy(more[0], images / "new.png")
    run(model, images, out)
    for number in (0, 1):
        (out / f"plan-00{number}.parquet").unlink()
        with pytest.raises(DataError, match=r"has lost plan-000.parquet, the names of its images; .* --overwrite"):
            run(model, images, out)
        with pytest.raises(DataError, match=r"has lost plan-000.parquet"):
            read_features(out)
    run(model, images, out, overwrite=True)
    assert len(read_features(out)) == 13


def test_ctrl_c_says_what_is_written(model, images, monkeypatch, capsys, tmp_path):
    real = feature_shards.write_atomic

    def stopped(path, content):
        if path.name == "part-000-00001.parquet":
            raise KeyboardInterrupt
        return real(path, content)

    monkeypatch.setattr(feature_shards, "write_atomic", stopped)
    command = f"embed --model {model} --data {images} --out {tmp_path}/out/ --device cpu --shard-size 5 --num-workers 0"
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 75
    assert "embed: stopped; 1 of 3 shards are written; repeat the command to go on" in capsys.readouterr().err
    monkeypatch.undo()
    with pytest.raises(SystemExit) as stop:
        main(command.split())
    assert stop.value.code == 0
    assert "(base, plain; 12 x 48; 5 there, 7 new in 2 shards, " in capsys.readouterr().out


def test_names_are_found_by_hashes_of_128_bits(images):
    source = open_source(images)
    index = NameIndex.of(source)
    names = [source.name(i) for i in range(len(source))]
    assert index.find([*reversed(names), "no"]).tolist() == [*reversed(range(12)), -1]
    assert index.find([]).tolist() == []

    with pytest.raises(DataError, match="two images are called same"):
        NameIndex(2, lambda i: "same")
    assert NameIndex(0, str).find(["a"]).tolist() == [-1]


def test_a_shard_has_about_32_mb():
    assert default_shard_size(768) == 8192 and default_shard_size(1) == 1 << 23 and default_shard_size(1 << 24) == 1
    for width in (1, 48, 192, 576, 4096, 99_999):
        size = default_shard_size(width)
        assert size & (size - 1) == 0 and (size == 1 or 2**24 < 4 * width * size <= 2**25)


MEMORY = """
import sys
from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.config.files import from_options
from upstep_fast.evaluation.embeddings import run_embed
peaks = []
for data in sys.argv[2:]:
    options = dict(model=sys.argv[1], data=data, out=data + "-out/", device="cpu", with_base=True, num_workers=0)
    run_embed(from_options(EmbedConfig, options | dict(shard_size=256, batch_size=64), "embed"))
    peaks.append(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")))
print((peaks[1] - peaks[0]) / 1024)
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_a_shard(tmp_path):
    """9,000 images, whose features take 53 MB, need hardly more than 1,000 of them do."""
    size = dict(img_size=8, patch_size=8, embed_dim=768, depth=1, num_heads=12, num_classes=0)
    vit = timm.create_model("vit_tiny_patch16_224", **size)
    timm.models.save_for_hf(vit, tmp_path / "model", model_args=size, safe_serialization=True)
    rng = np.random.default_rng(0)
    for count in (1000, 9000):
        (tmp_path / str(count)).mkdir()
        for i, image in enumerate(rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)):
            Image.fromarray(image).save(tmp_path / str(count) / f"{i:05d}.png")
    command = [sys.executable, "-c", MEMORY, f"local-dir:{tmp_path}/model", f"{tmp_path}/1000", f"{tmp_path}/9000"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    # MB; a shard takes 1.5, and what the allocator keeps varies by 10
    assert float(done.stdout.splitlines()[-1]) < 24
