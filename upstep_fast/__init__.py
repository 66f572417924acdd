"""Adapt a pretrained Vision Transformer to unlabeled images, fast and without forgetting.

>>> import upstep_fast
>>> upstep_fast.adapt(model="demo", data="photos/", out="adapted/")
>>> m = upstep_fast.load("adapted/")
>>> features = m.embed("photos/")  # numpy [N, D]

Importing this package does nothing else: each public name is loaded when it is first used.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from upstep_fast.version import __version__

if TYPE_CHECKING:
    from upstep_fast.evaluation.embeddings import embed
    from upstep_fast.evaluation.feature_model import FeatureModel, load
    from upstep_fast.evaluation.labeled import evaluate
    from upstep_fast.evaluation.search.index import FeatureIndex
    from upstep_fast.explorer.open import explore
    from upstep_fast.integrations.sklearn import Embedder as Embedder
    from upstep_fast.model.peft_format import load_adapted
    from upstep_fast.report.curation import curate
    from upstep_fast.train.adapt import adapt
    from upstep_fast.train.finetune.classifier import load_finetuned
    from upstep_fast.train.finetune.run import finetune

__all__ = [  # without Embedder: `from upstep_fast import *` does not need scikit-learn
    "FeatureIndex",
    "FeatureModel",
    "__version__",
    "adapt",
    "curate",
    "embed",
    "evaluate",
    "explore",
    "finetune",
    "kernels",
    "load",
    "load_adapted",
    "load_finetuned",
]

_HOME = {
    "Embedder": "integrations.sklearn",
    "adapt": "train.adapt",
    "curate": "report.curation",
    "evaluate": "evaluation.labeled",
    "embed": "evaluation.embeddings",
    "explore": "explorer.open",
    "FeatureIndex": "evaluation.search.index",
    "FeatureModel": "evaluation.feature_model",
    "finetune": "train.finetune.run",
    "load": "evaluation.feature_model",
    "load_adapted": "model.peft_format",
    "load_finetuned": "train.finetune.classifier",
}


def __dir__() -> list[str]:
    return sorted({*__all__, *_HOME})


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name == "kernels":
        try:
            return import_module(".kernels", __name__)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"upstep_fast.kernels: {Path(__file__).with_name('kernels')} must link to ../kernels; "
                "git needs core.symlinks=true to make it, or install a wheel and run from another folder"
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
