"""The callable in two actors of a local Ray cluster, of which one is killed: every image exactly once."""

import os
import signal

import numpy as np
import pytest
from photos import save_photos

import upstep_fast
from upstep_fast.evaluation.feature_files.table import read_features
from upstep_fast.integrations.ray import Embedder

IMAGES = 24


@pytest.fixture(scope="module")
def ray():
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DATA_DISABLE_PROGRESS_BARS": "1"}
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    try:
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100 << 20,
            _node_ip_address="127.0.0.1",
        )
    except Exception as error:
        pytest.skip(f"Ray does not start here: {error}")
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield ray
    ray.shutdown()


def test_two_actors_of_which_one_is_killed(ray, tmp_path):
    paths = sorted(str(path) for path in save_photos(tmp_path, IMAGES).iterdir())
    killed = str(tmp_path / "killed")

    class Mortal(Embedder):  # local, so that Ray sends the class itself
        def __call__(self, batch):
            if paths[5] in batch["path"] and not os.path.exists(killed):
                open(killed, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    options = dict(device="cpu", precision="fp32", num_workers=1)
    images = ray.data.from_items([{"path": path, "id": i} for i, path in enumerate(paths)], override_num_blocks=6)
    features = images.map_batches(
        Mortal, fn_constructor_args=("demo",), fn_constructor_kwargs=options, concurrency=2, batch_size=3, num_cpus=1
    )
    out = tmp_path / "features"
    features.write_parquet(str(out))
    assert os.path.exists(killed)
    table = read_features(out)
    m = upstep_fast.load("demo", device="cpu", precision="fp32")
    assert list(table.names) == paths
    assert np.abs(table.x - m.embed(paths)).max() < 1e-6  # other sizes of batches round otherwise
    assert table.facts["model"] == "demo" and table.facts["form"] == "base, plain"
