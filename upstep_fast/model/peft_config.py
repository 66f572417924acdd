"""adapter_config.json of PEFT's LoRA: its options, each read as PEFT 0.21 reads it or refused by name.

    y = W x + b + s B A x          s = alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023)

Options that change anything else about this formula when the adapter is loaded are in `REFUSED`, those that matter only
in training in `WITHOUT_EFFECT`. `bench/reliability/peft_options.py` makes an adapter for every option and compares
with PEFT; a test fails if a version of PEFT has an option that none of the tables names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upstep_fast import input_files
from upstep_fast.errors import ConfigError, printable
from upstep_fast.model import peft_patterns

CONFIG = "adapter_config.json"
ALL_LINEAR = "all-linear"
NO_MODULE = "dummy-target-modules"  # PEFT's name for an adapter with modules_to_save alone
READ = (
    *("peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters"),
    *("modules_to_save", "init_lora_weights"),
)
# fan_in_fan_out: PEFT ignores it for a Linear. X_config: used by the initialization X alone.
WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "lora_dropout", "fan_in_fan_out"),
    *("megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying"),
    *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
)
# by option: its values that change nothing
REFUSED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    **dict.fromkeys(("use_dora", "lora_bias", "use_qalora"), (False, None)),
    **dict.fromkeys(
        (
            *("megatron_config", "velora_config", "alora_invocation_tokens"),
            *("monteclora_config", "use_bdlora", "arrow_config", "kasa_config"),
        ),
        (None,),
    ),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, {}),  # PEFT itself fails on []
}
# PEFT starts from these and leaves the base model as it is
PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# PEFT changes the base model when it loads an adapter that started so
CHANGED_BASE = ("pissa", "olora")
_MERGE = "merge the adapter with PEFT (merge_and_unload) and use the merged model"
_CONVERT = (
    "PEFT changes the base model when it loads such an adapter, and not always to the same values; save it with "
    "path_initial_model_for_weight_conversion"
)


@dataclass(frozen=True)
class AdapterConfig:
    """The options of a LoRA adapter that decide about the adapted model."""

    base_model: str | None
    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    targets: tuple[str, ...] | str | None  # names, or one regular expression
    excluded: tuple[str, ...] | str | None
    layers: tuple[int, ...] | None
    layers_pattern: tuple[str, ...]
    parameters: tuple[str, ...]
    modules_to_save: tuple[str, ...]
    init: bool | str | None

    def is_saved(self, parameter: str) -> bool:
        """Return whether PEFT saves a parameter with modules_to_save: those of modules whose names end so."""
        return any(f"{module}." in f"model.{parameter}" for module in self.modules_to_save)

    def is_target(self, name: str) -> bool:
        """Return whether PEFT puts an adapter on the module, as its `check_target_module_exists` decides."""
        if self.excluded is not None and peft_patterns.matches(self.excluded, name):
            return False
        if peft_patterns.is_inside(name, self.modules_to_save):
            return False
        if isinstance(self.targets, str):
            is_target = self.targets.lower() == ALL_LINEAR or peft_patterns.matches(self.targets, name)
        else:
            is_target = self._is_listed(name, self.targets or ())
        return is_target or self.is_parameter(name)

    def is_parameter(self, name: str) -> bool:
        """Return whether the adapter is on the module's weight as a parameter (target_parameters)."""
        return peft_patterns.has_suffix(f"{name}.weight", self.parameters)

    def _is_listed(self, name: str, targets: tuple[str, ...]) -> bool:
        if name in targets or self.layers is None:  # a full name is a target in every layer
            return peft_patterns.matches(targets, name)
        return peft_patterns.matches(targets, name) and (
            peft_patterns.layer_index(name, self.layers_pattern) in self.layers
        )

    def rank(self, name: str) -> int:
        """Return the rank of a module's adapter."""
        return peft_patterns.first_match(self.rank_pattern, self._key(name), self.r)

    def scale(self, name: str) -> float:
        """Return s of a module."""
        rank = self.rank(name)
        alpha = peft_patterns.first_match(self.alpha_pattern, self._key(name), self.alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def _key(self, name: str) -> str:
        return f"{name}.weight" if self.is_parameter(name) else name


def read(folder: Path) -> AdapterConfig:
    """Return the options in `folder`/adapter_config.json.

    Raises ConfigError if it is no LoRA configuration of PEFT, or has a value or option that is not read.
    """
    path = folder / CONFIG
    values = input_files.read_json(path, "adapter")
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise ConfigError(f"adapter: {path} is not a LoRA configuration of PEFT")
    _refuse_options(values, path)
    take = _Fields(values, path)
    config = AdapterConfig(
        base_model=take("base_model_name_or_path", _text, "a name", default=None),
        r=take("r", _rank, "a whole number of at least 1", default=8),
        alpha=take("lora_alpha", _number, "a number", default=8),
        rank_pattern=take("rank_pattern", _each(_rank), "ranks by name", default={}),
        alpha_pattern=take("alpha_pattern", _each(_number), "numbers by name", default={}),
        use_rslora=bool(take("use_rslora", _bool, "true or false", default=False)),
        targets=take("target_modules", _names_or_pattern, "names or a pattern", default=None),
        excluded=take("exclude_modules", _names_or_pattern, "names or a pattern", default=None),
        layers=take("layers_to_transform", _layers, "whole numbers", default=None) or None,
        layers_pattern=take("layers_pattern", _one_or_more_names, "names", default=()),
        parameters=take("target_parameters", _names, "a list of names", default=()),
        modules_to_save=take("modules_to_save", _names, "a list of names", default=()),
        init=values.get("init_lora_weights", True),
    )
    _check_patterns(config, path)
    return config


def _refuse_options(values: Mapping[str, Any], path: Path) -> None:
    for name, value in values.items():
        if name in READ or name in WITHOUT_EFFECT:
            continue
        if name in REFUSED:
            if not any(value is harmless or value == harmless for harmless in REFUSED[name]):
                raise ConfigError(f"adapter: {path} has {name} = {_short(value)}, which is not read; {_MERGE}")
        elif value not in (None, False, 0, "", [], {}):
            raise ConfigError(
                f"adapter: {path} has {printable(name, 60)} = {_short(value)}, which this version does not know; "
                f"{_MERGE}"
            )
    init = values.get("init_lora_weights", True)
    if isinstance(init, (bool, str, type(None))) and (init in PLAIN_INITS or str(init).lower() in CHANGED_BASE):
        return
    raise ConfigError(f"adapter: {path} has init_lora_weights = {_short(init)}, which is not read: {_CONVERT}")


def _check_patterns(config: AdapterConfig, path: Path) -> None:
    """Raise ConfigError for regular expressions that are none or may take long."""
    patterns = [*config.rank_pattern, *config.alpha_pattern, *config.modules_to_save, *config.layers_pattern]
    patterns += [pattern for pattern in (config.targets, config.excluded) if isinstance(pattern, str)]
    peft_patterns.bounded(patterns, f"adapter: {path}")


@dataclass(frozen=True)
class _Fields:
    """The values of a configuration by name, checked one by one."""

    values: Mapping[str, Any]
    path: Path

    def __call__(self, name: str, parse: Callable[[Any], Any], kind: str, *, default: Any) -> Any:
        """Return the parsed value; null stands for an empty default. `parse` raises TypeError or ValueError."""
        value = self.values.get(name)
        if name not in self.values or (value is None and not default):
            return default
        try:
            return parse(value)
        except (TypeError, ValueError, OverflowError):
            raise ConfigError(f"adapter: {self.path} has {name} = {_short(value)}, must be {kind}") from None


def _short(value: Any) -> str:
    return printable(repr(value), 80)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    if not math.isfinite(float(value)):
        raise ValueError
    return value


def _rank(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    if value < 1:
        raise ValueError
    return value


def _each(parse: Callable[[Any], Any]) -> Callable[[Any], dict[str, Any]]:
    def parse_all(values: Any) -> dict[str, Any]:
        if not isinstance(values, dict):
            raise TypeError
        return {name: parse(value) for name, value in values.items()}

    return parse_all


def _names(values: Any) -> tuple[str, ...]:
    if not isinstance(values, list):
        raise TypeError
    return tuple(_text(value) for value in values)


def _names_or_pattern(value: Any) -> tuple[str, ...] | str:
    return value if isinstance(value, str) else _names(value)


def _one_or_more_names(value: Any) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else _names(value)


def _layers(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise TypeError
    return tuple(values)
