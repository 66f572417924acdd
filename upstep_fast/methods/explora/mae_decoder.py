"""MAE's decoder (He et al. 2022): fresh, or from a pretrained checkpoint."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from upstep_fast.config.explora import MaeConfig
from upstep_fast.config.flat import replace_flat
from upstep_fast.errors import ConfigError
from upstep_fast.model.formats import checkpoint_files


class Decoder(nn.Module):
    """MAE's decoder: [B, P + n, D] tokens of the encoder -> pixels of every patch [B, N, p q C]."""

    def __init__(self, width: int, grid: tuple[int, int], prefix: int, pixels: int, config: MaeConfig):
        super().__init__()
        size, heads, self.prefix = config.mae.decoder_width, config.mae.decoder_heads, prefix
        self.embed = nn.Linear(width, size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size))
        nn.init.normal_(self.mask_token, std=0.02)
        self.pos_embed = nn.Parameter(sincos_positions(grid, size, prefix), requires_grad=False)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(
            *(Block(size, heads, qkv_bias=True, norm_layer=norm) for _ in range(config.mae.decoder_depth))
        )
        self.norm = norm(size)
        self.pred = nn.Linear(size, pixels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Return the pixels of every patch. visible: [B, n], indices of the encoder's patches."""
        x = self.embed(tokens)
        num_patches = self.pos_embed.shape[1] - self.prefix
        patches = self.mask_token.to(x.dtype).expand(len(x), num_patches, -1)
        patches = patches.scatter(1, visible[..., None].expand(-1, -1, x.shape[-1]), x[:, self.prefix :])
        x = torch.cat([x[:, : self.prefix], patches], 1) + self.pos_embed
        return self.pred(self.norm(self.blocks(x)))[:, self.prefix :]


def sincos_positions(grid: tuple[int, int], width: int, prefix: int) -> Tensor:
    """Return fixed position embeddings, [1, prefix + N, width]: sines and cosines of row and column; prefix 0.

    MAE's code has the column's half first; a decoder that is read from its checkpoint brings its own table.
    """
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    parts = [f(place.flatten()[:, None] * omega) for place in (rows, columns) for f in (torch.sin, torch.cos)]
    return F.pad(torch.cat(parts, 1), (0, 0, prefix, 0))[None].float()


def load_decoder(decoder: Decoder, path: str) -> None:
    """Fill the decoder from a checkpoint of MAE. Raises ConfigError if it does not fit."""
    saved, expected = _decoder_state(path), decoder.state_dict()
    for name, tensor in expected.items():
        if name not in saved or saved[name].shape != tensor.shape:
            shape = list(saved[name].shape) if name in saved else "nothing"
            raise ConfigError(f"decoder: {path} does not fit: {name} is {shape}, wanted {list(tensor.shape)}")
    decoder.load_state_dict({name: saved[name] for name in expected})


def with_saved_size(config: MaeConfig) -> MaeConfig:
    """Return the configuration with the width and depth of the saved decoder, if there is one."""
    if config.mae.decoder is None:
        return config
    saved = _decoder_state(config.mae.decoder)
    depth = 1 + max((int(name.split(".")[1]) for name in saved if name.startswith("blocks.")), default=-1)
    width = len(saved["embed.weight"]) if "embed.weight" in saved else config.mae.decoder_width
    return replace_flat(config, decoder_width=width, decoder_depth=max(1, depth))


def _decoder_state(path: str) -> dict[str, Tensor]:
    """Read the decoder's tensors from a checkpoint of MAE, by `Decoder`'s names."""
    state = checkpoint_files.read(Path(path))
    decoder = {name.removeprefix("decoder_"): value for name, value in state.items() if name.startswith("decoder_")}
    if not decoder:
        raise ConfigError(f"decoder: {path} holds no decoder_... tensors; the encoder-only files of MAE do not")
    if "mask_token" in state:
        decoder["mask_token"] = state["mask_token"]
    return decoder
