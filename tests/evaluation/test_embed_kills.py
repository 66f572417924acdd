"""SIGKILL at random times while a folder of features grows: nothing is lost or doubled, and every bit is the same."""

import os
import random
import shutil
import signal
import time
import traceback

import pytest
import torch
from safetensors.numpy import load_file

from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.config.files import from_options
from upstep_fast.errors import DataError
from upstep_fast.evaluation.embeddings import run_embed
from upstep_fast.evaluation.feature_files.parquet import read_plans
from upstep_fast.evaluation.feature_files.table import read_features

pytest.importorskip("pyarrow")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def forked(act, seconds=None):
    """Run `act` in a process of its own and kill it after so many seconds. Return whether it was killed."""
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)  # the threads of the parent are not in the child
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if not path.name.startswith(".")}


def command(model, data, out, **options):
    how = dict(device="cpu", precision="fp32", num_workers=0, batch_size=2, shard_size=3, with_base=True)
    config = from_options(EmbedConfig, {"model": model, "data": data, "out": str(out), **how, **options}, "embed")
    return lambda: run_embed(config)


def grow_to(stage, photos, folder):
    """Put the first half of the pictures, one of them damaged, or all, into a folder."""
    folder.mkdir(exist_ok=True)
    for path in sorted(photos.iterdir())[: (12, 24)[stage]]:
        shutil.copy(path, folder / path.name)
    (folder / "05.png").write_bytes(b"no picture")


def killed_often(model, photos, root, kills, seed):
    """Grow folders of features under kills until there were so many; return how many left a folder half complete."""
    rng, count, rounds, halves = random.Random(seed), 0, 0, 0
    options = dict(max_bad_fraction=0.2)
    seconds = []
    for stage in range(2):
        grow_to(stage, photos, root / "data")
        began = time.monotonic()
        forked(command(model, root / "data", root / "whole", **options))
        seconds.append(time.monotonic() - began)
    shutil.rmtree(root / "data")
    whole = files_of(root / "whole")
    while count < kills:
        out = root / f"out{rounds}"
        for stage in range(2):
            grow_to(stage, photos, root / "data")
            while forked(command(model, root / "data", out, **options), rng.uniform(0, seconds[stage])):
                count += 1
                if out.exists() and any(plan.missing() for plan in read_plans(out)):
                    halves += 1
                    with pytest.raises(DataError, match=r"lacks .* shards"):
                        read_features(out)
                if count % 7 == 6 or count == kills:  # now and then to its end
                    break
            forked(command(model, root / "data", out, **options))
        shutil.rmtree(root / "data")
        assert files_of(out) == whole
        names = read_features(out).names
        assert len(names) == len(set(names)) == 23
        rounds += 1
    return halves


def test_three_kills_change_no_bit(model, photos, tmp_path, record_property):
    killed_often(model, photos, tmp_path, kills=3, seed=0)
    record_property("embed_kills", 3)


@pytest.mark.long
@pytest.mark.timeout(900)
def test_fifty_kills_change_no_bit(model, photos, tmp_path, record_property):
    assert killed_often(model, photos, tmp_path, kills=50, seed=1) > 10
    record_property("embed_kills", 50)


def test_a_kill_of_a_file_leaves_none(model, photos, tmp_path):
    """What a folder adds: one file is all or nothing."""
    act = command(model, photos, tmp_path / "f.safetensors", shard_size=None)
    forked(act, 0.01)
    assert not (tmp_path / "f.safetensors").exists()
    forked(act)
    assert load_file(tmp_path / "f.safetensors")["features"].shape == (24, 48)
