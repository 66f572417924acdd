"""MAE's patches, masks and loss against loops in float64 and MAE's own code."""

import numpy as np
import pytest
import torch

from upstep_fast.methods.explora.mae_decoder import sincos_positions
from upstep_fast.methods.losses import mae


def images(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_patches_are_ordered_as_mae_orders_them():
    x = images(2, 3, 8, 12)
    # models_mae.py: nchpwq -> nhwpqc
    theirs = torch.einsum("nchpwq->nhwpqc", x.reshape(2, 3, 2, 4, 3, 4)).reshape(2, 6, 48)
    assert torch.equal(mae.patchify(x, (4, 4)), theirs)
    assert torch.equal(mae.patchify(x, (4, 4))[0, 4].view(4, 4, 3)[1, 2], x[0, :, 5, 6])


def test_the_loss_by_hand():
    x, prediction = images(2, 3, 8, 8), images(2, 4, 48)
    hidden = torch.tensor([[True, False, True, True], [False, False, True, False]])
    pixels = x.double().numpy()
    total = []
    for b, n in np.argwhere(hidden.numpy()):
        row, column = 4 * (n // 2), 4 * (n % 2)
        patch = pixels[b, :, row : row + 4, column : column + 4].transpose(1, 2, 0).ravel()
        target = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
        total.append(((prediction[b, n].double().numpy() - target) ** 2).mean())
    found = mae.pixel_loss(prediction, mae.pixel_targets(x, (4, 4)), hidden)
    assert len(total) == 4 and found.item() == pytest.approx(np.mean(total), rel=1e-6)


def test_targets_without_normalization_are_the_pixels():
    x = images(1, 1, 4, 4)
    assert torch.equal(mae.pixel_targets(x, (2, 2), normalize=False), mae.patchify(x, (2, 2)))


@pytest.mark.parametrize(("patches", "hidden", "shown"), [(196, 0.75, 49), (64, 0.75, 16), (4, 0.9, 1), (4, 0.99, 1)])
def test_patches_with_the_smallest_noise_are_visible(patches, hidden, shown):
    noise = torch.rand(3, patches, generator=torch.Generator().manual_seed(1))
    keep, mask = mae.split(noise, hidden)
    assert keep.shape == (3, shown) and mask.sum(1).tolist() == [patches - shown] * 3
    for row in range(3):
        assert not mask[row, keep[row]].any()
        assert noise[row, keep[row]].max() <= noise[row, mask[row]].min()


def test_decoder_positions_encode_rows_and_columns():
    table = sincos_positions((3, 5), 16, 1)[0]
    assert table.shape == (16, 16) and not table[0].any()
    patches = table[1:].view(3, 5, 16)
    assert torch.allclose(patches[2, :, :8], patches[2, :1, :8].expand(5, 8))  # of the row alone
    assert torch.allclose(patches[:, 4, 8:], patches[:1, 4, 8:].expand(3, 8))
    assert patches[2, 0, 0].item() == pytest.approx(np.sin(2.0)) and patches[0, 3, 12].item() == pytest.approx(
        np.cos(3)
    )
    assert len({tuple(row.tolist()) for row in table}) == 16


def test_decoder_positions_are_maes_with_the_halves_exchanged():
    # MAE's get_2d_sincos_pos_embed: the half of the columns first ("here w goes first")
    def of_places(places, width):
        angles = np.einsum("m,d->md", places.reshape(-1), 1 / 10000 ** (np.arange(width // 2) / (width / 2)))
        return np.concatenate([np.sin(angles), np.cos(angles)], 1)

    columns, rows = np.meshgrid(np.arange(5.0), np.arange(3.0))
    official = np.concatenate([of_places(columns, 8), of_places(rows, 8)], 1)
    ours = sincos_positions((3, 5), 16, 1)[0, 1:]
    assert np.allclose(ours.roll(8, 1).numpy(), official, atol=1e-6)
