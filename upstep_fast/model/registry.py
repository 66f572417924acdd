"""The models that can be adapted by name, and where the architecture and the weights of a model are found."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
from timm.models import is_model_in_modules
from torch import nn

from upstep_fast.errors import ConfigError, first_line
from upstep_fast.model.formats import checkpoint_files, hf_config

LOCAL, HUB = "local-dir:", "hf-hub:"
MODULES = ("vision_transformer", "deit", "eva")  # of timm, whose models are plain ViTs
PARALLEL = ("*_18x2_*", "*_xp_*", "vit_pwee_*", "vit_dpwee_*")  # architectures with attention and MLP in parallel


@dataclass(frozen=True)
class Source:
    """The architecture of a model and the place of its weights."""

    arch: str  # timm.create_model(arch, **model_args)
    model_args: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None  # a file or folder for checkpoint_files.fill; None: timm loads the weights itself
    eps: float | None = None  # of every LayerNorm, where a transformers configuration sets it
    pixels: dict[str, Any] = field(default_factory=dict)  # mean and std, where transformers' preprocessor sets them


def names(pattern: str = "*") -> list[tuple[str, str]]:
    """List the timm architectures that can be adapted, as (name, "rotary" or "plain").

    pattern: a glob, or a part of a name.
    """
    glob = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    return [
        (name, "rotary" if is_model_in_modules(name, "eva") else "plain")
        for name in timm.list_models(glob)
        if is_model_in_modules(name, MODULES) and not any(fnmatch(name, p) for p in (*PARALLEL, "test_*"))
    ]


def blueprint(arch: str) -> nn.Module:
    """Build one block of the architecture on the meta device: enough to see which engine can run it."""
    try:
        vit = timm.create_model(arch, depth=1, device="meta")
    except AssertionError:  # some list their heads block by block
        vit = timm.create_model(arch, device="meta")
    return vit.eval().requires_grad_(False)


def find(name: str, arch: str | None = None, *, pretrained: bool = True) -> Source:
    """Find the architecture and the weights of the model called `name`, without reading the weights.

    arch: the timm architecture of a checkpoint. pretrained: whether the weights will be read; False checks none of
    timm's and the hub's. Raises ConfigError.
    """
    if name.startswith(LOCAL):
        return _find_folder(Path(name.removeprefix(LOCAL)), arch)
    if name.startswith(HUB):
        return _find_in_hub(name, arch, pretrained)
    if Path(name).suffix in checkpoint_files.SUFFIXES:
        return _find_file(name, arch)
    return _find_in_timm(name, arch, pretrained)


def _find_folder(folder: Path, arch: str | None) -> Source:
    if not folder.is_dir():
        raise ConfigError(f"model: no folder at {folder}; local-dir: wants config.json and model.safetensors in it")
    if arch is not None:
        return Source(arch, checkpoint=folder)
    if not any(folder.glob("*.safetensors")):
        for path in folder.iterdir():  # timm will read it, older versions by running what is in it
            if path.suffix in checkpoint_files.PICKLES:
                checkpoint_files.check_pickle(path)
    return _from_config(_read_json(folder / "config.json"), folder, lambda file: folder / file)


def _find_in_hub(name: str, arch: str | None, pretrained: bool) -> Source:
    fetch = _hub(name)
    if arch is not None:
        return Source(arch, checkpoint=_fetch_weights(fetch))
    source = _from_config(_read_json(fetch("config.json")), name, fetch)
    if source.checkpoint is None and pretrained:
        _check_pickle(fetch)
    return source


def _find_file(name: str, arch: str | None) -> Source:
    if arch is None:
        raise ConfigError(
            f"model: {name} is a checkpoint file; name its architecture with --arch, e.g. --arch "
            "vit_base_patch16_224 (upstep-fast models lists them)"
        )
    if not Path(name).is_file():
        raise ConfigError(f"model: no file at {name}")
    return Source(arch, checkpoint=Path(name))


def _find_in_timm(name: str, arch: str | None, pretrained: bool) -> Source:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ConfigError(f"model: unknown model {name!r}; {nearest_names(name)}")
    if arch is not None and arch != architecture:
        raise ConfigError(f"arch: {arch} is not what {name} names; --arch is for checkpoint files")
    if tag and pretrained and name not in timm.list_pretrained(f"{architecture}.*"):
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*")[:4]) or "none"
        raise ConfigError(f"model: {architecture} has no weights tagged {tag!r}; it has {tags}")
    return Source(architecture)


def _from_config(config: dict[str, Any], where: Path | str, fetch: Callable[[str], Path]) -> Source:
    if isinstance(config.get("architecture"), str):
        model_args = config.get("model_args") or {}
        if not isinstance(model_args, dict):
            raise ConfigError(f"model: {where}: model_args in config.json is no object; save the model again")
        return Source(config["architecture"].partition(".")[0], model_args)
    arch, model_args = hf_config.timm_args(config, str(where))
    try:
        preprocessor = _read_json(fetch("preprocessor_config.json"))
    except ConfigError:  # not every repository has one
        preprocessor = {}
    pixels = {name: preprocessor[f"image_{name}"] for name in ("mean", "std") if f"image_{name}" in preprocessor}
    checkpoint = where if isinstance(where, Path) else _fetch_weights(fetch)
    return Source(arch, model_args, checkpoint, config.get("layer_norm_eps"), pixels)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"model: no readable {path}; save the model with timm's save_for_hf, or add --arch NAME"
        ) from error
    except ValueError as error:
        raise ConfigError(f"model: {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"model: {path} holds no object")
    return content


def _hub(name: str) -> Callable[[str], Path]:
    """Return a function that fetches a file of a hub repository, from the cache or the network."""
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.removeprefix(HUB).partition("@")

    def fetch(file: str) -> Path:
        try:
            return Path(hf_hub_download(repository, file, revision=revision or None))
        except Exception as error:  # the hub's own kinds, the network's, the file system's
            raise ConfigError(f"model: cannot load {name}: {first_line(error)[:300]}; {weights_cure(name)}") from error

    return fetch


def _fetch_weights(fetch: Callable[[str], Path]) -> Path:
    """Fetch the weights of a hub repository: one safetensors file, an index with its shards, or a pickle.

    Returns the path for `checkpoint_files.read`: a file, or the folder of the index.
    """
    failed = None
    for name in (checkpoint_files.SAFETENSORS, checkpoint_files.INDEX, checkpoint_files.PICKLE):
        try:
            path = fetch(name)
        except ConfigError as error:  # not there, or out of reach: which of them the hub's client does not always know
            failed = failed or error
            continue
        if name != checkpoint_files.INDEX:
            return path
        for shard in checkpoint_files.shards(path):
            fetch(shard)
        return path.parent
    assert failed is not None
    raise failed


def _check_pickle(fetch: Callable[[str], Path]) -> None:
    """Refuse a repository of timm whose only weights are a pickle that holds code; timm would read it."""
    try:
        path = _fetch_weights(fetch)
    except ConfigError:  # timm looks under other names too, and reports what it misses
        return
    if path.suffix in checkpoint_files.PICKLES:
        checkpoint_files.check_pickle(path)


def check_arch(arch: str, name: str) -> None:
    """Refuse other model families by name, before any weights are fetched. Raises ConfigError."""
    stem = arch.partition(".")[0]
    if not timm.is_model(stem):
        raise ConfigError(f"model: {name} has the unknown architecture {arch!r}; {nearest_names(arch)}")
    if not is_model_in_modules(stem, MODULES):
        family = timm.models.model_entrypoint(stem).__annotations__.get("return")
        kind = getattr(family, "__name__", str(family))
        raise ConfigError(f"model: {name} is a {kind}, not a plain Vision Transformer; {nearest_names(arch)}")
    if any(fnmatch(stem, pattern) for pattern in PARALLEL):
        raise ConfigError(
            f"model: {name} has attention and MLP in parallel, which is not supported; {nearest_names(arch)}"
        )


def nearest_names(name: str) -> str:
    """Return the cure for a wrong name: the names nearest to it."""
    stem = name.removeprefix(LOCAL).removeprefix(HUB).split("/")[-1].split(".")[0].lower()
    known = timm.list_models(["vit_*", "deit_*", "deit3_*"])
    close = difflib.get_close_matches(stem, known, n=3, cutoff=0.4) or ["vit_base_patch16_224"]
    return f"near names: {', '.join(close)} (or local-dir:PATH)"


def weights_cure(name: str) -> str:
    """Return the cure for weights that cannot be loaded."""
    if name.startswith(LOCAL):
        return "check that model.safetensors is complete and belongs to config.json"
    if Path(name).suffix in checkpoint_files.SUFFIXES:
        return "check --arch, --img-size and --in-chans"
    return "check the network or the cache (HF_HOME), or use local-dir:PATH with weights on disk"
