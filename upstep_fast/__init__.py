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
    from .evaluation import embed, evaluate
    from .finetuned import load_finetuned
    from .finetuning import finetune
    from .lora import load_adapted
    from .trainer import adapt

__version__ = "0.1.0"
__all__ = ["__version__", "adapt", "embed", "evaluate", "finetune", "kernels", "load_adapted", "load_finetuned"]

_HOME = {
    "adapt": "trainer",
    "evaluate": "evaluation",
    "embed": "evaluation",
    "finetune": "finetuning",
    "load_adapted": "lora",
    "load_finetuned": "finetuned",
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
