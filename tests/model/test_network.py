"""Weights that must be fetched where there is no network: one line, within seconds."""

import itertools
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from huggingface_hub import constants

from upstep_fast import network
from upstep_fast.data.sources.source import open_source
from upstep_fast.errors import ConfigError, DataError
from upstep_fast.model import backbone


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
    monkeypatch.setattr(network, "_checked", None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def hub(monkeypatch):
    """Return a function that makes the hub one that answers with these bytes; None: it does not answer."""
    servers = []

    def start(answer):
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def serve():
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                if answer is not None:
                    client.recv(4096)
                    client.sendall(answer)
                    client.close()
                else:
                    servers.append(client)

        threading.Thread(target=serve, daemon=True).start()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")

    yield start
    for server in servers:
        server.close()


@pytest.mark.parametrize("name", ["hf-hub:nobody/nothing", "vit_tiny_patch16_224"])
def test_no_network_is_one_line_within_seconds(name, monkeypatch, capfd):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    began = time.monotonic()
    with pytest.raises(ConfigError) as error:
        backbone.load(name)
    assert time.monotonic() - began < 5
    line = str(error.value)
    assert line.startswith(f"model: cannot load {name}: no connection to http://127.0.0.1:9 (")
    assert line.endswith("or use local-dir:PATH with weights on disk") and "\n" not in line
    assert "Retrying" not in capfd.readouterr().err
    assert constants.HF_HUB_OFFLINE is False  # the next try may find a network


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "no answer within"),
        (b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n", "it answers 503"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", None),
        (b"HTTP/1.1 401 No\r\nContent-Length: 0\r\n\r\n", None),
    ],
)
def test_a_hub_that_answers_or_not(hub, monkeypatch, answer, reason):
    monkeypatch.setattr(network, "SECONDS", 1.0)
    hub(answer)
    began = time.monotonic()
    found = network.unreachable()
    assert time.monotonic() - began < 3
    assert found is None if reason is None else found.startswith(reason) or "timed out" in found


def test_another_error_is_not_taken_for_the_network(monkeypatch):
    monkeypatch.setattr(network, "unreachable", lambda: "down")
    with pytest.raises(ValueError, match="of another kind"), network.limited():
        raise ValueError("of another kind")


def test_nobody_is_asked_offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(network, "unreachable", lambda: pytest.fail("asked"))
    with network.limited():
        pass
    assert constants.HF_HUB_OFFLINE is True


def test_a_data_set_without_a_network_is_one_line_within_seconds(monkeypatch, tmp_path, capfd):
    datasets = pytest.importorskip("datasets")
    for owner, name in ((constants, "ENDPOINT"), (datasets.config, "HF_ENDPOINT")):
        monkeypatch.setattr(owner, name, "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "data sets")
    began = time.monotonic()
    with pytest.raises(DataError) as error:
        open_source("hf:nobody/nothing")
    assert time.monotonic() - began < 5
    line = str(error.value)
    assert line.startswith("data: cannot load hf:nobody/nothing: no connection to http://127.0.0.1:9 (")
    assert "\n" not in line and "HF_HOME" in line
    assert "Retrying" not in capfd.readouterr().err
    assert constants.HF_HUB_OFFLINE is datasets.config.HF_HUB_OFFLINE is False


@pytest.mark.long
@pytest.mark.parametrize("flags", [["--data", "hf:nobody/nothing"], ["--model", "hf-hub:nobody/nothing"]])
def test_a_command_without_a_network(tmp_path, photos, flags):
    args = {"--model": "demo", "--data": str(photos), "--out": "out"} | {flags[0]: flags[1]}
    command = [sys.executable, "-m", "upstep_fast", "adapt", *itertools.chain(*args.items())]
    env = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "home")}
    began = time.monotonic()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", "import upstep_fast.train.adapt, datasets"], env=env, check=True)
    assert started - began < 5 + (time.monotonic() - started)  # beyond the imports
    assert done.returncode in (2, 3) and "no connection to" in done.stderr.splitlines()[-1], done.stderr
