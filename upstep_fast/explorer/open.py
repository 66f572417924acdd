"""The command `explore` and its function: they check for the extra's packages before anything slow is loaded."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upstep_fast.config.explore import ExploreConfig
from upstep_fast.errors import ConfigError
from upstep_fast.runtime.progress import track

if TYPE_CHECKING:
    from upstep_fast.explorer.serve import Explorer

PACKAGES = ("starlette", "uvicorn", "umap", "sklearn", "faiss")


def require_packages() -> None:
    """Raise ConfigError if a package of the extra `explore` is missing."""
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise ConfigError(f'explore: needs {", ".join(missing)}; pip install "upstep_fast[explore]"')


def run(config: ExploreConfig) -> None:
    """Serve the page of a run until Ctrl-C. Raises UpstepError."""
    require_packages()
    with track("explore: starting"):  # imports PyTorch
        from upstep_fast.explorer.serve import serve
    serve(config)


def explore(
    source: Any,
    data: str | Path | list[str] | tuple[str, ...] = (),
    *,
    features: str | Path | None = None,
    columns: str | Path | None = None,
    clusters: int = 10,
    port: int = 0,
    height: int = 760,
) -> Explorer:
    """Return a local page to look through images; a notebook shows it as a frame, and `url` opens in a browser.

    source: a run's folder, or a model of `upstep_fast.load`. data: images, as `--data` takes them; default: those of
    the run's --data. features: of a run, as `upstep-fast explore` takes them. columns: CSV whose columns color
    the maps. height: of the frame in pixels. The server runs in a thread until `close()`. Raises UpstepError.
    """
    require_packages()
    from upstep_fast.evaluation.feature_model import FeatureModel
    from upstep_fast.explorer.serve import show

    model = source if isinstance(source, FeatureModel) else None
    paths = (str(data),) if isinstance(data, (str, Path)) else tuple(map(str, data))
    if model is not None and not paths:
        raise ConfigError("data: a model has no images of its own; give data")
    config = ExploreConfig(
        run="" if model is not None else str(source),
        data=paths,
        features=None if features is None else str(features),
        columns=None if columns is None else str(columns),
        clusters=clusters,
        port=port,
        browser=False,
    )
    return show(config, model, height)
