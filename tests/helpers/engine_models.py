"""Small timm models of every kind the engine runs, and what tests ask of them beside the plain model."""

from pathlib import Path

import timm
import torch
from adapt_configs import upstep_config

import upstep_fast
from upstep_fast.data.views.types import Views
from upstep_fast.engine import vit as engine
from upstep_fast.model import backbone, lora
from upstep_fast.model.pooling import features
from upstep_fast.runtime.device import resolve
from upstep_fast.train import loop as trainer
from upstep_fast.train.state import fresh_state
from upstep_fast.train.step import flush

SMALL = dict(img_size=48, patch_size=8, embed_dim=96, num_heads=3)
TWO = dict(SMALL, mlp_layer=timm.layers.SwiGLU, act_layer="silu")
VARIANTS = {
    "class token": ("vit_tiny_patch16_224", SMALL),
    "registers, LayerScale": ("vit_small_patch14_reg4_dinov2", dict(img_size=42, embed_dim=128, num_heads=2)),
    "no registers, LayerScale": ("vit_small_patch14_dinov2", dict(img_size=70, embed_dim=128, num_heads=2)),
    "QuickGELU, norm_pre": ("vit_base_patch16_clip_quickgelu_224", dict(img_size=48, embed_dim=128, num_heads=2)),
    "attention pooling": ("vit_so150m_patch16_reg4_map_256", dict(img_size=64, embed_dim=128, num_heads=2)),
    "mean of patches": ("vit_tiny_patch16_224", dict(img_size=48, embed_dim=96, num_heads=3, global_pool="avg")),
    "head width 128": ("vit_tiny_patch16_224", dict(img_size=48, embed_dim=128, num_heads=1)),
    "no qkv bias": ("vit_tiny_patch16_224", dict(img_size=48, embed_dim=96, num_heads=3, qkv_bias=False)),
    "SwiGLU": ("vit_giant_patch14_reg4_dinov2", dict(img_size=42, embed_dim=96, num_heads=1)),
    "SwiGLU in two matrices": ("vit_tiny_patch16_224", TWO),
    "SwiGLU with a norm": ("vit_tiny_patch16_224", dict(TWO, scale_mlp_norm=True)),
    "norms before proj and fc2": ("beit3_base_patch16_224", dict(img_size=48, embed_dim=96, num_heads=1)),
    "qk-norm": ("vit_tiny_patch16_224", dict(SMALL, qk_norm=True)),
    "qk-norm by RMSNorm": ("vit_tiny_patch16_224", dict(SMALL, qk_norm=True, norm_layer="rmsnorm")),
    "DINOv3": ("vit_small_patch16_dinov3", dict(img_size=48, embed_dim=96, num_heads=3)),
    "DINOv3, SwiGLU, biases": (
        "vit_small_plus_patch16_dinov3_qkvb",
        dict(img_size=(48, 80), embed_dim=96, num_heads=3),
    ),
    "EVA-02": ("eva02_tiny_patch14_224", dict(img_size=42, embed_dim=96, num_heads=3)),
    "EVA-02, q k v apart": ("eva02_base_patch14_224", dict(img_size=(42, 28), embed_dim=96, num_heads=3)),
    "EVA-02 CLIP": ("eva02_base_patch16_clip_224", dict(img_size=48, embed_dim=96, num_heads=3)),
    "rotary, qk-norm": ("vit_base_patch16_sapiens2", dict(img_size=48, embed_dim=96, num_heads=3, num_kv_heads=3)),
    "rotary, norm_pre": ("vit_pe_core_base_patch16_224", dict(img_size=48, embed_dim=96, num_heads=3)),
    "rotary, mean": ("vit_medium_patch16_rope_reg1_gap_256", dict(img_size=48, embed_dim=96, num_heads=3)),
    "EVA": ("eva_giant_patch14_224", dict(img_size=28, embed_dim=96, num_heads=1)),
    "RMSNorm, SwiGLU": ("aimv2_large_patch14_224", dict(img_size=42, embed_dim=96, num_heads=1)),
}
# beyond the plain block: what stands between its products differs
SWIGLU = [name for name in VARIANTS if "SwiGLU" in name and "DINOv3" not in name]
ROTARY = [name for name in VARIANTS if name.startswith(("rotary", "DINOv3", "EVA"))]


def model(variant="class token", targets=("q", "k", "v"), depth=2, frozen=0):
    """A timm model of random weights with adapters that already do something, and images for it.

    frozen: number of first blocks without adapters.
    """
    name, args = VARIANTS[variant]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = timm.create_model(name, depth=depth, num_classes=0, **args).eval().requires_grad_(False)
        for parameter in vit.parameters():
            if parameter.ndim == 1:  # norms and LayerScale start at constants, where a wrong fold would not show
                parameter += 0.1 * torch.randn_like(parameter)
        for adapter in lora.inject(vit, lora.LoraSpec(r=4, alpha=6, targets=targets), leave_out=range(frozen)).values():
            torch.nn.init.normal_(adapter.lora_b, std=0.05)
        images = torch.randn(3, 3, *vit.patch_embed.img_size)
    return vit, images


def gradients(vit, function, images):
    """Features, and the gradient of every adapter of an arbitrary function of them."""
    parameters = [p for p in vit.parameters() if p.requires_grad]
    f = function(images)
    weights = torch.linspace(-1, 1, f.numel()).view_as(f)
    grads = torch.autograd.grad((f.float() * weights + f.float().sin()).sum(), parameters)
    return f.detach().float(), [g.float() for g in grads]


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def same_as_timm(vit, images, memory="fast"):
    torch.manual_seed(1)
    expected, expected_grads = gradients(vit, lambda x: features(vit, x), images)
    torch.manual_seed(1)
    got, grads = gradients(vit, engine.build(vit, torch.float32, memory).features, images)
    assert relative(got, expected) < 1e-5
    assert len(grads) == len([p for p in vit.parameters() if p.requires_grad])
    for ours, theirs in zip(grads, expected_grads, strict=True):
        assert relative(ours, theirs) < 1e-4


def kept_bytes(memory, dtype, depth, fused, variant="class token", frozen=0):
    vit, images = model(variant, depth=depth, frozen=frozen)
    total = {}

    def note(tensor):
        total[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    run = engine.build(vit, dtype, memory, fused=fused)
    parameters = {p.untyped_storage().data_ptr() for p in vit.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = run.features(images)
    assert out.requires_grad
    return sum(size for pointer, size in total.items() if pointer not in parameters)


def run_state(steps, implementation, precision="fp32", device="cpu", **options):
    """The start of a run of the real small model."""
    assets = Path(upstep_fast.__file__).parent / "assets"
    config = upstep_config(
        model=f"local-dir:{assets / 'base_tiny'}",
        data=("none",),
        out="none",
        steps=steps,
        batch_size=8,
        prototypes=16,
        head_hidden=64,
        head_dim=32,
        implementation=implementation,
        **options,
    )
    compute = resolve(device, precision)
    return config, compute, fresh_state(config, compute, backbone.load(config.model.name))


def trajectory(implementation, steps, precision="fp32", **options):
    """The rows of a run on noise images."""
    config, compute, state = run_state(steps, implementation, precision, **options)
    rule, rows = trainer.gate_rule(config), []
    for t in range(steps):
        images = torch.randn(2, 8, 3, 64, 64, generator=torch.Generator().manual_seed(t)).to(compute.device)
        rows.append(trainer.step(state, Views.of(images), rule, config, compute))
    flush(state)
    return rows
