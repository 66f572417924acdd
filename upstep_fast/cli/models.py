"""`upstep-fast models`: the models that can be adapted, with their size and license, as timm describes them."""

from __future__ import annotations

from fnmatch import fnmatch

from upstep_fast.config.base import DEMO
from upstep_fast.config.tools import ModelsConfig
from upstep_fast.engine.fold import unsupported_reason
from upstep_fast.errors import ConfigError
from upstep_fast.model import registry
from upstep_fast.runtime.progress import track

HEADER = ("name", "parameters", "input", "patch", "width", "kind", "license", "pretraining", "runs on")
_COLUMNS = "{:<{width}} {:>10} {:>9} {:>5} {:>5}  {:<6}  {:<17}  {:<27} {}"


def run(config: ModelsConfig) -> None:
    """Print a line for each model that matches, as soon as it is known. Raises ConfigError if none matches."""
    with track("models"):
        found = registry.names(config.pattern)
    if fnmatch(DEMO, config.pattern):
        found = [(DEMO, "plain"), *found]
    if not found:
        near = registry.nearest_names(config.pattern)
        raise ConfigError(f"pattern: no model that can be adapted matches {config.pattern!r}; {near}")
    width = max(len(name) for name, _ in found)
    print(_COLUMNS.format(*HEADER, width=width), flush=True)
    for name, kind in found:
        with track(f"models: {name}"):
            cells = _cells(name, kind)
        print(_COLUMNS.format(name, *cells, width=width), flush=True)


def _cells(name: str, kind: str) -> tuple[str, ...]:
    vit = registry.without_weights(name)
    stated, (height, side), patch = vit.pretrained_cfg, vit.patch_embed.img_size, vit.patch_embed.patch_size[0]
    parameters = sum(parameter.numel() for parameter in vit.parameters())
    reason = unsupported_reason(vit)
    return (
        f"{parameters / 1e6:,.1f} M",
        f"{height} x {side}",
        str(patch),
        str(vit.num_features),
        kind,
        stated.get("license") or "not stated",
        stated.get("tag") or "none",
        "engine" if reason is None else f"compiled ({reason})",
    )
