"""Small ViTs with random weights, for the tests of what is read and written."""

from pathlib import Path

import timm
import torch

import upstep_fast

SMALL = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5)
BASE_TINY = Path(upstep_fast.__file__).parent / "assets" / "base_tiny"


def images(size, count=3, channels=3):
    return torch.randn(count, channels, *size, generator=torch.Generator().manual_seed(2))


def randomized(vit, seed=0):
    """Random values everywhere, so that no zero or one hides a tensor that was not loaded."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return vit.eval()


def saved(vit, folder, args):
    timm.models.save_for_hf(vit, folder, model_args=args, safe_serialization=True)
    return f"local-dir:{folder}"


def small(seed=0, **args):
    return randomized(timm.create_model("vit_tiny_patch16_224", **SMALL | args), seed)


def assert_same(vit, other):
    theirs = other.state_dict()
    assert vit.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in vit.state_dict().items())
