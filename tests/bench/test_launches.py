"""bench/engine/launches.py counts what it says."""

import pytest
import torch


@pytest.fixture(scope="module")
def launches(bench):
    return bench("launches")


def test_operators_and_bytes_beside_products(launches):
    x, w = torch.randn(4, 8), torch.randn(8, 3)
    with launches.Count() as count:
        y = (x.view(2, 2, 8).flatten(0, 1) @ w).t()  # one product
        y.exp().sum()  # reads 12 and writes 12 floats; reads 12, writes 1
        torch.empty(5)
    assert dict(count.operators) == {"mm": 1, "exp": 1, "sum": 1}
    assert count.bytes == 4 * (12 + 12 + 12 + 1)
    assert launches.beside_products(count.operators) == 2


def test_every_block_adds_as_many_and_the_engine_moves_less(launches):
    found = {
        variant: launches.count("vit_tiny_patch16_224", 64, 4, variant) for variant in ("peft", "reference", "engine")
    }
    for half in ("forward", "backward"):
        assert 2 * found["engine"][half]["gigabytes"] < found["peft"][half]["gigabytes"]
        gigabytes, by_name = (found["engine"][half][key] for key in ("gigabytes", "by_name"))
        launched = sum(n for name, n in by_name.items() if "mm" not in name and "attention" not in name)
        assert found["engine"][half]["estimated_ms"] == pytest.approx(1e3 * gigabytes / 4300 + 2e-3 * launched)
        name = "attention_forward" if half == "forward" else "attention_backward"
        assert found["engine"][half]["by_name"][name] == 12  # as on a GPU, where the last block takes all tokens
        assert found["peft"][half]["by_name"]["gelu" if half == "forward" else "gelu_backward"] == 12
