"""What a run takes, logged before its first step; on a CPU with a rough time (runtime/duration.py).

    adapt:    steps x 2 P T B (1 + b / L); the L - b blocks see a view that serves in several epochs once
    finetune: 2 P T (epochs x (N x passes + M) + test images); with a cache 2 P T (N + M + test images)

FLOPs: a forward pass takes 2 per weight and token, the backward pass through frozen weights as many again, and the
gradient of trained weights as many once more. P: weights of the model, T: tokens of all views of an image, B: images
per step, b of L blocks with adapters, N images to learn from, M to choose the epoch by, passes: `PASSES`.
"""

from __future__ import annotations

import logging
import math

from upstep_fast.config.adapt import AdaptConfig
from upstep_fast.config.finetune import FinetuneConfig
from upstep_fast.methods.crops import view_configs
from upstep_fast.model.backbone import Backbone
from upstep_fast.runtime import distributed
from upstep_fast.runtime.device import Compute
from upstep_fast.runtime.duration import HOUR, log_estimate
from upstep_fast.runtime.machine import format_bytes
from upstep_fast.runtime.terminal import counted
from upstep_fast.train.state import RunState

log = logging.getLogger("upstep_fast")

PASSES = {"linear": 1, "losa": 1, "lora": 2, "full": 3}  # through the backbone in a step of finetune


def log_cost(
    config: AdaptConfig, compute: Compute, num_images: int, backbone: Backbone, num_weights: int, state: RunState
) -> None:
    """Log images, steps and trainable parameters; warn of a run of more than an hour on a CPU, with shorter ones.

    num_weights: parameters of the model before adapters were added.
    """
    run = config.optimization
    trained = sum(p.numel() for group in state.method.parameter_groups() for p in group["params"])
    passes = run.num_steps * run.batch_size / num_images
    log.info(
        "adapt: %s, %s steps of %d images (%.3g passes), %.2f M trainable parameters, model of %.1f M",
        *(_images(num_images, backbone.img_size), f"{run.num_steps:,}", run.batch_size, passes),
        *(trained / 1e6, num_weights / 1e6),
    )
    if config.method == "upstep" and config.lora.tune == "lora":
        depth = len(backbone.blocks)
        objective, blocks = config.objective.loss, f"the last {config.num_adapted(depth)} of {depth} blocks"
        log.info("adapt: objective %s, gate %s, adapters in %s", objective, config.gate.rule, blocks)
    if state.method.bank is not None and state.method.bank.limit:
        _log_bank(config, num_images, backbone, state)
    flops = (run.num_steps - state.step) * step_flops(config, backbone, num_weights, num_images)
    log_estimate(flops, compute, lambda seconds: _shorter(config, seconds))


def log_finetune(
    config: FinetuneConfig,
    compute: Compute,
    images: tuple[int, int, int],
    backbone: Backbone,
    num_trained: int,
    epochs: int,
) -> None:
    """Log images, epochs and trainable parameters, and on a CPU a rough time.

    images: or clips, to learn from, to choose the epoch by, and to test on. epochs: that are left.
    """
    run, (learn, choose, test) = config.optimization, images
    log.info(
        "finetune: %s, %s, %s in batches of %d, %s trainable parameters",
        *(
            config.method,
            _images(learn, backbone.img_size),
            counted(run.epochs, "epoch"),
            run.batch_size,
            f"{num_trained:,}",
        ),
    )
    passes = learn + choose if config.cache != "off" else epochs * (learn * PASSES[config.method] + choose)
    flops = (passes + test) * (config.frames or 1) * backbone.forward_flops
    log_estimate(flops, compute, lambda seconds: _shorter_finetune(config, seconds), " for all epochs")


def _images(count: int, size: tuple[int, int]) -> str:
    return f"{count:,} images at {size[0]} x {size[1]} px"


def _log_bank(config: AdaptConfig, num_images: int, backbone: Backbone, state: RunState) -> None:
    """Log the bytes of the tokens that will be kept."""
    vit, bank, uses = backbone.vit, state.method.bank, config.views.uses
    assert bank is not None
    values = (vit.patch_embed.num_patches + vit.num_prefix_tokens) * backbone.width
    size = (uses // 2 + 1) * num_images * values * state.method.view_dtype.itemsize
    log.info(
        "adapt: each view serves in %d epochs; what the first %d blocks make of it is kept, %s",
        *(uses, bank.frozen, format_bytes(min(size, bank.limit))),
    )


def views_made(config: AdaptConfig, num_images: int) -> int:
    """Return about how many different views a run of UpStep has (methods/view_bank.py)."""
    seen, uses = views_seen(config), config.views.uses
    return min(seen, int(seen / uses + num_images)) if uses > 1 else seen


def views_seen(config: AdaptConfig) -> int:
    """Return how many views the steps of a run of UpStep compare."""
    return 2 * config.optimization.num_steps * config.optimization.batch_size


def step_flops(config: AdaptConfig, backbone: Backbone, num_weights: int, num_images: int | None = None) -> float:
    """Return the FLOPs of an update step, roughly: matrix products with the model's weights only.

    num_images: of the data; with views that serve in several epochs, the mean over the steps then.
    """
    patch = math.prod(backbone.vit.patch_embed.patch_size)
    pixels = sum(math.prod(_pair(views.size)) * count for views, count in view_configs(config, backbone))
    blocks = len(backbone.blocks)
    adapted = min(blocks, config.num_adapted(blocks))
    passes = 1 + adapted / blocks
    if config.views.uses > 1 and num_images is not None and distributed.size() == 1:
        passes -= (1 - adapted / blocks) * (1 - views_made(config, num_images) / views_seen(config))
    return 2 * num_weights * pixels / patch * config.optimization.batch_size * passes


def _pair(size: tuple[int, int] | int) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def _shorter(config: AdaptConfig, seconds: float) -> str:
    """Return what would take less time, as the rest of a sentence."""
    options = ["--model demo (small, included)"]
    steps = int(config.optimization.num_steps * HOUR / 2 / seconds)
    options.append(f"--steps {steps} (half an hour)" if steps >= 20 else "fewer --steps and a smaller --batch-size")
    if config.method != "explora" and config.lora.blocks is None and config.learns_by != "vicreg":
        options.append("--lora-blocks 3 (the last blocks)")
    return f"{', '.join(options)}, or whitening without training: upstep-fast embed --fit-whitening FILE"


def _shorter_finetune(config: FinetuneConfig, seconds: float) -> str:
    options = ["--model demo (small, included)"]
    if (epochs := int(config.optimization.epochs * HOUR / 2 / seconds)) >= 1:
        options.append(f"--epochs {epochs} (half an hour)")
    if config.cache == "off":
        options.append("--method linear --preset-views none --cache memory (each image passes the model once)")
    return ", ".join(options)
