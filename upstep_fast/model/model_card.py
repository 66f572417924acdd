"""Model cards: README.md with YAML front matter for the Hugging Face Hub, beside adapters and exported models."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm

from upstep_fast.errors import printable
from upstep_fast.model import names
from upstep_fast.model.adapter_base import timm_name
from upstep_fast.version import __version__

NAME = "README.md"
# the hub's identifiers among those that timm's models have; others are "other" with a name
LICENSES = ("apache-2.0", "mit", "cc-by-nc-4.0", "cc-by-4.0", "bsd-3-clause", "apple-ascl", "apple-amlr", "gemma")
TAGS = ("upstep", "vision", "image-feature-extraction")


def with_front_matter(text: str, *, base_model: str, library: str | None, tags: Sequence[str] = ()) -> str:
    """Return a card's text below its YAML front matter; the text alone if huggingface_hub is not installed.

    base_model: a model's name as `adapt` takes it; it becomes an id of the hub, or is left out if it has none.
    library: library_name of the hub.
    """
    try:
        from huggingface_hub import ModelCard, ModelCardData
    except ImportError:
        return text
    fields: dict[str, Any] = {"pipeline_tag": "image-feature-extraction", "tags": [*TAGS, *tags]}
    fields |= _license(base_model)
    data = ModelCardData(base_model=hub_id(base_model), library_name=library, **fields)
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}"))


def card_in(folder: Path) -> Path | None:
    """Return the path of a folder's card; None without one, and for a link: a card is any text, of any private file."""
    path = folder / NAME
    return path if os.path.lexists(path) and not path.is_symlink() else None


def adapter_card(
    base_model: str,
    *,
    images: int | None = None,
    steps: int | None = None,
    verdicts: Sequence[str] = (),
    planned: int | None = None,
) -> bytes:
    """Return the README.md of the adapter of a run: base model, number of images and steps, verdicts.

    images, steps: None where they are not known. planned: number of steps of a run that has ended before its verdict.
    """
    # lizard forgives: half of it is the text
    if planned is not None and steps is not None:
        ended = f"was interrupted at step {steps:,} of {planned:,}" if steps < planned else "ended before its verdict"
        verdicts = [f"none: the run {ended}"]
    name = printable(base_model, 200).replace("`", "'")
    # other repositories of the hub may be in another library's format, and demo and files have no name there
    plain = timm_name(names.resolve(base_model))
    usage = (
        f'model = timm.create_model("{plain}", pretrained=True, num_classes=0)\n'
        'model = peft.PeftModel.from_pretrained(model, "adapter")'
        if plain is not None
        else 'model = upstep_fast.load_adapted("adapter")'
    )
    rows = [("base model", f"`{name}`")]
    if images is not None and steps is not None:
        rows += [("images", f"{images:,}, without labels"), ("steps", f"{steps:,}")]
    rows += [("verdict", " ".join(printable(text, 1000).split()).replace("|", "\\|")) for text in verdicts or ["none"]]
    table = "\n".join(f"| {label} | {value} |" for label, value in rows)
    origin = f"Trained by upstep-fast {__version__} on unlabeled images."
    if steps is None:
        origin = f"Written by upstep-fast {__version__}; the adapter had no card."
    text = f"""\
# LoRA adapter of {name}

{origin}

| | |
| --- | --- |
{table}

```python
{usage}
```

The terms of the base model apply to these weights.
"""
    return with_front_matter(text, base_model=base_model, library="peft", tags=("lora",)).encode()


def hub_id(name: str) -> str | None:
    """Return the hub's id (OWNER/NAME) of a model called by a timm or hub name; None for any other."""
    name = names.resolve(name)
    if name.startswith(names.HUB):
        return name.removeprefix(names.HUB).partition("@")[0]
    full, config = _pretrained_cfg(name)
    identifier = getattr(config, "hf_hub_id", None)
    return f"{identifier}{full}" if identifier and identifier.endswith("/") else identifier


def _pretrained_cfg(name: str) -> tuple[str | None, Any]:
    """Return timm's full name of a model and its configuration; None for what is no timm model."""
    full = None if name.startswith(names.LOCAL) else timm_name(name)
    return full, None if full is None else timm.models.get_pretrained_cfg(full)


def _license(base_model: str) -> dict[str, str]:
    """Return the hub's entries for the license of a timm model, which holds for its adapters; {} if it is unknown."""
    name = getattr(_pretrained_cfg(names.resolve(base_model))[1], "license", None)
    if name in (None, "unknown"):
        return {}
    return {"license": name} if name in LICENSES else {"license": "other", "license_name": name}
