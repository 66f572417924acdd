"""The arguments of `upstep_fast.load` as the embed command's configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from upstep_fast.config.adapter_folder import (
    RUN_CONFIG,
    adapter_folder,
    fetched,
    holds_adapter,
    is_on_hub,
    is_refused,
    run_folder,
)
from upstep_fast.config.base import reading_of
from upstep_fast.config.evaluate import EmbedConfig
from upstep_fast.config.files import from_options
from upstep_fast.errors import ConfigError
from upstep_fast.evaluation import whitening
from upstep_fast.evaluation.embeddings import read_whitening, with_run
from upstep_fast.evaluation.whitening import Whitening
from upstep_fast.model.backbone import Backbone


def configured(
    source: str | Path, model: str | Path | None = None, whiten: bool | str | Path | None = None, **options: Any
) -> tuple[EmbedConfig, Path | None]:
    """Return the arguments of `load` as the embed command's configuration, and the run's whitening (`with_run`)."""
    options |= _places(source, model)
    options |= {"whitening": _whitening_file(source, whiten)} if whiten else {}
    options |= {"form": "plain"} if whiten is False else {}
    return with_run(from_options(EmbedConfig, options | {"data": (), "out": ""}, "load"))


def _places(source: str | Path, model: str | Path | None) -> dict[str, Any]:
    """Return the flags model and adapter."""
    if not isinstance(source, (str, Path)):
        raise ConfigError(f"load: got a {type(source).__name__}, must be a folder of adapt or the name of a model")
    is_adapter = is_on_hub(source)
    if model is None and not is_adapter and not holds_adapter(source) and not (Path(source) / RUN_CONFIG).is_file():
        return {"model": source}
    if is_adapter:
        folder = fetched(source, "load")
    else:
        folder = Path(source) if is_refused(source) else adapter_folder(source, "load")
    return {"adapter": folder} | ({} if model is None else {"model": model})


def _whitening_file(source: str | Path, whiten: bool | str | Path) -> str:
    if whiten is not True:
        return str(whiten)
    if not (holds_adapter(source) or is_refused(source)):
        raise ConfigError(f"whiten: {source} is no run's folder; give a file of embed --fit-whitening")
    file = run_folder(source) / whitening.FILE
    if not file.exists():
        raise ConfigError(f"whiten: there is no {file}; write it with embed --fit-whitening, or use m.fit_whitening")
    return str(file)


def whitening_of(config: EmbedConfig, own: Path | None, models: dict[str, Backbone]) -> dict[str, Whitening]:
    """Return the whitenings of a configuration by model, those of its run (`own`) included. Raises ConfigError."""
    identity = whitening.identity_of(models["base"], reading_of(config.data))
    return read_whitening(config, own, models, identity)
