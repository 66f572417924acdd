"""Features of a run: embedded once, extended, and given in the order of the images. Oracle: `m.embed`."""

import errno
import shutil
from dataclasses import replace

import numpy as np
import pytest

import upstep_fast
from upstep_fast.config.base import RuntimeConfig
from upstep_fast.config.run_features import RunFeaturesConfig
from upstep_fast.errors import ConfigError, DataError
from upstep_fast.evaluation import features, run_features
from upstep_fast.evaluation.feature_files.table import read_features
from upstep_fast.evaluation.run_features import read_or_embed

pytest.importorskip("pyarrow")


@pytest.fixture(scope="module")
def trained(model, photos, short_run, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    folder = root / "photos"
    shutil.copytree(photos, folder)
    upstep_fast.adapt(model=model, data=folder, out=root / "run", **short_run)
    return root


@pytest.fixture
def run(trained, tmp_path):
    """A run and its images, in folders of this test; `config.toml` names those of the first place."""
    shutil.copytree(trained / "run", tmp_path / "run")
    return tmp_path / "run"


def config_of(run, **options):
    how = RuntimeConfig(device="cpu", precision="fp32")
    return RunFeaturesConfig(str(run), runtime=how, **options)


def embedded(run, data, base=False):
    m = upstep_fast.load(run, device="cpu", precision="fp32")
    m = upstep_fast.load(m.backbone.name, device="cpu", precision="fp32") if base else m
    return m.paths(data), m.embed(data)


def test_the_features_of_the_training_images(run, trained):
    tables = read_or_embed(config_of(run), base=True)
    for column in ("features", "base"):
        names, x = embedded(run, trained / "photos", column == "base")
        assert list(tables[column].names) == names
        np.testing.assert_allclose(tables[column].x, x, atol=2e-6)
    assert (run / "features" / "plan-000.parquet").exists()


def test_what_is_there_is_not_embedded_again(run, trained, photos, monkeypatch, tmp_path):
    read_or_embed(config_of(run))
    with monkeypatch.context() as patch:
        patch.setattr(run_features, "run_embed", None)
        first = read_or_embed(config_of(run), base=True)
    some = tmp_path / "some.txt"
    names = list(first["features"].names)
    chosen = [names[7], names[2], names[20]]
    some.write_text("".join(f"{name}\n" for name in chosen))
    with monkeypatch.context() as patch:
        patch.setattr(run_features, "run_embed", None)
        subset = read_or_embed(config_of(run, data=(str(some),)), base=True)
    assert sorted(subset["features"].names) == sorted(chosen)  # in the order of the source
    for column, table in subset.items():
        at = [names.index(name) for name in table.names]
        assert np.array_equal(table.x, first[column].x[at])
    # images of another folder are added, and the run's own stay
    others = read_or_embed(config_of(run, data=(str(photos),)))["features"]
    assert len(others) == 24 and len(read_features(run / "features")) == 48
    np.testing.assert_allclose(others.x, embedded(run, photos)[1], atol=2e-6)
    assert np.array_equal(read_or_embed(config_of(run))["features"].x, first["features"].x)


def test_images_that_cannot_be_read_are_left_out(run, photos, tmp_path, caplog):
    shutil.copytree(photos, tmp_path / "in")
    for i in range(101 - 24):
        shutil.copy(tmp_path / "in" / "00.png", tmp_path / "in" / f"copy-{i:03d}.png")
    (tmp_path / "in" / "07.png").write_bytes(b"no picture")
    for _ in range(2):
        table = read_or_embed(config_of(run, data=(str(tmp_path / "in"),)))["features"]
        assert len(table) == 100 and not any(name.endswith("/07.png") for name in table.names)
        assert "has none of 1 of 101 images; left out" in caplog.text


def test_many_images_that_cannot_be_read(run, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "in")
    paths = sorted((tmp_path / "in").iterdir())
    for path in paths[:3]:
        path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"3 of 24 images cannot be used, .* or raise --max-bad-fraction"):
        read_or_embed(config_of(run, data=(str(tmp_path / "in"),)))
    table = read_or_embed(config_of(run, data=(str(tmp_path / "in"),), max_bad_fraction=0.2))["features"]
    assert table.names == tuple(map(str, paths[3:]))  # the cure of the message
    with pytest.raises(ConfigError, match="max_bad_fraction"):
        config_of(run, max_bad_fraction=2.0)


@pytest.mark.parametrize("given", [False, True])
def test_no_image_that_can_be_read(run, tmp_path, given):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"no picture")
    options = dict(data=(str(tmp_path / "in"),), max_bad_fraction=1.0)
    with pytest.raises(DataError, match="none of the 1 images could be read"):
        read_or_embed(config_of(run, **options))
    if given:
        with pytest.raises(DataError, match=r"features: .*/features holds those of no image"):
            read_or_embed(config_of(run, features=str(run / "features")))


def test_features_of_a_run_that_cannot_be_written_are_not_kept(run, monkeypatch, caplog):
    kept = read_or_embed(config_of(run))["features"]
    shutil.rmtree(run / "features")

    def refuse(folder):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(run_features, "probe", refuse)
    caplog.set_level("INFO")
    table = read_or_embed(config_of(run))["features"]
    assert table.names == kept.names and not (run / "features").exists()
    np.testing.assert_allclose(table.x, kept.x, atol=2e-6)
    assert "features cannot be written (Read-only file system)" in caplog.text


def test_a_folder_of_other_files_is_refused_with_a_flag_that_there_is(run):
    (run / "features").mkdir()
    (run / "features" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"^features: .*holds notes.txt, .*; give others with --features$"):
        read_or_embed(config_of(run))
    assert (run / "features" / "notes.txt").read_text() == "mine"


def test_features_that_name_an_image_twice(run, trained, tmp_path):
    upstep_fast.embed(run, trained / "photos", tmp_path / "f.npy", device="cpu")
    file = tmp_path / "f.txt"
    first, _, *rest = file.read_text().splitlines()
    file.write_text("\n".join([first, first, *rest, ""]))
    config = config_of(run, features=str(tmp_path / "f.npy"), data=(str(trained / "photos"),))
    with pytest.raises(DataError, match=r"^features: two images in .*f.npy are called .*; embed them again"):
        read_or_embed(config)


def test_given_features(run, trained, photos, tmp_path):
    out = tmp_path / "given"
    read_or_embed(config_of(run))
    shutil.copytree(run / "features", out)
    shutil.rmtree(run / "features")
    tables = read_or_embed(config_of(run, features=str(out)), base=True)
    assert len(tables["base"]) == 24 and not (run / "features").exists()
    with pytest.raises(DataError, match=r"given has features of other images: the first is .*; embed those of --data"):
        read_or_embed(config_of(run, features=str(out), data=(str(photos),)))
    place = f"{trained}/photos={photos}"
    moved = read_or_embed(config_of(run, features=str(out), data=(str(photos),), moved=(place,)))["features"]
    assert len(moved) == 24 and all(name.startswith(str(photos)) for name in moved.names)
    # without facts nothing is compared
    upstep_fast.embed(run, trained / "photos", tmp_path / "f.npy", device="cpu")
    assert len(read_or_embed(config_of(run, features=str(tmp_path / "f.npy")))["features"]) == 24


@pytest.mark.parametrize("given", [False, True])
def test_features_of_another_adapter_are_refused(run, monkeypatch, given):
    read_or_embed(config_of(run))
    file = run / "adapter" / "adapter_config.json"
    file.write_text(file.read_text().replace("\n", "\n ", 1))  # another fingerprint, the same adapter
    config = config_of(run, features=str(run / "features") if given else None)
    with pytest.raises(ConfigError, match=r"those of another adapter than .*run \(.*\); embed again: .* --overwrite"):
        read_or_embed(config)


def test_features_without_the_base_are_refused_only_where_it_is_needed(run, trained):
    upstep_fast.embed(run, trained / "photos", f"{run}/features/", device="cpu")
    assert len(read_or_embed(config_of(run))["features"]) == 24
    with pytest.raises(DataError, match="has no column base, but path, features; embed --with-base --overwrite"):
        read_or_embed(config_of(run), base=True)


def test_a_model_without_a_folder_is_embedded_in_memory(model, photos):
    tables = read_or_embed(config_of(model, data=(str(photos),)), base=True)
    assert len(tables["features"]) == 24 and np.array_equal(tables["base"].x, tables["features"].x)


def test_without_pyarrow_features_are_not_kept(run, trained, monkeypatch):
    kept = read_or_embed(config_of(run))["features"]
    shutil.rmtree(run / "features")
    monkeypatch.setattr(run_features, "has_pyarrow", lambda: False)
    table = read_or_embed(config_of(run))["features"]
    assert table.names == kept.names and not (run / "features").exists()
    np.testing.assert_allclose(table.x, kept.x, atol=2e-6)


def test_a_run_that_names_no_images(run):
    file = run / "config.toml"
    file.write_text("\n".join(line for line in file.read_text().splitlines() if not line.startswith("paths")))
    with pytest.raises(ConfigError, match=r"data: .*config.toml names no images; give --data"):
        read_or_embed(replace(config_of(run), data=()))


def test_what_is_no_run_is_said_before_the_work(photos, tmp_path, caplog):
    for at, reason in ((tmp_path / "nothere", "does not exist"), (photos, "has no config.toml, so it is not of a run")):
        with pytest.raises(ConfigError, match=f"^run: {at} {reason}; give the folder that adapt wrote"):
            read_or_embed(RunFeaturesConfig(run=str(at)))
    assert "not kept" not in caplog.text


@pytest.mark.parametrize("name", ["features.npy", "features/"])
def test_the_base_model_runs_only_where_its_features_are_written(run, trained, monkeypatch, tmp_path, name):
    built, real = [], features.feature_function
    monkeypatch.setattr(features, "feature_function", lambda model, *how: built.append(model) or real(model, *how))
    how = dict(device="cpu", precision="fp32")
    out = upstep_fast.embed(run, trained / "photos", f"{tmp_path}/{name}", **how)
    assert len(built) == 1
    np.testing.assert_allclose(read_features(out).x, embedded(run, trained / "photos")[1], atol=2e-6)
    upstep_fast.embed(run, trained / "photos", tmp_path / "both.npy", ensemble=True, **how)
    assert len(built) == 1 + 2
