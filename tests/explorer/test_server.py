"""The explorer's routes: right numbers against float64 references, and what an attacker would try."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import upstep_fast
from upstep_fast.config.explore import ExploreConfig
from upstep_fast.data.sources.source import open_source
from upstep_fast.explorer.gallery import gallery_of_model
from upstep_fast.explorer.guard import new_token
from upstep_fast.explorer.lists import Lists
from upstep_fast.explorer.server import MAX_UPLOAD, NEIGHBORS, make_app

pytest.importorskip("starlette")
from starlette.testclient import TestClient

PORT, COUNT = 8123, 30
HOST = f"127.0.0.1:{PORT}"
NASTY = "<img src=x onerror=alert(1)>\"'&.png"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    import torch
    from photos import blurred_noise

    root, generator = tmp_path_factory.mktemp("explorer") / "photos", torch.Generator().manual_seed(0)
    for i in range(COUNT):
        to = root / ("cats", "dogs", "<b>odd & 'quoted'")[i % 3]
        to.mkdir(parents=True, exist_ok=True)
        blurred_noise(generator, 40).save(to / (NASTY if i == 2 else f"{i:02}.png"))
    return root


@pytest.fixture(scope="module")
def model():
    return upstep_fast.load("demo", device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def gallery(folder, model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("upstep_fast.explorer.maps.MIN_ROWS", COUNT + 1)  # no process
        table = folder.parent / "table.csv"
        rows = [f"cats/{i:02}.png,{i / 7},{'a' if i < 15 else 'b'}" for i in range(0, COUNT, 3)]
        table.write_text("file,weight,batch\n" + "\n".join(rows) + "\n")
        return gallery_of_model(model, [str(folder)], ExploreConfig("", columns=str(table), clusters=3))


@pytest.fixture(scope="module")
def token():
    return new_token()


@pytest.fixture(scope="module")
def client(gallery, token):
    return TestClient(make_app(gallery, token, PORT), base_url=f"http://{HOST}/{token}/", headers={"host": HOST})


def numbers(answer, kind):
    assert answer.status_code == 200
    return np.frombuffer(answer.content, kind)


def test_the_page_and_its_files(client):
    page = client.get("")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    assert "unsafe" not in page.headers["content-security-policy"]
    assert "http" not in page.text.replace("http-equiv", "")  # nothing from elsewhere
    for name in ("app.js", "scatter.js", "style.css", "icon.svg"):
        answer = client.get(f"static/{name}")
        assert answer.status_code == 200 and answer.headers["x-content-type-options"] == "nosniff"


def test_facts_and_columns(client, gallery, folder):
    facts = client.get("api/facts").json()
    assert facts["count"] == COUNT and facts["sides"] == ["base", "adapted"]
    assert facts["hasFiles"]
    names = [column["name"] for column in facts["columns"]]
    assert names[:3] == ["label", "folder", "cluster"] and names[3:] == ["weight", "batch"]
    label = facts["columns"][0]
    codes = numbers(client.get("api/column/0"), "<u2")
    assert [label["categories"][code] for code in codes] == open_source(folder).labels
    weight = numbers(client.get("api/column/3"), "<f4")
    expected = [int(Path(n).stem) / 7 if "/cats/" in n else np.nan for n in gallery.names]
    np.testing.assert_allclose(weight, expected, rtol=1e-6)
    batch = facts["columns"][4]["categories"]
    assert batch == ["a", "b", "(none)"]


def test_neighbors_are_those_of_a_float64_product(client, gallery):
    for side, x in gallery.x.items():
        x = x.astype(np.float64)
        for i in (0, 7, COUNT - 1):
            scores = x @ x[i]
            scores[i] = -np.inf
            order = np.argsort(-scores, kind="stable")[:NEIGHBORS]
            found = client.get(f"api/neighbors/{i}").json()[side]
            assert [j for j, _ in found] == order.tolist()
            np.testing.assert_allclose([s for _, s in found], scores[order], atol=1e-4)


def test_pca_is_that_of_a_singular_value_decomposition(client, gallery):
    y = numbers(client.get("api/map/pca/base"), "<f4").reshape(-1, 2)
    x = gallery.x["base"].astype(np.float64)
    u, s, _ = np.linalg.svd(x - x.mean(0), full_matrices=False)
    for k in range(2):
        assert abs(np.corrcoef(y[:, k], (u * s)[:, k])[0, 1]) > 0.9999
    assert client.get("api/map/umap/base").status_code == 404


def test_search_finds_the_image_itself(client, gallery, folder):
    path = folder / "cats" / "06.png"
    found = client.post("api/search", content=path.read_bytes()).json()
    i = next(k for k, name in enumerate(gallery.names) if name.endswith("cats/06.png"))
    for side in gallery.x:
        assert found[side][0][0] == i and found[side][0][1] > 0.9999


def test_thumbnails_are_the_images(client, gallery, folder):
    i = next(k for k, name in enumerate(gallery.names) if name.endswith("dogs/07.png"))
    answer = client.get(f"api/image/{i}")
    assert answer.headers["content-type"] == "image/webp"
    got = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGB"), np.float64)
    expected = np.asarray(Image.open(folder / "dogs" / "07.png").convert("RGB"), np.float64)
    assert got.shape == expected.shape and np.abs(got - expected).mean() < 6


def test_an_exported_selection_is_read_as_data(client, gallery, tmp_path):
    chosen = np.array([1, 5, 12, 21], "<u4")
    answer = client.post("api/export", content=chosen.tobytes())
    file = tmp_path / "selection.csv"
    file.write_bytes(answer.content)
    source = open_source(file)
    assert [source.name(i) for i in range(len(source))] == [gallery.names[i] for i in chosen]
    rows = list(csv.DictReader(io.StringIO(answer.text)))
    assert [row["label"] for row in rows] == [open_source(file).labels[i] for i in range(4)]


def test_names_come_as_json_and_find_searches_them(client, gallery):
    answer = client.post("api/names", content=np.array([2, 0], "<u4").tobytes())
    assert answer.headers["content-type"] == "application/json"
    assert answer.json() == [gallery.names[2], gallery.names[0]]
    found = client.get("api/find", params={"text": "onerror"}).json()
    assert found["count"] == 1 and gallery.names[found["indices"][0]].endswith(NASTY)


@pytest.mark.parametrize("has_labels", [True, False])
def test_the_lists_say_whether_there_are_labels(gallery, folder, has_labels):
    source = open_source(folder if has_labels else folder / "cats")
    names, count = tuple(source.name(i) for i in range(len(source))), len(source)
    lists = Lists(source, names, gallery.x["adapted"][:count], np.arange(count), 3, state="computing")
    lists._compute()
    assert lists.get()["state"] == "" and lists.get()["hasLabels"] is has_labels


# ---- an attacker


@pytest.mark.parametrize(
    "host", ["evil.example", f"evil.example:{PORT}", "127.0.0.1:1", "127.0.0.1", "", f"{HOST}.evil"]
)
def test_another_host_name_is_refused(client, host):
    assert client.get("", headers={"host": host}).status_code == 421


@pytest.mark.parametrize("path", ["", "/", "/api/facts", "/static/app.js", f"/{'A' * 22}/", "/%2e%2e/"])
def test_without_the_token_nothing_is_served(client, path):
    answer = client.get(f"http://{HOST}{path or '/'}")
    assert answer.status_code == 404 and answer.text == "refused"


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
    ],
)
def test_another_sites_requests_are_refused(client, headers):
    assert client.get("api/facts", headers=headers).status_code == 403
    assert client.get("api/image/0", headers=headers).status_code == 403
    assert client.post("api/search", content=b"x", headers=headers).status_code == 403
    own = {"sec-fetch-site": "same-origin", "origin": f"http://{HOST}"}
    assert client.get("api/facts", headers=own).status_code == 200


def test_no_answer_allows_another_origin(client):
    for path in ("", "api/facts", "api/image/0", "static/app.js"):
        headers = client.get(path, headers={"origin": f"http://{HOST}"}).headers
        assert not any(name.startswith("access-control") for name in headers)
        assert headers["cross-origin-resource-policy"] == "same-origin" and headers["referrer-policy"] == "no-referrer"
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert client.options("api/facts").status_code == 405


@pytest.mark.parametrize(
    "path",
    [
        "static/../server.py",
        "static/..%2fserver.py",
        "static/%2e%2e%2f%2e%2e%2fversion.py",
        "static//etc/passwd",
        "static/app.js%00",
        "api/image/../facts/x",
        "api/image/-1",
        f"api/image/{COUNT}",
        "api/image/1e0",
        "api/image/\u0661",
        "api/image/" + "9" * 250,
        "api/image//etc/passwd",
        "api/large/..%2f..%2fetc%2fpasswd",
        "api/map/pca/..",
        "api/column/99",
        "api/neighbors/nan",
        "x" * 5000,
    ],
)
def test_no_path_leads_outside(client, path):
    answer = client.get(path)
    assert answer.status_code == 404, answer.text[:100]
    assert not answer.headers["content-type"].startswith("text/html")


def test_bodies_are_bounded_and_checked(client):
    assert client.post("api/names", content=b"abc").status_code == 400
    assert client.post("api/names", content=np.array([COUNT], "<u4").tobytes()).status_code == 400
    assert client.post("api/names", content=bytes(4 * 2001)).status_code == 413
    assert client.post("api/export", content=bytes(4 * (COUNT + 1))).status_code == 413
    # more than the limit is not read to its end
    sent = 0

    def pieces():
        nonlocal sent
        while sent <= MAX_UPLOAD + (8 << 20):
            sent += 1 << 20
            yield bytes(1 << 20)

    assert client.post("api/search", content=pieces()).status_code == 413


def test_a_body_that_says_it_is_too_long_is_not_waited_for(client):
    def never():
        raise AssertionError("the body was read")
        yield b""

    for route, most in (("search", MAX_UPLOAD), ("names", 8000), ("export", 4 * COUNT)):
        answer = client.post(f"api/{route}", content=never(), headers={"content-length": str(most + 1)})
        assert answer.status_code == 413
    assert client.get("api/facts").json()["maxUpload"] == MAX_UPLOAD


@pytest.mark.parametrize("route", ["search", "names", "export"])
def test_an_upload_that_ends_early_is_no_failure_of_the_server(gallery, token, route):
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": f"/{token}/api/{route}", "query_string": b"", "root_path": ""}
    headers = [(b"host", HOST.encode()), (b"content-length", b"8")]
    asyncio.run(make_app(gallery, token, PORT)(scope | {"headers": headers}, receive, send))  # raises nothing
    assert sent[0]["status"] == 400


def test_names_that_are_no_files_are_cells_of_text(gallery):
    names = ("=1+1|x.tar/a.png", "a\nb.png", "\ud800.png")
    moved = replace(gallery, names=names, rows=np.full(3, -1))
    assert [moved.path(i) for i in range(3)] == ["'=1+1|x.tar/a.png", "a\nb.png", "\\ud800.png"]


@pytest.mark.parametrize(
    "data", [b"", b"<svg onload=alert(1)>", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"GIF89a" + b"\xff" * 99]
)
def test_what_is_no_image_is_refused_in_one_line(client, data):
    answer = client.post("api/search", content=data)
    assert answer.status_code == 422 and answer.headers["content-type"] == "application/json"
    assert "\n" not in json.loads(answer.text)["error"]


def test_no_markup_comes_back(client):
    for path in (f"api/map/{NASTY}/x", f"static/{NASTY}", f"{NASTY}"):
        assert "onerror" not in client.get(path).text


def test_a_websocket_is_closed(client):
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), client.websocket_connect("api/facts"):
        pass


def test_tokens_are_long_and_new():
    tokens = {new_token() for _ in range(100)}
    assert len(tokens) == 100 and min(map(len, tokens)) >= 22
