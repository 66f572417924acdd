"""Images on web servers and object stores: read as from a local folder, cached, and refused in one line."""

import gzip
import json
import os
import socket
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import boto3
import numpy as np
import pytest
from photos import save_photos
from remote_servers import KEYS, Store, hub_server, s3_server, upload, web_server

from upstep_fast.data.loading.skipped_images import read_image
from upstep_fast.data.reading import retries
from upstep_fast.data.remote import cache, http, objects
from upstep_fast.data.remote.address import joined, shown
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import BadImage, DataError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Each test has an empty cache, and has not met any server."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(cache.VARIABLE, str(folder))
    monkeypatch.setattr(http, "_answered", set())
    monkeypatch.setattr(http, "_current", set())
    objects._asked.cache_clear()
    monkeypatch.setattr(retries, "WAITS", (0.01, 0.01, 0.01))
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """train/ and test/ with two classes each, names that need care, and files of other kinds."""
    top = tmp_path_factory.mktemp("tree")
    pictures = sorted(save_photos(top, 8).iterdir())
    names = ["train/a/1.png", "train/a/10.png", "train/a/2 [x]#%.png", "train/a-b/ä.png", "train/b/c/7.png"]
    names += ["train/.hidden/3.png", "test/a/4.png", "test/b/5.png"]
    for picture, name in zip(pictures, names, strict=True):
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        picture.rename(top / name)
    (top / "train/notes.txt").write_text("not a list")
    return top


@pytest.fixture(scope="module")
def web():
    with web_server() as server:
        yield server


@pytest.fixture
def site(web, tree):
    """The web server with the files of `tree`, and nothing left of other tests."""
    for state in (web.files, web.statuses, web.requests):
        state.clear()
    for paths in (web.cut, web.endless, web.silent):
        paths.clear()
    web.without_tags = False
    web.add_folder(tree)
    return web


@pytest.fixture(scope="module")
def store(tree):
    """A boto3 client of an S3 server with the bucket `photos` that holds `tree` below set/."""
    objects._file_system.cache_clear()
    with s3_server() as url, pytest.MonkeyPatch.context() as environment:
        for name, value in (KEYS | {"AWS_ENDPOINT_URL": url}).items():
            environment.setenv(name, value)
        client = boto3.client("s3", endpoint_url=url)
        client.create_bucket(Bucket="photos")
        upload(client, "photos", tree, "set/")
        yield client


def contents(source) -> list[bytes]:
    return [source.read(i) for i in range(len(source))]


def relative_names(source, root) -> list[str]:
    return [source.name(i).removeprefix(f"{root}/") for i in range(len(source))]


def same(remote, remote_root, local, local_root) -> None:
    assert relative_names(remote, remote_root) == relative_names(local, local_root)
    assert contents(remote) == contents(local)
    assert remote.labels == local.labels


@pytest.mark.parametrize("split", [None, "train", "test"])
def test_a_folder_of_a_bucket_is_read_as_a_local_folder(store, tree, split):
    remote, local = open_source("s3://photos/set/", split), open_source(tree, split)
    same(remote, "s3://photos/set", local, tree)
    assert remote.fingerprint() == local.fingerprint()  # so that a run can be resumed from either
    assert remote.summary.replace("s3://photos/set", str(tree)) == local.summary
    assert (remote.sizes() == local.sizes()).all()


def test_a_listing_of_several_pages(store, tree, monkeypatch):
    monkeypatch.setattr(objects, "PAGE", 2)
    same(open_source("s3://photos/set"), "s3://photos/set", open_source(tree), tree)


def test_metadata_of_a_remote_folder_gives_classes(store, tmp_path):
    save_photos(tmp_path, 3)
    (tmp_path / "metadata.csv").write_text("file_name,label\n00.png,x\n02.png,y\nnone.png,z\n")
    upload(store, "photos", tmp_path, "described/")
    remote, local = open_source("s3://photos/described"), open_source(tmp_path)
    same(remote, "s3://photos/described", local, tmp_path)
    assert remote.labels == ["x", "y"]
    assert [(name.replace("s3://photos/described", str(tmp_path)), why) for name, why in remote.problems] == list(
        local.problems
    )


def archive(tree: Path, path: Path) -> Path:
    if path.suffix == ".tar":
        with tarfile.open(path, "w") as tar:
            tar.add(tree, "")
    else:
        with zipfile.ZipFile(path, "w") as file:
            for each in sorted(tree.rglob("*")):
                file.write(each, each.relative_to(tree))
    return path


@pytest.mark.parametrize("suffix", [".tar", ".zip"])
@pytest.mark.parametrize("where", ["web", "store"])
def test_archives_are_read_as_local_ones(site, store, tree, tmp_path, where, suffix):
    path = archive(tree, tmp_path / f"all{suffix}")
    site.files[f"/all{suffix}"] = path.read_bytes()
    store.upload_file(str(path), "photos", f"all{suffix}")
    address = f"{site.url}/all{suffix}" if where == "web" else f"s3://photos/all{suffix}"
    same(open_source(address, "train"), address, open_source(path, "train"), path)


def test_patterns_of_shards_in_a_bucket(store, tree, tmp_path):
    paths = [archive(tree / part, tmp_path / f"shard-{i}.tar") for i, part in enumerate(("train/a", "train/b"))]
    for path in paths:
        store.upload_file(str(path), "photos", f"shards/{path.name}")
    local = open_source([str(tmp_path / "shard-*.tar")])
    for pattern in ("s3://photos/shards/shard-*.tar", "s3://photos/shards/shard-{0..1}.tar"):
        same(open_source(pattern), "s3://photos/shards", local, tmp_path)
    with pytest.raises(DataError, match=r"nothing in the store matches s3://photos/none-\*.tar"):
        open_source("s3://photos/none-*.tar")


def test_a_folder_in_a_remote_zip(site, tree, tmp_path):
    site.files["/all.zip"] = archive(tree, tmp_path / "all.zip").read_bytes()
    source = open_source(f"zip://train/a::{site.url}/all.zip")
    assert relative_names(source, f"{site.url}/all.zip/train/a") == ["1.png", "10.png", "2 [x]#%.png"]
    assert len(open_source(f"zip://::{tmp_path}/all.zip")) == len(open_source(tree))


@pytest.mark.parametrize("where", ["list on this disk", "list on the server"])
def test_lists_with_addresses(site, tree, tmp_path, where):
    names = ["train/a/1.png", "test/b/5.png", "train/b/c/7.png"]
    rows = "".join(f"{site.url}/{name},{i}\n" for i, name in enumerate(names))
    local = tmp_path / "list.csv"
    local.write_text(f"path,label\n{rows}" + (f"{tree}/test/a/4.png,3\n" if where == "list on this disk" else ""))
    site.files["/sub/list.csv"] = local.read_bytes() + b"../train/a/10.png,4\n"
    source = open_source(str(local) if where == "list on this disk" else f"{site.url}/sub/list.csv")
    last = tree / ("test/a/4.png" if where == "list on this disk" else "train/a/10.png")
    assert contents(source) == [(tree / name).read_bytes() for name in names] + [last.read_bytes()]
    assert source.name(0) == f"{site.url}/train/a/1.png" and source.labels[:3] == ["0", "1", "2"]


def test_rows_of_a_list_that_name_no_remote_file(site, tmp_path):
    """A list of a stranger reaches neither files of this machine by its address nor other protocols."""
    rows = [
        f"{site.url}/train/a/1.png",
        f"zip://a.png::{tmp_path}/all.zip",
        "memory://a.png",
        "file:///etc/hostname.png",
    ]
    (tmp_path / "list.txt").write_text("\n".join(rows))
    source = open_source(tmp_path / "list.txt")
    assert read_image(source, 0).shape == (3, 40, 40)
    for i, reason in ((1, "names no files in zip files"), (2, "No such file"), (3, "No such file")):
        with pytest.raises(BadImage, match=reason):
            read_image(source, i)
    site.files["/sub/list.txt"] = f"/etc/hostname.png\n{tmp_path}/list.txt.png\n".encode()
    source = open_source(f"{site.url}/sub/list.txt")
    assert source.name(0) == f"{site.url}/etc/hostname.png"
    with pytest.raises(BadImage, match=r"no such file \(404\)"):
        read_image(source, 0)


def test_a_single_image(site, store, tree):
    data = (tree / "train/a/1.png").read_bytes()
    site.files["/view"] = data  # an image without a suffix
    for address in (f"{site.url}/train/a/1.png", f"{site.url}/view?id=3", "s3://photos/set/train/a/1.png"):
        source = open_source(address)
        assert contents(source) == [data] and source.name(0) == address


def test_a_changed_file_is_fetched_again_and_an_equal_one_is_not(site, own_cache):
    address, (first, second) = f"{site.url}/train/a/1.png", (b"first", b"second")
    site.files["/train/a/1.png"] = first
    source = open_source(address)
    assert source.read(0) == source.read(0) == first
    assert site.requests == {"200 /train/a/1.png": 1}
    http._current.clear()  # as in another process
    assert source.read(0) == first and site.requests["304 /train/a/1.png"] == 1
    site.files["/train/a/1.png"] = second
    http._current.clear()
    assert source.read(0) == second
    assert sorted(path.read_bytes() for path in own_cache.rglob("*.png")) == [first, second]  # a run may be reading it


def test_a_server_without_tags_is_asked_again_by_each_process(site):
    site.without_tags = True
    source = open_source(f"{site.url}/train/a/1.png")
    source.read(0)
    site.files["/train/a/1.png"] = b"other"
    http._current.clear()
    assert source.read(0) == b"other"


def test_a_bucket_that_changes(store, tree):
    store.put_object(Bucket="photos", Key="changing/1.png", Body=b"first")
    store.put_object(Bucket="photos", Key="changing/2.png", Body=b"second")
    before = open_source("s3://photos/changing/")
    assert before.read(0) == b"first"
    store.put_object(Bucket="photos", Key="changing/1.png", Body=b"FIRST")
    store.put_object(Bucket="photos", Key="changing/2.png", Body=b"SECOND")
    assert before.read(0) == b"first"  # from the cache: a run sees one version
    with pytest.raises(OSError, match="changed since it was listed"):
        before.read(1)
    assert contents(open_source("s3://photos/changing/")) == [b"FIRST", b"SECOND"]
    store.delete_object(Bucket="photos", Key="changing/2.png")
    with pytest.raises(BadImage, match="cannot be read: no such object"):
        read_image(before, 1)


def test_errors_that_pass_are_retried(site):
    site.statuses["/train/a/1.png"] = [500, 429, 503]
    assert read_image(open_source(f"{site.url}/train/a/1.png"), 0).shape == (3, 40, 40)
    site.files["/a.tar"] = b""
    site.statuses["/a.tar"] = [502, 502, 502, 502]
    with pytest.raises(DataError, match=r"cannot read .*/a.tar: the server answers 502, tried 4 times"):
        open_source(f"{site.url}/a.tar")


@pytest.mark.parametrize(
    ("status", "reason"), [(404, r"no such file \(404\)"), (403, r"forbidden \(403\)"), (418, "the server answers 418")]
)
def test_errors_of_the_file_are_not_retried(site, status, reason):
    site.statuses |= {"/train/a/1.png": [status] * 9, "/a.tar": [status] * 9}
    with pytest.raises(BadImage, match=f"cannot be read: {reason}"):
        read_image(open_source(f"{site.url}/train/a/1.png"), 0)
    with pytest.raises(DataError, match=f"a.tar: {reason}"):
        open_source(f"{site.url}/a.tar")
    assert site.requests == {f"{status} /train/a/1.png": 1, f"{status} /a.tar": 1}


def test_half_a_file_is_never_cached(site, own_cache):
    site.cut.add("/train/a/1.png")
    source = open_source(f"{site.url}/train/a/1.png")
    with pytest.raises(DataError, match=r"the connection ended before the file, tried 4 times"):
        read_image(source, 0)
    assert not [path for path in own_cache.rglob("*") if path.is_file()]
    site.cut.clear()
    assert read_image(source, 0).shape == (3, 40, 40)


def test_a_server_that_lies_about_sizes(site, own_cache, monkeypatch):
    monkeypatch.setattr("upstep_fast.data.sources.remote_files.MAX_BYTES", 1 << 20)
    site.endless |= {"/train/a/1.png", "/a.tar"}
    with pytest.raises(BadImage, match="more than 1048576 bytes, the limit of an image"):
        read_image(open_source(f"{site.url}/train/a/1.png"), 0)
    site.files["/a.tar"] = b""
    free = iter([1 << 40] * 3)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("", (), {"free": next(free, 0)}))
    with pytest.raises(DataError, match=f"MB free in the cache .*; make room, or set {cache.VARIABLE}"):
        open_source(f"{site.url}/a.tar")
    assert not [path for path in own_cache.rglob(".part-*")]


def test_without_room_images_are_read_without_a_cache(site, store, tree, own_cache, monkeypatch, caplog):
    monkeypatch.setattr(cache, "MIN_FREE", 1 << 62)
    for address in (f"{site.url}/train/a/1.png", "s3://photos/set/train/a/1.png"):
        assert contents(open_source(address)) == [(tree / "train/a/1.png").read_bytes()]
    assert caplog.text.count("remote files are read without a cache") == 1
    monkeypatch.setenv(cache.VARIABLE, "/proc/none")
    assert contents(open_source(f"{site.url}/train/a/1.png")) == [(tree / "train/a/1.png").read_bytes()]


def test_an_unreachable_server_is_one_line_at_the_first_try(site, tmp_path, caplog):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/a.png"
    with pytest.raises(DataError, match=r"cannot read http.*a.png: no connection to 127.0.0.1:\d+ .*; check the addr"):
        read_image(open_source(address), 0)
    with pytest.raises(DataError, match=r"no connection to 127.0.0.1"):
        open_source(address.replace(".png", ".tar"))
    assert "trying again" not in caplog.text
    (tmp_path / "list.txt").write_text(f"{site.url}/train/a/1.png\n{address}\n")
    source = open_source(tmp_path / "list.txt")
    read_image(source, 0)
    with pytest.raises(BadImage, match="no connection to"):  # the network is there: the fault is the file's
        read_image(source, 1)


def test_a_silent_server(site, monkeypatch):
    monkeypatch.setattr(http, "ANSWER", 0.2)
    http._file_system.cache_clear()
    site.silent.add("/a.tar")
    with pytest.raises(DataError, match=r"a.tar: no answer of 127.0.0.1:\d+ within 0 s"):
        open_source(f"{site.url}/a.tar")
    http._file_system.cache_clear()


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://nothing-here/a/", "s3://nothing-here/a/: no such bucket|no such object or folder"),
        ("s3://photos/none/", "s3://photos/none/: no such object or folder"),
        ("s3://photos/none.tar", "s3://photos/none.tar: no such object"),
        ("s3://photos/texts/", "no images in s3://photos/texts/; looked for files"),
        ("s3://photos/texts/1.7z", "s3://photos/texts/1.7z is no image, .tar or .zip file or list; unpack it"),
        ("s3:/photos/set", "no file or folder at s3:/photos/set; an address is given as text"),
        ("http://127.0.0.1:1/photos/", "is a folder, and web servers do not list them; give a .tar"),
        ("http://127.0.0.1:1/*.tar", r"web servers do not list files; write \{000..031\} in place of \*"),
        ("sftp://host/a", "sftp://host/a is an address of a kind that is not read; read are s3://"),
        ("S3://photos/set", "S3://photos/set is an address of a kind that is not read; read are s3://"),
        ("zip://a", "write zip://FOLDER::FILE.zip"),
        ("gs://photos/a", "gs:// needs the package gcsfs; pip install gcsfs"),
    ],
)
def test_addresses_that_are_refused(store, address, message):
    store.put_object(Bucket="photos", Key="texts/1.txt", Body=b"text")
    store.put_object(Bucket="photos", Key="texts/1.7z", Body=b"text")
    with pytest.raises(DataError, match=message) as error:
        open_source(address)
    assert "\n" not in str(error.value)


def test_a_store_that_refuses_or_is_not_there(store, monkeypatch):
    files = objects.file_system("s3://photos")
    monkeypatch.setattr(files, "info", lambda path: (_ for _ in ()).throw(PermissionError("Access Denied")))
    with pytest.raises(DataError, match=r"cannot read s3://photos/set/: forbidden; check the credentials"):
        open_source("s3://photos/set/")
    monkeypatch.setattr(objects, "FIRST_ANSWER", 0.1)
    monkeypatch.setattr(files, "info", lambda path: threading.Event().wait())
    with pytest.raises(DataError, match=r"cannot read s3://photos/set/: no answer of s3://photos/set/ within 0 s"):
        open_source("s3://photos/set/")


def test_credentials_that_expire_stop_the_run_and_condemn_no_image(store, monkeypatch):
    source = open_source("s3://photos/set/")
    monkeypatch.setattr(objects, "_block", lambda *args: (_ for _ in ()).throw(PermissionError("ExpiredToken")))
    with pytest.raises(DataError, match=r"forbidden; check the credentials .*tried 4 times"):
        read_image(source, 0)


@pytest.mark.parametrize("package", ["fsspec", "aiohttp", "s3fs"])
def test_missing_packages_name_the_extra(site, store, monkeypatch, package):
    http._file_system.cache_clear()
    objects._file_system.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    if package == "s3fs":
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    address = "s3://photos/set/" if package == "s3fs" else f"{site.url}/a.tar"
    with pytest.raises(DataError, match=r"needs the package .*; pip install 'upstep_fast\[remote\]'"):
        open_source(address)
    http._file_system.cache_clear()


def test_secrets_in_addresses_are_not_shown(site, tree):
    signed = f"{site.url}/train/a/1.png?X-Amz-Credential=AKIA1&X-Amz-Signature=5ecret&part=2".replace("//", "//me:pw@")
    source = open_source(signed)
    assert source.name(0) == f"{site.url}/train/a/1.png?X-Amz-Credential=...&X-Amz-Signature=...&part=2"
    assert source.read(0) == (tree / "train/a/1.png").read_bytes()
    site.statuses["/train/a/1.png"] = [404] * 2
    http._current.clear()
    with pytest.raises(OSError) as error:
        source.read(0)
    with pytest.raises(DataError) as opening:
        open_source(signed.replace("1.png", "none.tar"))
    for text in map(str, (error.value, opening.value)):
        assert not any(secret in text for secret in ("5ecret", "AKIA1", "pw@"))
    assert shown("s3://a/b?c=1") == "s3://a/b?c=1"


def test_addresses_in_folders():
    assert joined("http://h/a/b", "../c d.jpg") == "http://h/a/c d.jpg"
    assert joined("s3://b/a/", "c#.jpg") == "s3://b/a/c#.jpg"
    assert joined("s3://b/a", "https://h/x") == "https://h/x"


def test_files_that_are_read_by_path_come_from_the_cache(store, tmp_path):
    nib = pytest.importorskip("nibabel")
    volume = np.arange(4 * 5 * 6, dtype=np.uint8).reshape(4, 5, 6)
    nib.save(nib.Nifti1Image(volume, np.eye(4)), tmp_path / "scan.nii.gz")
    store.upload_file(str(tmp_path / "scan.nii.gz"), "photos", "scans/scan.nii.gz")
    remote, local = open_source("s3://photos/scans/"), open_source(tmp_path / "scan.nii.gz")
    assert relative_names(remote, "s3://photos/scans") == relative_names(local, tmp_path)
    assert all((read_image(remote, i) == read_image(local, i)).all() for i in range(len(local)))


def test_two_addresses_of_one_file_count_once(store, site):
    address = f"{site.url}/train/a/1.png"
    source = open_source([address, address, "s3://photos/set/train", "s3://photos/set/train/a"])
    assert len(source) == 1 + 5 and len(source.problems) == 1 + 3


def test_the_record_of_another_version_or_a_damaged_one_is_not_used(site, own_cache):
    source = open_source(f"{site.url}/train/a/1.png")
    expected = source.read(0)
    (record,) = own_cache.rglob("*.json")
    for text in ("{", "[]", json.dumps({"tag": 1}), ""):
        record.write_text(text)
        http._current.clear()
        assert source.read(0) == expected
    content = cache.content_path(source.name(0), cache.latest(source.name(0)))
    os.truncate(content, 3)
    assert source.read(0) == expected


@pytest.fixture
def other_store(tree, monkeypatch):
    """A store other than S3, which holds `tree`, for gs://."""
    files = {f"b/set/{path.relative_to(tree)}": path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    monkeypatch.setattr(Store, "files", files)
    monkeypatch.setattr(Store, "requests", [])
    monkeypatch.setattr(objects, "_file_system", lambda protocol, process: Store())
    return Store


def test_another_store_by_fsspec(other_store, tree, monkeypatch):
    monkeypatch.setattr(objects, "BLOCK", 1000)
    same(open_source("gs://b/set", "train"), "gs://b/set", open_source(tree, "train"), tree)
    count = len(other_store.requests)
    assert any(request.endswith("1000-2000") for request in other_store.requests)
    assert contents(open_source("gs://b/set", "train")) == contents(open_source(tree, "train"))
    assert len(other_store.requests) == count  # all of it from the cache
    other_store.files["b/set/train/a/1.png"] = b"other"
    assert open_source("gs://b/set/train/a/1.png").read(0) == b"other"
    assert len(open_source("gs://b/set/train/a/*.png")) == 3


def test_a_file_that_is_shorter_than_listed(other_store, monkeypatch):
    source = open_source("gs://b/set")
    other_store.files["b/set/train/a/1.png"] = b"short"
    with pytest.raises(DataError, match=r"gs://b/set/train/a/1.png: 5 of \d+ bytes from 0 on came, tried 4 times"):
        [read_image(source, i) for i in range(len(source))]


def test_errors_of_a_library_are_one_line(other_store, monkeypatch):
    def fails(self, path):
        raise KeyError("https://me:pw@host/a?sig=5ecret\nsecond line")

    monkeypatch.setattr(Store, "info", fails)
    with pytest.raises(DataError, match=r"cannot read gs://b/set: KeyError: .https://host/a\?sig=\.\.\.") as error:
        open_source("gs://b/set")
    assert "\n" not in str(error.value) and "5ecret" not in str(error.value)


def test_a_data_set_of_the_hub(tree, monkeypatch):
    from huggingface_hub import constants

    from upstep_fast import network

    files = {f"photos/{path.relative_to(tree)}": path.read_bytes() for path in tree.rglob("*") if path.is_file()}
    objects._file_system.cache_clear()
    with hub_server(files) as hub:
        url = f"http://127.0.0.1:{hub.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
        monkeypatch.setattr(network, "_checked", None)
        root = "hf://datasets/me/set/photos"
        same(open_source(root, "train"), root, open_source(tree, "train"), tree)
        with pytest.raises(DataError, match="cannot read hf://datasets/me/none/photos: no such object or folder"):
            open_source("hf://datasets/me/none/photos")
    monkeypatch.setattr(network, "_checked", None)
    with pytest.raises(DataError, match=r"cannot read hf://datasets/me/set/photos: no connection to the hub \("):
        open_source(root)
    objects._file_system.cache_clear()


def test_a_failure_that_passes_leaves_no_file_out(other_store, monkeypatch):
    """Files without a suffix and scans are looked at when a folder is opened."""
    volume = gzip.compress(bytes(344) + b"n+1\0")
    other_store.files |= {"b/odd/first": b"no image", "b/odd/scan.nii.gz": volume, "b/odd/1.png": b"x"}
    expected = open_source("gs://b/odd")
    fails, cat_file = ["b/odd/first", "b/odd/scan.nii.gz"] * 2, Store.cat_file

    def sometimes(self, path, *args, **kwargs):
        if path in fails:
            fails.remove(path)
            raise ConnectionResetError("lost")
        return cat_file(self, path, *args, **kwargs)

    monkeypatch.setattr(Store, "cat_file", sometimes)
    monkeypatch.setenv(cache.VARIABLE, os.environ[cache.VARIABLE] + "-2")
    source = open_source("gs://b/odd")
    assert not fails and source.problems == expected.problems and source.summary == expected.summary
