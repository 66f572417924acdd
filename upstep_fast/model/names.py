"""Names of models as people type them, and the name that loads the same weights."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

import timm

from upstep_fast.config.base import DEMO
from upstep_fast.model.formats import checkpoint_files

log = logging.getLogger("upstep_fast")

_SIZES = {"t": "tiny", "s": "small", "b": "base", "l": "large", "h": "huge", "g": "giant"}
LOCAL, HUB = "local-dir:", "hf-hub:"
# what people write for them, in lower case and with _ for -; timm's names need none
_PREFIXES = {"hf:": HUB, "hf_hub:": HUB, "hub:": HUB, "https://huggingface.co/": HUB, "local_dir:": LOCAL, "timm:": ""}
# whose repositories are known not to be folders of the user: nothing else is ever asked for in the hub
_OWNERS = ("facebook", "google", "openai", "microsoft", "laion", "apple", "nvidia", "timm")

# repositories that hf-hub: reads by itself (configurations of transformers), to be suggested
HUB_IDS = (
    *(f"facebook/dinov2-{size}" for size in ("small", "base", "large", "giant")),
    *(f"facebook/dinov2-with-registers-{size}" for size in ("small", "base", "large", "giant")),
    *(f"facebook/dino-vit{size}" for size in ("s16", "s8", "b16", "b8")),
    *(f"facebook/vit-mae-{size}" for size in ("base", "large", "huge")),
    *(f"google/vit-{size}" for size in ("base-patch16-224", "base-patch16-224-in21k", "base-patch16-384")),
    *(f"google/vit-{size}" for size in ("base-patch32-384", "large-patch16-224", "large-patch16-384")),
)


def _meta() -> dict[str, str]:
    known = {}
    for short, size in {"s": "small", "b": "base", "l": "large", "g": "giant"}.items():
        known[f"dinov2_vit{short}14"] = f"vit_{size}_patch14_dinov2.lvd142m"
        known[f"dinov2_vit{short}14_reg"] = f"vit_{size}_patch14_reg4_dinov2.lvd142m"
    for short, size in {"s": "small", "b": "base"}.items():
        known |= {f"dino_vit{short}{patch}": f"vit_{size}_patch{patch}_224.dino" for patch in (8, 16)}
    known |= {f"mae_vit_{size}_patch{n}": f"vit_{size}_patch{n}_224.mae" for size, n in (("base", 16), ("large", 16))}
    known["mae_vit_huge_patch14"] = "vit_huge_patch14_224.mae"
    sizes = {
        "s16": "small",
        "s16plus": "small_plus",
        "b16": "base",
        "l16": "large",
        "h16plus": "huge_plus",
        "7b16": "7b",
    }
    for short, size in (sizes | {"7b16": "7b"}).items():
        names = (f"dinov3_vit{short}", f"facebook/dinov3-vit{short}-pretrain-lvd1689m")
        known |= dict.fromkeys(names, f"vit_{size}_patch16_dinov3.lvd1689m")
    for short, size in {"l16": "large", "7b16": "7b"}.items():
        known[f"facebook/dinov3-vit{short}-pretrain-sat493m"] = f"vit_{size}_patch16_dinov3.sat493m"
    for size in ("tiny", "small", "base"):
        known[f"facebook/deit-{size}-distilled-patch16-224"] = f"deit_{size}_distilled_patch16_224.fb_in1k"
    return known


def _clip() -> dict[str, str]:
    known: dict[str, str] = {}
    for theirs, repository, ours in (
        ("vit-b/32", "base-patch32", "base_patch32_clip_quickgelu_224"),
        ("vit-b/16", "base-patch16", "base_patch16_clip_quickgelu_224"),
        ("vit-l/14", "large-patch14", "large_patch14_clip_quickgelu_224"),
        ("vit-l/14@336px", "large-patch14-336", "large_patch14_clip_quickgelu_336"),
    ):  # trained with QuickGELU: timm's other architectures give other features
        known |= dict.fromkeys((theirs, f"openai/clip-vit-{repository}"), f"vit_{ours}.openai")
    for repository, ours in (
        ("b-32-laion2b-s34b-b79k", "base_patch32"),
        ("b-16-laion2b-s34b-b88k", "base_patch16"),
        ("l-14-laion2b-s32b-b82k", "large_patch14"),
        ("h-14-laion2b-s32b-b79k", "huge_patch14"),
    ):
        known[f"laion/clip-vit-{repository}"] = f"vit_{ours}_clip_224.laion2b"
    return known


def _siglip() -> dict[str, str]:
    known = {"google/siglip-so400m-patch14-384": "vit_so400m_patch14_siglip_384.webli"}
    sizes = [f"base-patch16-{pixels}" for pixels in (224, 256, 384, 512)]
    for size in (*sizes, "large-patch16-256", "large-patch16-384", "so400m-patch14-224"):
        ours = "vit_" + "_siglip_".join(size.replace("-", "_").rsplit("_", 1))
        known |= {f"google/siglip-{size}": f"{ours}.webli", f"google/siglip2-{size}": f"{ours}.v2_webli"}
    return known


# timm's names of weights, by the lower-case names of torch.hub, of OpenAI and of repositories of the hub: those that
# hf-hub: cannot read alone (several towers, distilled) or only after a license was accepted (DINOv3)
KNOWN = _meta() | _clip() | _siglip()


def demo_folder() -> Path:
    """Return the folder of the model included in the package."""
    return Path(str(files("upstep_fast") / "assets" / "base_tiny"))


def shown(name: str) -> str:
    """Return a resolved name as a reader is to see it: "demo" for the model included in the package."""
    return DEMO if name == f"{LOCAL}{demo_folder()}" else name


def resolve(name: str, arch: str | None = None) -> str:
    """Return the name that loads what `name` certainly means; other names as they are. Logs a replaced name once.

    A timm name, local-dir:PATH, hf-hub:NAME or a checkpoint file stays. arch: the architecture given beside the name.
    """
    resolved = _resolved(name, arch)
    if resolved != name:
        _log_once(name, resolved)
    return resolved


@functools.cache
def _log_once(name: str, resolved: str) -> None:
    if name == DEMO:
        log.info("model: demo is the small model included in the package (64 x 64 pixels), for trying out")
    else:
        log.info("model: %s is read as %s", name, resolved)


def _resolved(name: str, arch: str | None) -> str:
    if name == DEMO:
        return f"{LOCAL}{demo_folder()}"
    if name.startswith((LOCAL, HUB)) or timm.is_model(name.partition(".")[0]):
        return name
    path = Path(name)
    if path.suffix in checkpoint_files.SUFFIXES:
        # of a folder that says what it holds; a file alone needs --arch
        is_whole = (
            arch is None and path.name == checkpoint_files.SAFETENSORS and (path.parent / "config.json").is_file()
        )
        return f"{LOCAL}{path.parent}" if is_whole else name
    if name and path.is_dir():
        return f"{LOCAL}{name}"
    for mistaken, prefix in _PREFIXES.items():
        if name.lower().replace("-", "_").startswith(mistaken):
            rest = name[len(mistaken) :].rstrip("/")
            return prefix + rest if prefix else _resolved(rest, arch)
    owner, slash, tail = name.lower().partition("/")
    if arch is None and name.lower() in KNOWN:
        return KNOWN[name.lower()]
    if slash and owner in _OWNERS and "/" not in tail and tail:
        ours = _pretrained(tail) if owner == "timm" and arch is None else None
        return ours or f"{HUB}{name.lower() if name.lower() in HUB_IDS else name}"
    return _pretrained(name.lower()) or name


def _pretrained(name: str) -> str | None:
    """Return timm's spelling of a lower-case name with or without a tag, None if timm has no such model."""
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        return None
    spelled = {known.lower(): known for known in timm.list_pretrained(f"{architecture}.*")}
    return spelled.get(name) if tag else architecture


def spelled_out(name: str) -> str:
    """Return a name like ViT-B-16 or vit_b_16 as timm spells it, vit_base_patch16_224; others as they are.

    torchvision and OpenCLIP call their models so; timm has the architecture, but other weights.
    """
    found = re.fullmatch(r"(?:.*/)?vit[-_]([tsblhg])[-_/](\d+)", name.lower())
    return f"vit_{_SIZES[found[1]]}_patch{found[2]}_224" if found else name


def nearest(name: str, candidates: Iterable[str], count: int = 3) -> list[str]:
    """Return the candidates of smallest edit distance to `name`, which may match a part of a candidate."""
    typed = name.lower()[:80]  # no name of a model is longer
    scored = [
        (_distance(typed, other.lower()), not other.startswith("vit_"), len(other), other) for other in candidates
    ]
    return [other for *_, other in sorted(scored)[:count]]


def _distance(pattern: str, text: str) -> int:
    """Return the least number of insertions, deletions and substitutions from `pattern` to a part of `text`.

    Sellers, The theory and computation of evolutionary distances (1980): rows of the table, the first one 0.
    """
    row = [0] * (len(text) + 1)
    for i, letter in enumerate(pattern, 1):
        previous, row = row, [i]
        for j, other in enumerate(text):
            row.append(min(previous[j] + (letter != other), previous[j + 1] + 1, row[j] + 1))
    return min(row)
