"""ExPLoRA with MAE's objective (He et al. 2022): pixels of hidden patches, predicted from those that are shown.

    encoder: the shown patches alone, with their positions; decoder: a mask token for each hidden one
    L = mean over the hidden patches of the squared error of their (normalised) pixels          losses/mae.py

A pretrained decoder gets LoRA on its attention and trained norms, as in the paper; a fresh one is trained whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from upstep_fast.config.explora import MaeConfig
from upstep_fast.config.flat import replace_flat
from upstep_fast.data.keyed_random import uniform_array
from upstep_fast.data.loading.loader import Batch
from upstep_fast.data.views.view_config import view_config
from upstep_fast.data.views.views import random_views
from upstep_fast.engine.block import Memory
from upstep_fast.errors import ConfigError
from upstep_fast.methods import trainable
from upstep_fast.methods.embeddings import Embeddings, embedded
from upstep_fast.methods.explora import unfreeze as explora
from upstep_fast.methods.explora.tokens import Encoder, embed
from upstep_fast.methods.losses import mae
from upstep_fast.methods.schedules import warmup_cosine
from upstep_fast.model import lora
from upstep_fast.model.backbone import Backbone
from upstep_fast.model.formats import checkpoint_files
from upstep_fast.model.pooling import pooled

log = logging.getLogger("upstep_fast")

BETAS = (0.9, 0.95)  # AdamW's, as in MAE
_NOISE = 8  # names the random numbers of the masks among those of (seed, epoch, index)


@dataclass(frozen=True)
class Shown:
    """One crop of each image, and the order in which its patches are hidden."""

    crops: Tensor  # [1, B, C, H, W]
    noise: Tensor  # [B, N], in 0..1; the smallest are shown

    def __len__(self) -> int:
        return len(self.crops)


# counted and moved tensor by tensor
torch.export.register_dataclass(Shown)


@dataclass(frozen=True, kw_only=True)
class Encoded(Embeddings):
    """The encoder's view of a batch; z: unit features of the shown patches."""

    crops: Tensor  # [B, C, H, W]
    tokens: Tensor  # [B, P + n, D] of the prefix and the shown patches
    keep: Tensor  # [B, n] their places
    hidden: Tensor  # [B, N] bool, the patches that are not shown


class Decoder(nn.Module):
    """MAE's decoder: [B, P + n, D] tokens of the encoder -> pixels of every patch [B, N, p q C]."""

    def __init__(self, width: int, grid: tuple[int, int], prefix: int, pixels: int, config: MaeConfig):
        super().__init__()
        size, self.prefix = config.mae.decoder_width, prefix
        self.embed = nn.Linear(width, size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, size))
        nn.init.normal_(self.mask_token, std=0.02)
        self.pos_embed = nn.Parameter(sincos_positions(grid, size, prefix), requires_grad=False)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        heads, depth = config.mae.decoder_heads, config.mae.decoder_depth
        self.blocks = nn.Sequential(*(Block(size, heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm = norm(size)
        self.pred = nn.Linear(size, pixels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, keep: Tensor) -> Tensor:
        """keep: [B, n], the places of the shown patches."""
        x = self.embed(tokens)
        num_patches = self.pos_embed.shape[1] - self.prefix
        patches = self.mask_token.to(x.dtype).expand(len(x), num_patches, -1)
        patches = patches.scatter(1, keep[..., None].expand(-1, -1, x.shape[-1]), x[:, self.prefix :])
        x = torch.cat([x[:, : self.prefix], patches], 1) + self.pos_embed
        return self.pred(self.norm(self.blocks(x)))[:, self.prefix :]


class ExploraMae(nn.Module):
    """The encoder and the decoder; what training changes and a checkpoint holds."""

    def __init__(self, backbone: Backbone, config: MaeConfig):
        super().__init__()
        self.config, self.num_microbatches = config, 1
        views = config.views
        self.recipe = view_config(
            views.preset, size=backbone.img_size, mean=backbone.mean, std=backbone.std, **views.overrides()
        )
        vit: Any = backbone.vit
        self.patch: tuple[int, int] = tuple(vit.patch_embed.patch_size)
        self.grid = tuple(vit.patch_embed.grid_size)
        pixels = self.patch[0] * self.patch[1] * vit.patch_embed.proj.in_channels
        # parts of torch.nn draw from the global generator: set it for this block only
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.runtime.seed)
            self.adapters = explora.prepare(backbone, config)
            self.decoder = Decoder(vit.embed_dim, self.grid, vit.num_prefix_tokens, pixels, _as_saved(config))
            self.decoder_adapters = self._load_decoder() if config.mae.decoder else {}
        if not config.mae.decoder:
            log.warning(
                "objective: %s has no MAE decoder; a fresh one of %d blocks is trained with it (--decoder FILE: a "
                "pretrained one)",
                config.model.name,
                config.mae.decoder_depth,
            )
        self.vit, self.encoder = vit, Encoder(vit)

    def _load_decoder(self) -> dict[str, lora.LoraLinear]:
        """Fill the decoder from a checkpoint of MAE, freezes it but for norms, and puts LoRA on its attention."""
        path = str(self.config.mae.decoder)
        found = _decoder_state(path)
        wanted = self.decoder.state_dict()
        wrong = [name for name in wanted if name not in found or found[name].shape != wanted[name].shape]
        if wrong:
            name = wrong[0]
            has = list(found[name].shape) if name in found else "nothing"
            raise ConfigError(f"decoder: {path} does not fit: {name} is {has}, wanted {list(wanted[name].shape)}")
        self.decoder.load_state_dict({name: found[name] for name in wanted})
        r = self.config.mae.decoder_lora_r
        alpha = explora.lora_spec(self.config).alpha / self.config.lora.r * r  # the encoder's scale
        return explora.extend(self.decoder, (), lora.LoraSpec(r=r, alpha=alpha, targets=("q", "v")), class_token=False)

    def accelerate(self, dtype: torch.dtype, memory: Memory = "fast", fp8: bool = False) -> None:
        """Run the encoder's frozen blocks on the engine from now on."""
        if explora.accelerate(self.encoder, dtype, memory, fp8):
            blocks = self.config.explora.unfreeze
            log.info("engine: the blocks trained whole (%s) and the decoder run as plain modules", blocks)

    @property
    def needs_init(self) -> bool:
        """Nothing is computed before the first step."""
        return False

    def initialize_from_data(self, views: Iterable[Shown]) -> None:
        """Nothing."""

    def schedule(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Set the learning rate of this step."""
        run = self.config.optimization
        for group in optimizer.param_groups:
            group["lr"] = run.lr * warmup_cosine(step, run.num_steps, run.warmup)

    def views(self, batch: Batch, device: torch.device) -> Shown:
        """One crop of each image and its masking noise."""
        seed, indices = self.config.runtime.seed, np.asarray(batch.indices, np.int64)
        crops = random_views(
            batch.images, self.recipe, seed=seed, epoch=batch.epoch, indices=batch.indices, views=1, device=device
        )
        places = np.arange(self.grid[0] * self.grid[1], dtype=np.uint64)
        noise = uniform_array(seed, batch.epoch, indices[:, None], _NOISE, places)
        return Shown(crops, torch.from_numpy(noise).to(device, torch.float32))

    @property
    def min_side(self) -> int:
        """Pixels that the views need of an image's sides."""
        return self.recipe.min_side

    def images(self, views: Shown) -> Tensor:
        """The crop of each image."""
        return views.crops[0]

    def embed(self, views: Shown) -> Encoded:
        """The encoder's forward pass over the shown patches."""
        keep, hidden = mae.split(views.noise, self.config.mae.masked)
        (x,) = self.encoder(embed(self.vit, views.crops[0], keep=keep))
        seen = embedded(pooled(self.vit, x)[None])
        if isinstance(self.vit.norm, nn.Identity):  # a model that pools before its norm has it in the head
            x = self.vit.fc_norm(x)
        own = {field.name: getattr(seen, field.name) for field in fields(Embeddings)}
        return Encoded(**own, crops=views.crops[0], tokens=x, keep=keep, hidden=hidden)

    def num_stats(self, views: int) -> int:
        """How many numbers `Embeddings.local_stats` of so many views are."""
        return views * self.vit.num_features + 1

    def loss(self, student: Encoded, teacher: Encoded | None = None) -> Tensor:
        """The squared error of the hidden patches' pixels, a scalar in fp32."""
        prediction = self.decoder(student.tokens, student.keep)
        # rows and columns beyond the last whole patch are not seen
        height, width = (count * side for count, side in zip(self.grid, self.patch, strict=True))
        targets = mae.pixel_targets(student.crops[..., :height, :width], self.patch, self.config.mae.norm_pixels)
        return mae.pixel_loss(prediction, targets, student.hidden)

    def metrics(self) -> dict[str, Any]:
        """Nothing beside the loss and the centre."""
        return {}

    def after_update(self, applied: Tensor) -> None:
        """Nothing: there is no teacher."""

    def update_running_stats(self, embedded: Embeddings) -> None:
        """Nothing runs along."""

    def collapsed(self, row: dict[str, Any]) -> str | None:
        """Never: one feature for all images cannot predict their pixels."""
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Matrices, then what has no weight decay."""
        of_decay: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        for name, p in trainable.trained(self).items():
            of_decay[trainable.decays(name, p)].append(p)
        decay = {True: self.config.optimization.weight_decay, False: 0.0}
        return [{"params": of_decay[d], "weight_decay": decay[d], "betas": BETAS} for d in (True, False)]

    def gradient_parts(self) -> list[tuple[list[nn.Parameter], float]]:
        """The backbone and the decoder."""
        clip = self.config.optimization.clip
        return [(list(trainable.trained(part).values()), clip) for part in (self.vit, self.decoder)]

    def must_receive_grad(self) -> dict[str, nn.Parameter]:
        """What must receive a gradient."""
        decoder = {f"decoder.{name}": adapter.lora_b for name, adapter in self.decoder_adapters.items()}
        return trainable.must_receive_grad(self.vit, self.adapters) | decoder

    def state_tensors(self) -> dict[str, Tensor]:
        """What trains."""
        return dict(trainable.trained(self))

    def weights_to_save(self) -> AbstractContextManager[nn.Module]:
        """The encoder as it is."""
        return nullcontext(self.vit)

    def result_files(self) -> dict[str, bytes]:
        """The encoder, as PEFT reads it, and bare parameters."""
        return trainable.result_files(self.vit, self.adapters, self.config.model.name, trainable.trained(self.vit))


def sincos_positions(grid: tuple[int, int], width: int, prefix: int) -> Tensor:
    """Fixed position embeddings, [1, prefix + N, width]: sines and cosines of the row, then of the column; prefix 0."""
    omega = 10000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    parts = [f(place.flatten()[:, None] * omega) for place in (rows, columns) for f in (torch.sin, torch.cos)]
    return F.pad(torch.cat(parts, 1), (0, 0, prefix, 0))[None].float()


def _decoder_state(path: str) -> dict[str, Tensor]:
    """The decoder's tensors in a checkpoint of MAE, by the names that `Decoder` has."""
    state = checkpoint_files.read(Path(path))
    found = {name.removeprefix("decoder_"): value for name, value in state.items() if name.startswith("decoder_")}
    if not found:
        raise ConfigError(f"decoder: {path} holds no decoder_... tensors; the encoder-only files of MAE do not")
    if "mask_token" in state:
        found["mask_token"] = state["mask_token"]
    return found


def _as_saved(config: MaeConfig) -> MaeConfig:
    """The configuration with the width and depth of the decoder that `config.mae.decoder` holds."""
    if config.mae.decoder is None:
        return config
    found = _decoder_state(config.mae.decoder)
    depth = 1 + max((int(name.split(".")[1]) for name in found if name.startswith("blocks.")), default=-1)
    width = len(found["embed.weight"]) if "embed.weight" in found else config.mae.decoder_width
    return replace_flat(config, decoder_width=width, decoder_depth=max(1, depth))
