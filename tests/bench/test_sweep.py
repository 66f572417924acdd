"""bench/engine/sweep.py: its FLOPs, its table and its place on the page."""

from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

# torch 2.14 counts no attention on a CPU; the formulas are torch's own
ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda grad, q, k, v, *_, **__: (
        sdpa_backward_flop_count(grad, q, k, v)
    ),
}


@pytest.fixture(scope="module")
def sweep(bench):
    return bench("sweep")


def test_flops_are_those_torch_counts(sweep):
    vit = timm.create_model("vit_tiny_patch16_224", depth=3, num_classes=0).requires_grad_(False).eval()
    tokens = torch.randn(2, 197, 192, requires_grad=True)  # as after the patch embedding, which is not counted
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as forward:
        out = vit.blocks(tokens)
    with FlopCounterMode(display=False, custom_mapping=ON_CPU) as backward:
        out.sum().backward()
    ours = sweep.flops(vit, 2)
    assert ours["forward"] == forward.get_total_flops()
    assert ours["backward"] == forward.get_total_flops() + backward.get_total_flops()


def test_every_point_changes_one_thing_and_fits(sweep):
    for kind in ("cpu", "cuda"):
        for what, value, options in sweep.points(kind):
            differs = {name for name in options if options[name] != sweep.BASE[kind][name]}
            allowed = {"model": {"model", "batch_size"}, "side": {"img_size", "batch_size"}, "skipped": set()}
            assert differs <= allowed.get(what, {sweep.FIELD.get(what)})
            assert options["batch_size"] % 2 == 0 or what != "skipped", value


def test_a_page(sweep, tmp_path):
    rows = [
        {
            "changes": what,
            "value": value,
            "kind": kind,
            "name": name,
            "median_ms": ms,
            "low_ms": ms - 1,
            "high_ms": ms + 1,
        }
        for what, value in (("batch", 8), ("side", 224), ("rank", 4), ("skipped", 0.5))
        for kind in (("step",) if what == "skipped" else ("backward", "forward"))
        for name, ms in (("reference", 30.0), ("engine", 20.0))
    ]
    result = {"device": {"processor": "P", "threads": 1, "torch": "T"}, "precision": "bf16", "base": {"lora_r": 16}}
    (tmp_path / "page.md").write_text(f"before\n{sweep.BEGIN}\nold\n{sweep.END}\nafter\n")
    sweep.write_page(tmp_path / "page.md", result | {"ceiling": 2e11, "rows": rows}, Path("FILE.json"))
    text = (tmp_path / "page.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| skipped | 50 % | whole step |  | 30 (29..31) | 20 (19..21) |  | 1.50x |  |" in text
    assert (tmp_path / "images" / "sweep.svg").stat().st_size > 1000
