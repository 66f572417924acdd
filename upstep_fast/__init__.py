"""Adapt a pretrained Vision Transformer to unlabelled images, fast and without forgetting.

>>> import upstep_fast
>>> upstep_fast.adapt(model="local-dir:base_tiny", data="photos/", out="adapted/")
>>> model = upstep_fast.load_adapted("local-dir:base_tiny", "adapted/adapter")

Importing this package does nothing else: each public name is loaded when it is first used.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from upstep_fast.evaluation.labelled import embed, evaluate
    from upstep_fast.model.lora import load_adapted
    from upstep_fast.train.finetune.classifier import load_finetuned
    from upstep_fast.train.finetune.run import finetune
    from upstep_fast.train.loop import adapt

__version__ = "0.1.0"
__all__ = ["__version__", "adapt", "embed", "evaluate", "finetune", "kernels", "load_adapted", "load_finetuned"]

_HOME = {
    "adapt": "train.loop",
    "evaluate": "evaluation.labelled",
    "embed": "evaluation.labelled",
    "finetune": "train.finetune.run",
    "load_adapted": "model.lora",
    "load_finetuned": "train.finetune.classifier",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f".{_HOME[name]}", __name__), name)
    if name == "kernels":
        try:
            return import_module(".kernels", __name__)
        except ModuleNotFoundError as error:
            # a wheel used from the repository root finds the checkout's upstep_fast/, which holds no kernels/
            raise ImportError(
                f"upstep_fast.kernels not found beside {Path(__file__).parent}: run from another folder, "
                "or install the checkout with `pip install --no-build-isolation -e .`"
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
