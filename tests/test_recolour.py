"""recolour: its reference against torchvision, the Triton kernel against the reference in fp64."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_matches, guarded_outputs, surrounded
from torchvision.transforms.v2 import functional as tv

from upstep_fast.kernels import patchify
from upstep_fast.kernels._dispatch import forced
from upstep_fast.kernels.recolour import FACTORS, recolour, recolour_reference

# brightness, contrast, saturation, hue, grey, solarize
STILL = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
ROWS = torch.tensor(
    [
        STILL,
        [1.3, 1.0, 1.0, 0.0, 0.0, 0.0],
        [1.0, 0.6, 1.0, 0.0, 0.0, 0.0],
        [1.0, 1.0, 1.4, 0.0, 0.0, 0.0],
        [1.0, 1.0, 1.0, -0.2, 0.0, 0.0],
        [1.0, 1.0, 1.0, 0.0, 1.0, 0.0],
        [1.0, 1.0, 1.0, 0.0, 0.0, 1.0],
        [0.7, 1.3, 0.6, 0.5, 0.0, 1.0],
        [1.4, 0.7, 1.2, 0.1, 1.0, 1.0],
    ]
)


def problem(channels: int, height: int, width: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(channels)
    x = torch.rand(len(ROWS), channels, height, width, generator=generator)
    x[:, :, 0, : width // 2] = torch.tensor([0.0, 1.0]).repeat(len(ROWS), channels, width)[..., : width // 2]
    x[:, :, 1] = 0.3  # grey pixels
    return x, ROWS, torch.rand(channels, generator=generator), 0.2 + torch.rand(channels, generator=generator)


def test_the_reference_is_torchvisions():
    x, factors, mean, std = problem(3, 20, 30)
    got = recolour_reference(x, factors, mean, std, 0, torch.float32)
    for n, (b, c, s, h, grey, solarize) in enumerate(factors.tolist()):
        want = tv.adjust_contrast(tv.adjust_brightness(x[n], b), c)
        want = tv.adjust_hue(tv.adjust_saturation(want, s), h)
        want = tv.rgb_to_grayscale(want, 3) if grey else want
        want = tv.solarize(want, 128 / 255) if solarize else want
        want = tv.normalize(want, mean.tolist(), std.tolist())
        assert (got[n] - want).abs().max() < 5e-5, n


def test_patches_are_patchifys_and_a_still_row_changes_nothing():
    x, _, mean, std = problem(5, 24, 16)
    factors = torch.tensor([STILL]).repeat(len(x), 1)
    plain = recolour(x, factors, mean, std)
    assert torch.equal(plain, (x - mean[:, None, None]) / std[:, None, None])
    patches = recolour(x, factors, mean.tolist(), std.tolist(), patch=8, dtype=torch.bfloat16)
    assert torch.equal(patches, patchify(plain, 8, torch.bfloat16)) and patches.shape == (len(x), 6, 5 * 64)


def _check(channels, size, patch, dtype, device):
    inputs = problem(channels, *size)
    oracle = recolour_reference(*(t.double() for t in inputs), patch, torch.float64)
    eager = recolour_reference(*inputs, patch, torch.float32).to(dtype)
    with guarded_outputs(), forced("triton"):
        x, factors, mean, std = (surrounded(t.to(device)) for t in inputs)
        got = recolour(x, factors, mean, std, patch=patch, dtype=dtype).cpu()
    assert got.dtype == dtype
    assert_matches(got, oracle, eager)


CASES = [
    (3, (16, 24), 0, torch.float32),
    (3, (16, 24), 8, torch.float32),
    (3, (16, 24), 4, torch.bfloat16),
    (3, (33, 47), 0, torch.float32),
    (1, (16, 16), 16, torch.bfloat16),
    (5, (12, 18), 6, torch.float32),
]


@pytest.mark.interp
@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_kernel_in_the_interpreter(case):
    _check(*case, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*CASES, (3, (224, 224), 16, torch.bfloat16)], ids=str)
def test_the_kernel_on_the_gpu(case):
    _check(*case, "cuda")


def test_the_op_checks_out_and_names_wrong_arguments():
    x, factors, mean, std = problem(3, 8, 8)
    torch.library.opcheck(torch.ops.upstep_fast_kernels.recolour.default, (x, factors, mean, std, 4, torch.bfloat16))
    assert factors.shape[1] == FACTORS
    for arguments, options, words in (
        ((x.half(), factors, mean, std), {}, "x must be fp32"),
        ((x, factors[:, :5], mean, std), {}, "factors"),
        ((x, factors, mean[:2], std), {}, "3 values, got 2 and 3"),
        ((x, factors, mean, std), {"patch": 3}, "patch must divide 8 x 8"),
    ):
        with pytest.raises(ValueError, match=words):
            recolour(*arguments, **options)
    assert recolour(x[:0], factors[:0], mean, std, patch=4).shape == (0, 4, 48)
