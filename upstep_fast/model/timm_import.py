"""The import of timm, without modules that nothing here uses and that take longer than timm itself.

torchvision and timm import torch._dynamo, a second of processor time, to ask one function of it and to mark methods of
one kind of model; timm.utils imports wandb, if it is installed, to log there when told to. During timm's import a
stand-in takes the place of each: it has what they ask for, which imports the real module once it is called. Whatever
else is asked of a stand-in comes from the real module. A stand-in has no submodules that could be imported, so none is
used while another thread of the program, such as one that compiles a model, may import them.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch

DYNAMO = "torch._dynamo"


def is_compile_supported(device_type: Any) -> bool:
    """Return what the function of this name in torch._dynamo.utils does; torchvision's roi_align asks it."""
    return bool(import_module(f"{DYNAMO}.utils").is_compile_supported(device_type))


def disable(fn: Any = None, recursive: bool = True, *, reason: str | None = None, **options: Any) -> Any:
    """Return `fn` marked as torch._dynamo.disable does: by torch's own decorator, which does so at the first call."""
    if fn is not None and reason is None and not options:
        return torch._disable_dynamo(fn, recursive)  # type: ignore[attr-defined]
    leave()
    return import_module(DYNAMO).disable(fn, recursive, reason=reason, **options)


# by module: what it is asked for during the import of timm
STAND_INS: dict[str, Mapping[str, Callable[..., Any]]] = {
    DYNAMO: {"disable": disable},
    f"{DYNAMO}.utils": {"is_compile_supported": is_compile_supported},
    "wandb": {},
}


class StandIn(ModuleType):
    """A module that is imported when an attribute is asked of it that was not given."""

    def __init__(self, name: str, given: Mapping[str, Any]):
        super().__init__(name)
        self.__dict__.update(given)

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the real module. Raises AttributeError, ImportError."""
        if name.startswith("__") and name != "__version__":  # the import system looks for them
            raise AttributeError(name)
        leave()
        return getattr(import_module(self.__name__), name)


def leave() -> None:
    """Take the stand-ins out of sys.modules, so that the next import finds the real modules."""
    for name in STAND_INS:
        if isinstance(sys.modules.get(name), StandIn):
            del sys.modules[name]


@contextmanager
def standing_in() -> Iterator[None]:
    """Put stand-ins in the places of modules that are not imported yet, within this context.

    With threads besides this one and our own (progress), nothing is changed.
    """
    own = threading.current_thread()
    is_alone = all(thread is own or thread.name.startswith("upstep-") for thread in threading.enumerate())
    names = [name for name in STAND_INS if is_alone and name not in sys.modules]
    if DYNAMO in sys.modules:
        names = [name for name in names if not name.startswith(DYNAMO)]
    if "wandb" in names and importlib.util.find_spec("wandb") is None:
        names.remove("wandb")
    sys.modules.update({name: StandIn(name, STAND_INS[name]) for name in names})
    try:
        yield
    finally:
        leave()


with standing_in():
    import timm  # noqa: F401
