"""The models that can be adapted by name, and where the architecture and the weights of a model are found."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import timm
from timm.models import is_model_in_modules
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from upstep_fast import network
from upstep_fast.config.base import DEMO
from upstep_fast.errors import ConfigError, first_line
from upstep_fast.input_files import require_regular
from upstep_fast.model.formats import checkpoint_files, folders
from upstep_fast.model.formats.folders import Source
from upstep_fast.model.names import HUB, HUB_IDS, KNOWN, LOCAL, demo_folder, nearest, spelled_out

MODULES = ("vision_transformer", "deit", "eva")  # of timm, whose models are plain ViTs
PARALLEL = ("*_18x2_*", "*_xp_*", "vit_pwee_*", "vit_dpwee_*")  # architectures with attention and MLP in parallel


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


class _WithoutInit(TorchFunctionMode):
    """Skips operations in place: on the meta device they change nothing, and drawing weights takes most of the time."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if in_place and args and isinstance(args[0], Tensor):
            return args[0]
        return func(*args, **(kwargs or {}))


def without_weights(name: str) -> Any:
    """Return the whole model without its classifier on the meta device, in tens of milliseconds.

    name: of timm, or demo. Its `pretrained_cfg` is that of timm's default weights.
    """
    with _WithoutInit():
        vit = timm.create_model(f"{LOCAL}{demo_folder()}" if name == DEMO else name, num_classes=0, device="meta")
    return vit.eval().requires_grad_(False)


def find(name: str, arch: str | None = None, *, pretrained: bool = True) -> Source:
    """Find the architecture and the weights of the model called `name`, without reading the weights.

    arch: the timm architecture of a checkpoint. pretrained: whether the weights will be read; False checks none of
    timm's and the hub's. Raises ConfigError.
    """
    if name in (LOCAL, HUB):
        raise ConfigError(f"model: {name} names no model; write {name}{'PATH' if name == LOCAL else 'OWNER/NAME'}")
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
    files = [path for path in sorted(folder.iterdir()) if path.suffix in checkpoint_files.SUFFIXES]
    weight_bytes = sum(require_regular(path, "model").stat().st_size for path in files)

    def fetch(file: str) -> Path | None:
        return folder / file if os.path.lexists(folder / file) else None

    if arch is not None:
        return replace(folders.beside_arch(arch, str(folder), fetch), checkpoint=folder)
    source = folders.described(str(folder), fetch)
    if source.checkpoint is None:  # timm will read the weights, older versions by running what is in a pickle
        for path in files:
            if path.name == checkpoint_files.SAFETENSORS:
                checkpoint_files.check_types(path)
            elif path.suffix in checkpoint_files.PICKLES and not (folder / checkpoint_files.SAFETENSORS).exists():
                checkpoint_files.check_pickle(path)
    return replace(source, weight_bytes=weight_bytes)


def _find_in_hub(name: str, arch: str | None, pretrained: bool) -> Source:
    fetch = _hub(name)
    if arch is not None:
        return replace(folders.beside_arch(arch, name, _optional(fetch)), checkpoint=_fetch_weights(fetch))
    fetch("config.json")  # raises the hub's error
    source = folders.described(name, _optional(fetch))
    if source.checkpoint is not None:
        return replace(source, checkpoint=_fetch_weights(fetch))
    if pretrained:
        _check_timm_weights(fetch)
    return source


def _optional(fetch: Callable[[str], Path]) -> Callable[[str], Path | None]:
    """Return `fetch` without its error: not there, or out of reach, which the hub's client does not always know."""

    def fetch_if_there(file: str) -> Path | None:
        try:
            return fetch(file)
        except ConfigError:
            return None

    return fetch_if_there


def _find_file(name: str, arch: str | None) -> Source:
    if arch is None:
        raise ConfigError(
            f"model: {name} is a checkpoint file; name its architecture with --arch, with timm's tag of its training, "
            "which sets mean, std and crop: vit_base_patch16_224.dino, .mae, ... (upstep-fast models lists the "
            "architectures), or give --mean and --std"
        )
    if not Path(name).is_file():
        raise ConfigError(f"model: no file at {name}")
    return Source(arch, checkpoint=Path(name))


def _find_in_timm(name: str, arch: str | None, pretrained: bool) -> Source:
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        raise ConfigError(f"model: unknown model {name!r}; {_cure(name)}")
    if arch is not None and arch != architecture:
        raise ConfigError(f"arch: {arch} is not what {name} names; --arch is for checkpoint files")
    if tag and pretrained and name not in timm.list_pretrained(f"{architecture}.*"):
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*")[:4]) or "none"
        raise ConfigError(f"model: {architecture} has no weights tagged {tag!r}; it has {tags}")
    return Source(architecture, pixels={})


def _hub(name: str) -> Callable[[str], Path]:
    """Return a function that fetches a file of a hub repository, from the cache or the network."""
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.removeprefix(HUB).partition("@")

    def fetch(file: str) -> Path:
        try:
            with network.limited():
                return Path(hf_hub_download(repository, file, revision=revision or None))
        except Exception as error:  # the hub's own kinds, the network's, the file system's
            raise ConfigError(f"model: cannot load {name}: {first_line(error)[:300]}; {weights_cure(name)}") from error

    return fetch


def _fetch_weights(fetch: Callable[[str], Path]) -> Path:
    """Fetch the weights of a hub repository: one safetensors file, an index with its shards, or a pickle.

    Returns the path for `checkpoint_files.read`: a file, or the folder of the index.
    """
    failed = None
    for name in (
        checkpoint_files.SAFETENSORS,
        checkpoint_files.INDEX,
        checkpoint_files.PICKLE,
        *checkpoint_files.OPEN_CLIP,
    ):
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


def _check_timm_weights(fetch: Callable[[str], Path]) -> None:
    """Refuse weights that timm would read although they are no floating-point numbers, or a pickle that holds code."""
    try:
        path = _fetch_weights(fetch)
    except ConfigError:  # timm looks under other names too, and reports what it misses
        return
    if path.suffix in checkpoint_files.PICKLES:
        checkpoint_files.check_pickle(path)
    elif path.is_file():
        checkpoint_files.check_types(path)


def check_arch(arch: str, name: str) -> None:
    """Refuse other model families by name, before any weights are fetched. Raises ConfigError."""
    stem = arch.partition(".")[0]
    if not timm.is_model(stem):
        raise ConfigError(f"model: {name} has the unknown architecture {arch!r}; {nearest_names(arch)}")
    if not is_model_in_modules(stem, MODULES):
        family = timm.models.model_entrypoint(stem).__annotations__.get("return")
        kind = getattr(family, "__name__", str(family))
        if kind == "VisionTransformer":  # behind another network
            kind += f" of timm's {timm.models.model_entrypoint(stem).__module__.rpartition('.')[2]}"
        raise ConfigError(f"model: {name} is a {kind}, not a plain Vision Transformer; {nearest_names(arch)}")
    if any(fnmatch(stem, pattern) for pattern in PARALLEL):
        raise ConfigError(
            f"model: {name} has attention and MLP in parallel, which is not supported; {nearest_names(arch)}"
        )


def nearest_names(name: str) -> str:
    """Return the cure for a wrong or refused name: the architectures nearest to it, without itself."""
    stem = name.removeprefix(LOCAL).removeprefix(HUB).split("/")[-1].split(".")[0]
    return (
        f"near names: {', '.join(nearest(stem, [known for known, _ in names() if known != stem]))} (or local-dir:PATH)"
    )


def _cure(name: str) -> str:
    """Return the cure for a name that is none of timm's, no folder and no checkpoint file."""
    if Path(name).is_file():
        return f"the endings of checkpoint files are {', '.join(sorted(checkpoint_files.SUFFIXES))}"
    near = ", ".join(nearest(spelled_out(name), [*(known for known, _ in names()), *KNOWN, *HUB_IDS]))
    if "/" in name:
        return (
            f"there is no such folder; for a repository of the hub write hf-hub:{name.strip('/')}; near names: {near}"
        )
    return f"near names: {near} (or local-dir:PATH)"


def weights_cure(name: str) -> str:
    """Return the cure for weights that cannot be loaded."""
    if name.startswith(LOCAL):
        return "check that model.safetensors is complete and belongs to config.json"
    if Path(name).suffix in checkpoint_files.SUFFIXES:
        return "check --arch, --img-size and --in-chans"
    return "check the network or the cache (HF_HOME), or use local-dir:PATH with weights on disk"
