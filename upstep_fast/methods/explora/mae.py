"""ExPLoRA with MAE's objective (He et al. 2022): pixels of masked patches, predicted from the visible ones.

    encoder: the visible patches alone, with their positions; decoder: a mask token for each masked one
    L = mean over the masked patches of the squared error of their (normalized) pixels          losses/mae.py

A pretrained decoder gets LoRA on its attention and trained norms, as in the paper; a fresh one is fully trained.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from upstep_fast.config.explora import MaeConfig
from upstep_fast.data.keyed_random import uniform_array
from upstep_fast.data.loading.loader import Batch
from upstep_fast.data.views.make_views import multi_crop
from upstep_fast.data.views.types import Views, register_views
from upstep_fast.engine.block import Memory
from upstep_fast.methods import crops, trainable
from upstep_fast.methods.embeddings import Embeddings, unit_embeddings
from upstep_fast.methods.explora import unfrozen_blocks as explora
from upstep_fast.methods.explora.mae_decoder import Decoder, load_decoder, with_saved_size
from upstep_fast.methods.explora.tokens import Encoder, embed
from upstep_fast.methods.losses import mae
from upstep_fast.methods.method import Method
from upstep_fast.model.backbone import Backbone
from upstep_fast.model.lora import LoraLinear, LoraSpec
from upstep_fast.model.pooling import pooled

log = logging.getLogger("upstep_fast")

BETAS = (0.9, 0.95)  # AdamW's, as in MAE
_NOISE = 8  # names the random numbers of the masks among those of (seed, epoch, index)


@dataclass(frozen=True, kw_only=True)
class MaskedViews(Views):
    """One crop of each of B images, and random numbers from which the masks are made."""

    noise: Tensor  # [B, N], in 0..1; patches with the smallest are visible


register_views(MaskedViews)


@dataclass(frozen=True)
class EncoderOutput:
    """The encoder's output for the visible patches of B crops."""

    crops: Tensor  # [B, C, H, W]
    tokens: Tensor  # [B, P + n, D] of the prefix and the visible patches
    visible: Tensor  # [B, n] their indices
    masked: Tensor  # [B, N] bool


class ExploraMae(Method):
    """The encoder and the decoder."""

    config: MaeConfig

    def __init__(self, backbone: Backbone, config: MaeConfig):
        super().__init__(config, crops.view_configs(config, backbone, global_views=1))
        vit: Any = backbone.vit
        self.patch: tuple[int, int] = tuple(vit.patch_embed.patch_size)
        self.grid, self.embedding_dim = tuple(vit.patch_embed.grid_size), vit.num_features
        pixels = self.patch[0] * self.patch[1] * vit.patch_embed.proj.in_channels
        # parts of torch.nn draw from the global generator: set it for this block only
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.runtime.seed)
            self.adapters = explora.prepare(backbone, config)
            self.decoder = Decoder(vit.embed_dim, self.grid, vit.num_prefix_tokens, pixels, with_saved_size(config))
            self.decoder_adapters = self._load_decoder(config.mae.decoder) if config.mae.decoder else {}
        if not config.mae.decoder:
            log.warning(
                "objective: %s has no MAE decoder; a fresh one of %d blocks is trained with it (--decoder FILE: a "
                "pretrained one)",
                config.model.name,
                config.mae.decoder_depth,
            )
        self.vit, self.encoder = vit, Encoder(vit)

    def _load_decoder(self, path: str) -> dict[str, LoraLinear]:
        """Fill the decoder from a checkpoint, freeze it except for its norms, and put LoRA on its attention."""
        load_decoder(self.decoder, path)
        r = self.config.mae.decoder_lora_r
        alpha = explora.lora_spec(self.config).alpha / self.config.lora.r * r  # the encoder's scale
        return explora.extend(self.decoder, (), LoraSpec(r=r, alpha=alpha, targets=("q", "v")), class_token=False)

    def accelerate(self, dtype: torch.dtype, memory: Memory = "fast", fp8: bool = False) -> None:
        """Run the encoder's frozen blocks on the engine in `dtype`."""
        if explora.accelerate(self.encoder, dtype, memory, fp8):
            blocks = self.config.explora.unfreeze
            log.info("engine: the fully trained blocks (%s) and the decoder run as plain modules", blocks)

    def views(self, batch: Batch, device: torch.device) -> MaskedViews:
        """Return one crop of each image with the noise of its mask."""
        seed, indices = self.config.runtime.seed, np.asarray(batch.indices, np.int64)
        key = {"seed": seed, "epoch": batch.epoch, "indices": batch.indices, "device": device}
        (pixels,) = multi_crop(batch.images, self.view_configs, **key)  # type: ignore[arg-type]
        patches = np.arange(self.grid[0] * self.grid[1], dtype=np.uint64)
        noise = uniform_array(seed, batch.epoch, indices[:, None], _NOISE, patches)
        return MaskedViews.of(pixels, noise=torch.from_numpy(noise).to(device, torch.float32))

    def embed(self, views: MaskedViews) -> Embeddings[EncoderOutput]:  # type: ignore[override]
        """Run the encoder over the visible patches. The embeddings are their pooled features."""
        images = views.pixels[0]
        visible, masked = mae.split(views.noise, self.config.mae.masked)
        (x,) = self.encoder(embed(self.vit, images, visible=visible))
        features = pooled(self.vit, x)
        if isinstance(self.vit.norm, nn.Identity):  # a model that pools before its norm has it in the head
            x = self.vit.fc_norm(x)
        return unit_embeddings(features[None], EncoderOutput(images, x, visible, masked))

    def loss(self, student: Embeddings[EncoderOutput], teacher: Embeddings[EncoderOutput] | None = None) -> Tensor:
        """Return the squared error of the masked patches' pixels, a scalar in fp32."""
        output = student.extras
        prediction = self.decoder(output.tokens, output.visible)
        # rows and columns beyond the last full patch are not used
        height, width = (count * side for count, side in zip(self.grid, self.patch, strict=True))
        targets = mae.pixel_targets(output.crops[..., :height, :width], self.patch, self.config.mae.norm_pixels)
        return mae.pixel_loss(prediction, targets, output.masked)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return AdamW's groups: matrices, and what has no weight decay."""
        parts, decay = trainable.by_decay(trainable.trained(self)), self.config.optimization.weight_decay
        return [{"params": parts[d], "weight_decay": decay * d, "betas": BETAS} for d in (True, False)]

    def gradient_parts(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return the backbone and the decoder, clipped separately."""
        clip = self.config.optimization.clip
        return [(list(trainable.trained(part).values()), clip) for part in (self.vit, self.decoder)]

    def must_receive_grad(self) -> dict[str, nn.Parameter]:
        """Return the parameters that must have received a gradient by the end, the decoder's adapters included."""
        decoder = {f"decoder.{name}": adapter.lora_b for name, adapter in self.decoder_adapters.items()}
        return super().must_receive_grad() | decoder
