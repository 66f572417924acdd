"""The folder of a run or of an adapter, in place of the flags of the model that the adapter was trained on.

An adapter on the hub, hf-hub:OWNER/NAME, is fetched into the hub's cache and is a folder from then on.

The model's name is base_model_name_or_path of adapter_config.json. The other flags come from the record in the
adapter's weights, else, for adapters of earlier versions, from the run's config.toml beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from upstep_fast import input_files
from upstep_fast.config.adapt import AdaptConfig, is_upstep
from upstep_fast.config.base import DEMO, BackboneConfig
from upstep_fast.config.flat import dashed, paths
from upstep_fast.config.reading import READING, merged
from upstep_fast.config.value_types import check_types
from upstep_fast.errors import ConfigError, first_line, printable

CONFIG, WEIGHTS, RUN_CONFIG = "adapter_config.json", "adapter_model.safetensors", "config.toml"
REFUSED = "adapter-refused"  # of a run that made the features worse
MODEL_RECORD = "upstep_fast.model"  # metadata of WEIGHTS, which PEFT ignores
_BARE = "bare_parameters.safetensors"
_HUB = ("hf-hub:", "hf_hub:", "hf:", "https://huggingface.co/")
_OF_A_RUN = ("tune", "from_")  # LoRA flags that tell nothing about the adapter
_FIXED = ("arch", "in_chans", "mean", "std")  # of other values than the training's, features have no meaning


def fetched(path: str | Path, field: str = "adapter") -> Path:
    """Return `path`, or, for hf-hub:OWNER/NAME or hf-hub:OWNER/NAME@REVISION, the folder it is fetched to.

    Raises ConfigError if it cannot be fetched.
    """
    if (name := _hub_name(path)) is None:
        return Path(path)
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    from upstep_fast import network

    repository, _, revision = name.partition("@")
    try:
        with network.limited():
            folder = Path(hf_hub_download(repository, CONFIG, revision=revision or None)).parent
            for file in (WEIGHTS, _BARE):
                with contextlib.suppress(EntryNotFoundError):  # the reader of the folder says what is missing
                    hf_hub_download(repository, file, revision=folder.name)
    except Exception as error:  # the hub's own kinds, the network's, the file system's
        reason = printable(first_line(error), 300)
        raise ConfigError(
            f"{field}: cannot fetch {path}: {reason}; check the name and the network, or give a folder"
        ) from error
    return folder


def is_on_hub(path: str | Path) -> bool:
    """Return whether `path` is hf-hub:OWNER/NAME of an adapter; False where that cannot be found out."""
    if (name := _hub_name(path)) is None:
        return False
    from huggingface_hub import hf_hub_download

    from upstep_fast import network

    repository, _, revision = name.partition("@")
    with contextlib.suppress(Exception), network.limited():
        return bool(hf_hub_download(repository, CONFIG, revision=revision or None))
    return False


def _hub_name(path: str | Path) -> str | None:
    prefix = next((prefix for prefix in _HUB if str(path).startswith(prefix)), None)
    return None if prefix is None else str(path).removeprefix(prefix).rstrip("/")


def adapter_folder(path: str | Path, field: str = "adapter") -> Path:
    """Return the folder of an adapter: `path` itself, or adapter/ in the folder of a run. Raises ConfigError."""
    folder = Path(path)
    for candidate in (folder, folder / "adapter"):
        if os.path.lexists(candidate / CONFIG):
            return candidate
    if not folder.is_dir():
        raise ConfigError(f"{field}: no folder at {folder}; give the --out of adapt, or its adapter/")
    if (folder / "model" / "trained.safetensors").exists():
        raise ConfigError(f"{field}: {folder} is a run of finetune; upstep_fast.load_finetuned reads its model/")
    if is_refused(folder):
        raise ConfigError(
            f"{field}: {folder} holds a run whose adapter was refused, as it made the features worse; use the base "
            f"model, or {folder / REFUSED} all the same"
        )
    if os.path.lexists(folder / RUN_CONFIG):
        raise ConfigError(f"{field}: {folder} holds a run without an adapter; complete it with adapt --resume")
    raise ConfigError(f"{field}: {folder} holds no {CONFIG}; give the folder OUT/adapter, or OUT of adapt")


def run_folder(path: str | Path) -> Path:
    """Return the folder of a run: that of its adapter's folder, else `path` itself."""
    folder = Path(path)
    is_adapter = os.path.lexists(folder / CONFIG) and not os.path.lexists(folder / RUN_CONFIG)
    return folder.parent if is_adapter and os.path.lexists(folder.absolute().parent / RUN_CONFIG) else folder


def is_refused(path: object) -> bool:
    """Return whether `path` is the folder of a run whose adapter was refused: the base model is kept."""
    return _holds(path, RUN_CONFIG, f"{REFUSED}/{CONFIG}") and not holds_adapter(path)


def is_run(path: object) -> bool:
    """Return whether `path` is the folder of a run, with or without an adapter, and of no model."""
    return _holds(path, RUN_CONFIG) and not _holds(path, "config.json")


def holds_adapter(path: object) -> bool:
    """Return whether `path` is the folder of an adapter or of a run with one."""
    return _holds(path, CONFIG) or _holds(path, f"adapter/{CONFIG}")


def _holds(path: object, *names: str) -> bool:
    is_path = isinstance(path, (str, Path)) and "\0" not in str(path)
    return is_path and all(os.path.lexists(Path(str(path), name)) for name in names)


def with_adapter(flags: Mapping[str, Any], config_class: type) -> dict[str, Any]:
    """Return the flags of a command with --adapter or --from, completed from the folder; those of others as they are.

    The folder of a run or adapter may be given as the model, too; DEMO is always the included model.
    """
    flags = dict(flags)
    name = next((flag for flag in ("adapter", "from_") if flag in paths(config_class)), None)
    if name is None:
        return flags
    model = flags.get("model")
    if flags.get(name) is None and model != DEMO and (holds_adapter(model) or is_run(model)):
        flags[name] = flags.pop("model")
    if not isinstance(flags.get(name), (str, Path)):
        return flags
    keeps_base = "form" in paths(config_class)  # of what writes features
    flags = complete(flags, keeps_base) if name == "adapter" else _complete_start(flags)
    return _with_reading(flags, name) if READING[0] in paths(config_class) else flags


def _with_reading(flags: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return `flags` with the reading of the run whose folder the flag `name` gives, where they have none."""
    if not (folder := Path(flags[name])).exists():
        return dict(flags)
    others = {key: value for key, value in flags.items() if key not in READING}
    return others | merged(reading_flags(folder / REFUSED if is_refused(folder) else folder), flags)


def reading_flags(folder: Path) -> dict[str, Any]:
    """Return how the images of an adapter's training were read, by flag of READING, as far as it tells.

    Earlier versions recorded none: their images were read by the declared range, full. Raises ConfigError.
    """
    recorded = _metadata(folder)
    found = {name: recorded[name] for name in READING if recorded.get(name) is not None}
    is_known = bool(recorded)
    if "intensity" not in found:
        values = input_files.read_json(folder / CONFIG, "adapter")
        name = values.get("base_model_name_or_path") if isinstance(values, dict) else None
        for run in list(folder.absolute().parents)[:2]:
            of_run = _of_run(run / RUN_CONFIG, name, ("model", "data"))
            is_known = is_known or bool(of_run)
            found = {key: of_run[key] for key in READING if key in of_run} | found
    found = ({"intensity": "full"} if is_known else {}) | found
    check_types(found, AdaptConfig, f"adapter: {folder}")
    return found


def complete(flags: Mapping[str, Any], keeps_base: bool = False) -> dict[str, Any]:
    """Return `flags` with adapter/ of a run as the adapter, and with the flags of its model where they have none.

    keeps_base: the folder of a run whose adapter was refused stays as it is; its flags are those of the base model.
    Raises ConfigError if the folder holds no adapter or names no model, and, without any_base, if one of --arch,
    --in-chans, --mean and --std contradicts the training. --img-size and --model override: another size is a matter
    of choice, and another model is refused when it is loaded (model/adapter_base.py).
    """
    flags = {**flags, "adapter": str(fetched(flags["adapter"]))}
    model = flags.get("model")
    if model is not None and not Path(flags["adapter"]).exists():
        return dict(flags)  # refused when it is read: a command can be checked where its files are not
    refused = keeps_base and is_refused(flags["adapter"])
    folder = Path(flags["adapter"], REFUSED) if refused else adapter_folder(flags["adapter"])
    flags = {name: value for name, value in flags.items() if value is not None or name not in paths(BackboneConfig)}
    recorded = model_flags(folder)
    is_other = model is not None and str(model) != recorded.get("model")
    if model is None:
        _require_model(recorded.get("model"), folder)
    if not flags.get("any_base"):
        _refuse_contradiction(flags, recorded, folder)
    elif is_other or "in_chans" in flags:
        recorded = {"model": recorded.get("model")}
    if is_other:  # the same weights in another place, perhaps
        recorded = {name: value for name, value in recorded.items() if name not in ("arch", "min_matched")}
    return recorded | flags | {"adapter": str(folder.parent if refused else folder)}


def _complete_start(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flags of adapt --from: model, LoRA and objective are those of the run unless they are given.

    Raises ConfigError if the folder holds no adapter or names no model.
    """
    source = fetched(flags["from_"], "from")
    if flags.get("resume") and "model" in flags and not source.exists():
        return dict(flags)  # a run that has begun needs it no longer
    folder = adapter_folder(source, "from")
    recorded = model_flags(folder, ("model", "lora"), ("objective",) if is_upstep(flags) else ())
    if flags.get("model") is None:
        _require_model(recorded.get("model"), folder)
        flags = {name: value for name, value in flags.items() if name != "model"}
    elif str(flags["model"]) != recorded.get("model"):
        recorded = {name: value for name, value in recorded.items() if name not in ("arch", "min_matched")}
    if "in_chans" in flags or flags.get("mean_std") == "auto":
        recorded = {name: value for name, value in recorded.items() if name not in ("in_chans", "mean", "std")}
    return {**recorded, **flags, "from_": str(folder)}


def model_flags(folder: Path, groups: Sequence[str] = ("model",), flags: Sequence[str] = ()) -> dict[str, Any]:
    """Return {flag: value} of the model that the adapter in `folder` was trained on, as far as it tells.

    groups, flags: of the run's configuration; all but the model's come from its config.toml. Raises ConfigError.
    """
    values = input_files.read_json(folder / CONFIG, "adapter")
    name = values.get("base_model_name_or_path") if isinstance(values, dict) else None
    found: dict[str, Any] = {} if name is None else {"model": name}
    for run in list(folder.absolute().parents)[:2]:
        found = _of_run(run / RUN_CONFIG, name, groups, flags) | found
    found |= {
        flag: value for flag, value in _metadata(folder).items() if flag in paths(BackboneConfig).keys() - {"model"}
    }
    check_types(found, AdaptConfig, f"adapter: {folder}")
    return {flag: tuple(value) if isinstance(value, list) else value for flag, value in found.items()}


def _of_run(path: Path, model: object, groups: Sequence[str], flags: Sequence[str] = ()) -> dict[str, Any]:
    """Return `flags` and those of `groups` in a run's config.toml; {} if it is not the run that trained on `model`."""
    if model is None or not path.is_file():
        return {}
    values, found = input_files.read_toml(path, "config"), dict[str, Any]()
    for flag, (group, *field) in paths(AdaptConfig).items():
        if (group not in groups and flag not in flags) or flag in _OF_A_RUN:
            continue
        table = values.get(group)
        if isinstance(table, dict) and field[0] in table:
            found[flag] = table[field[0]]
        elif flag in values and not isinstance(values[flag], dict):  # earlier versions wrote no tables
            found[flag] = values[flag]
    if "objective" in flags and is_upstep(values):
        found.setdefault("objective", "clustering")  # the only one of earlier versions
    return found if found.get("model") == model else {}


def _metadata(folder: Path) -> dict[str, Any]:
    """Return the record in the metadata of the adapter's weights; {} where there is none."""
    if not os.path.lexists(folder / WEIGHTS):
        return {}
    input_files.require_regular(folder / WEIGHTS, "adapter")
    try:
        with safe_open(folder / WEIGHTS, framework="np") as file:
            values = json.loads((file.metadata() or {}).get(MODEL_RECORD, "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError):
        return {}  # the reader of the tensors refuses a damaged file
    return values if isinstance(values, dict) else {}


def _refuse_contradiction(flags: Mapping[str, Any], recorded: Mapping[str, Any], folder: Path) -> None:
    for name in _FIXED:
        if name in flags and name in recorded and not _equal(flags[name], recorded[name]):
            values = (of[name] if isinstance(of[name], (list, tuple)) else [of[name]] for of in (flags, recorded))
            now, then = (printable(" ".join(map(str, value)), 100) for value in values)
            raise ConfigError(
                f"{name}: got {now}, but the adapter in {folder} was trained with {then}; leave out --{dashed(name)}, "
                "or --any-base (any_base=True in Python) uses the adapter all the same"
            )


def _equal(now: Any, then: Any) -> bool:
    """Compare two values of a flag; one number stands for all channels."""
    if isinstance(now, (list, tuple)) and isinstance(then, (list, tuple)):
        length = max(len(now), len(then))
        now, then = (tuple(value) * length if len(value) == 1 else tuple(value) for value in (now, then))
    return bool(now == then)


def _require_model(name: object, folder: Path) -> None:
    if not isinstance(name, str) or not name:
        raise ConfigError(f"model: {folder} does not name its base model; give it with --model")
    path = Path(name.removeprefix("local-dir:"))
    if name.startswith("local-dir:") and not path.is_dir():
        raise ConfigError(
            f"model: {folder} was trained on {printable(name, 200)}, and there is no such folder here; "
            "give its place with --model"
        )
