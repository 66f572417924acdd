"""Commands with remote images give what they give with the same images on the local disk, bit for bit."""

import shutil

import boto3
import numpy as np
import pytest
from photos import save_photos
from remote_servers import KEYS, s3_server, upload, web_server
from safetensors.numpy import load_file

import upstep_fast
from upstep_fast.cli import main
from upstep_fast.data.remote import cache, http, objects
from upstep_fast.errors import DataError


def run(*arguments) -> int:
    with pytest.raises(SystemExit) as stop:
        main([*map(str, arguments), "--device", "cpu", "--precision", "fp32", "--num-workers", "2"])
    return stop.value.code


RUNS = ("local", "there", "back")
QUICK = dict(device="cpu", precision="fp32", num_workers=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train/ and test/ with two classes each."""
    top = tmp_path_factory.mktemp("classes")
    for i, picture in enumerate(sorted(save_photos(top, 24).iterdir())):
        place = top / ("test" if i % 3 == 0 else "train") / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture.rename(place / picture.name)
    return top


@pytest.fixture(scope="module")
def remote(folder, tmp_path_factory):
    """The folder in a bucket, with an empty cache."""
    with s3_server() as url, pytest.MonkeyPatch.context() as environment:
        environment.setenv(cache.VARIABLE, str(tmp_path_factory.mktemp("cache")))
        for name, value in (KEYS | {"AWS_ENDPOINT_URL": url}).items():
            environment.setenv(name, value)
        client = boto3.client("s3", endpoint_url=url)
        client.create_bucket(Bucket="classes")
        upload(client, "classes", folder)
        yield "s3://classes"


def test_embed(folder, remote, tmp_path):
    local = upstep_fast.embed("demo", folder, tmp_path / "local.npy", **QUICK)
    there = upstep_fast.embed("demo", remote, tmp_path / "there.npy", **QUICK)
    assert np.array_equal(np.load(local), np.load(there))
    names = local.with_suffix(".txt").read_text().replace(str(folder), remote)
    assert there.with_suffix(".txt").read_text() == names
    m = upstep_fast.load("demo", device="cpu", precision="fp32")
    assert np.array_equal(m.embed(remote), np.load(local))
    assert np.array_equal(m.embed(names.split()[:5], batch_size=5), m.embed(folder)[:5])


def test_embed_of_an_http_list_writes_shards(folder, tmp_path):
    with web_server() as site:
        site.add_folder(folder)
        names = sorted(site.files)
        site.files["/list.txt"] = "\n".join(name[1:] for name in names).encode()
        address = f"{site.url}/list.txt"
        assert run("embed", "--model", "demo", "--data", address, "--out", tmp_path / "f") == 0
        local = upstep_fast.embed("demo", folder, tmp_path / "local.npy", **QUICK)
        table = upstep_fast.evaluation.feature_files.table.read_features(tmp_path / "f")
        assert np.array_equal(table.x, np.load(local)) and table.names == tuple(site.url + name for name in names)
        http._current.clear()


def test_a_run_from_a_bucket_resumed_from_it_or_a_folder_equals_a_local_one(folder, remote, model, short_run, tmp_path):
    options = short_run | dict(lr_schedule="constant", warmup=2, verdict="auto")
    upstep_fast.adapt(model, folder, tmp_path / "local", **options)
    upstep_fast.adapt(model, remote, tmp_path / "there", **options | dict(steps=3))
    shutil.copytree(tmp_path / "there", tmp_path / "back")
    upstep_fast.adapt(model, remote, tmp_path / "there", **options, resume=True)
    upstep_fast.adapt(model, folder, tmp_path / "back", **options, resume=True)
    ours, *others = (load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in RUNS)
    assert all(np.array_equal(ours[name], other[name]) for other in others for name in ours | other)


def test_a_run_whose_bucket_has_changed_is_not_resumed(remote, model, short_run, tmp_path):
    client = boto3.client("s3", endpoint_url=objects.file_system(remote).client_kwargs.get("endpoint_url"))
    out = tmp_path / "out"
    upstep_fast.adapt(model, f"{remote}/train", out, **short_run | dict(steps=2, verdict="off"))
    client.put_object(Bucket="classes", Key="train/a/new.png", Body=b"x")
    try:
        with pytest.raises(upstep_fast.errors.UpstepError, match=r"the images are not those of .*: 16 then, 17 now"):
            upstep_fast.adapt(model, f"{remote}/train", out, **short_run | dict(verdict="off"), resume=True)
    finally:
        client.delete_object(Bucket="classes", Key="train/a/new.png")


def test_eval(folder, remote, capsys):
    results = []
    for data in (str(folder), remote):
        assert run("eval", "--model", "demo", "--data", data) == 0
        results.append(capsys.readouterr().out.replace(remote, str(folder)))
    assert results[0] == results[1]


def test_an_unreadable_remote_image_is_listed_as_a_local_one(remote, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"{remote}/train/a/04.png\n{remote}/none.png\n{remote}/train/b/01.png\n")
    options = "--model", "demo", "--data", tmp_path / "list.txt", "--out", tmp_path / "x.npy"
    assert run("embed", *options) == DataError.exit_code
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert f"{remote}/none.png: cannot be read: no such object or folder; repair them" in line
    assert run("embed", *options, "--max-bad-fraction", "0.5") == 0
    assert np.load(tmp_path / "x.npy").shape[0] == 2
