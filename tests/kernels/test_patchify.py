"""patchify: equal to the strided convolution of timm's PatchEmbed, and a pure rearrangement."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import guarded_outputs, surrounded
from timm.layers import PatchEmbed
from torch import Tensor

from upstep_fast.kernels import _dispatch
from upstep_fast.kernels.patchify import (
    _patchify_op,
    _unpatchify_op,
    patchify,
    patchify_reference,
    unpatchify_reference,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def numbered(B: int, C: int, H: int, W: int, device="cpu") -> Tensor:
    """Every cell its own number, exact in fp16."""
    return (torch.arange(B * C * H * W, device=device) % 2048).reshape(B, C, H, W).float()


def check(images: Tensor, patch: int, dtype: torch.dtype) -> None:
    """Bit for bit the reference, and its gradient the inverse."""
    with guarded_outputs():
        leaf = surrounded(images)
        leaf = leaf.requires_grad_() if leaf.is_floating_point() else leaf
        patches = patchify(leaf, patch, dtype)
        g = (torch.arange(patches.numel(), device=images.device) % 251).reshape(patches.shape).to(dtype)
        grad = torch.autograd.grad(patches, leaf, surrounded(g))[0] if leaf.requires_grad else None
    assert patches.dtype == dtype and torch.equal(patches, patchify_reference(images, patch, dtype))
    if grad is not None:
        assert torch.equal(grad, unpatchify_reference(g, patch, *images.shape[2:], images.dtype))


@pytest.mark.parametrize("side", [(28, 28), (14, 42)])
def test_equals_timms_patch_embed(side):
    embed = PatchEmbed(img_size=side, patch_size=14, in_chans=3, embed_dim=20).double()
    images = torch.randn(2, 3, *side, dtype=torch.float64)
    tokens = patchify(images, 14) @ embed.proj.weight.flatten(1).T + embed.proj.bias
    torch.testing.assert_close(tokens, embed(images), rtol=1e-12, atol=1e-12)


def test_order_of_one_patch():
    images = numbered(1, 2, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (1, 6, 8)
    # patch 4 lies at row 1, column 1
    assert patches[0, 4].tolist() == images[0, :, 2:4, 2:4].flatten().tolist()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", FLOATS)
def test_matches_the_reference(dtype, memory_format):
    check(numbered(2, 3, 8, 12).contiguous(memory_format=memory_format), 4, dtype)


def test_uint8_and_default_dtypes():
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    assert patchify(images, 4).dtype == torch.float32
    assert torch.equal(patchify(images, 4, torch.bfloat16).float(), patchify(images.float(), 4))
    assert patchify(images.half(), 4).dtype == torch.float16
    with torch.autocast("cpu", torch.bfloat16):
        assert patchify(images.float(), 4).dtype == torch.bfloat16
        assert patchify(images.float(), 4, torch.float32).dtype == torch.float32


def test_the_inverse_undoes_it():
    images = numbered(2, 3, 8, 12)
    assert torch.equal(unpatchify_reference(patchify(images, 4), 4, 8, 12, torch.float32), images)


def test_gradient():
    images = torch.randn(2, 2, 4, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: patchify(x, 2), images)
    with torch.no_grad():
        assert not patchify(images, 2).requires_grad


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (2, 0, 8, 8), (2, 3, 0, 8)])
def test_zero_size(shape):
    images = torch.zeros(shape, requires_grad=True)
    patches = patchify(images, 4)
    assert patches.shape == (shape[0], shape[2] * shape[3] // 16, shape[1] * 16)
    patches.sum().backward()
    assert images.grad.shape == shape


@pytest.mark.parametrize("images", [numbered(2, 3, 4, 6), numbered(0, 3, 4, 6), numbered(2, 3, 6, 4).mT])
def test_opcheck(images):
    torch.library.opcheck(_patchify_op, (images.detach().requires_grad_(), 2, torch.float16))
    patches = patchify(images, 2)
    torch.library.opcheck(_unpatchify_op, (patches, 2, 4, 6, torch.float32))


def test_compiles_as_one_graph():
    f = torch.compile(lambda x: patchify(x + 1, 2) * 2, backend="aot_eager", fullgraph=True)
    images = numbered(2, 3, 4, 6).requires_grad_()
    y = f(images)
    y.sum().backward()
    assert torch.equal(y, patchify(images + 1, 2) * 2) and (images.grad == 2).all()


@pytest.mark.parametrize(
    ("images", "patch", "dtype", "message"),
    [
        (torch.zeros(3, 4, 4), 2, None, r"images must be \[B, C, H, W\] .* got \[3, 4, 4\]"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int32), 2, None, "images must be .* got .* torch.int32"),
        (torch.zeros(1, 3, 4, 5), 2, None, r"patch must divide height and width \[4, 5\], got 2"),
        (torch.zeros(1, 3, 4, 4), 0, None, "patch must divide .* got 0"),
        (torch.zeros(1, 3, 4, 4), 2, torch.uint8, "dtype must be .* got torch.uint8"),
    ],
)
def test_bad_input(images, patch, dtype, message):
    with pytest.raises(ValueError, match=f"patchify: {message}"):
        patchify(images, patch, dtype)


def test_a_patch_too_large_for_triton_says_so():
    patchify(torch.zeros(1, 1, 65, 65), 65)
    row = next(row for row in _dispatch.report() if row.op == "patchify")
    assert row.implementation == "reference" and "65 x 65 exceeds" in row.reason


@pytest.mark.interp
@pytest.mark.usefixtures("triton")
class TestInterpreted:
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("dtype", (*FLOATS, torch.uint8))
    def test_matches_the_reference(self, dtype, memory_format):
        images = (numbered(2, 3, 14, 28) % 256).to(dtype).contiguous(memory_format=memory_format)
        check(images, 7, torch.float16)

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9))
    def test_any_shape(self, B, C, GH, GW, P):
        check(numbered(B, C, GH * P, GW * P), P, torch.float32)


@pytest.mark.gpu
@pytest.mark.usefixtures("triton")
class TestGpu:
    @pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
    @pytest.mark.parametrize("patch", [1, 7, 8, 14, 16, 28, 56])
    @pytest.mark.parametrize("dtype", (*FLOATS, torch.uint8))
    def test_matches_the_reference(self, dtype, patch, memory_format):
        images = (numbered(3, 3, 112, 224, "cuda") % 256).to(dtype).contiguous(memory_format=memory_format)
        check(images, patch, torch.bfloat16)

    def test_graph_capture(self):
        images = torch.randn(4, 3, 224, 224, device="cuda")
        wanted = patchify(images, 14, torch.bfloat16)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = patchify(images, 14, torch.bfloat16)
        graph.replay()
        assert torch.equal(got, wanted)

    @pytest.mark.long
    def test_more_than_2_to_the_31_cells(self):
        images = torch.zeros(2**31 // (3 * 224 * 224) + 8, 3, 224, 224, dtype=torch.uint8, device="cuda")
        images[-2:] = torch.randint(256, (2, 3, 224, 224), device="cuda")
        assert torch.equal(patchify(images, 16, torch.bfloat16)[-2:], patchify(images[-2:], 16, torch.bfloat16))
