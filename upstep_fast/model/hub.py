"""Push of an adapter to the Hugging Face Hub: its files in PEFT's format and its card, and nothing else of the run.

Checkpoints, logs, pictures and lists of images stay on this machine, and so do paths: where the base model is a folder
or a file, its path in the configuration and in the card becomes its last part.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from upstep_fast import input_files, network
from upstep_fast.config.adapter_folder import adapter_folder
from upstep_fast.config.base import DEMO
from upstep_fast.config.tools import PushConfig
from upstep_fast.errors import ConfigError, RunFailedError, first_line, printable
from upstep_fast.model import model_card, names, peft_config
from upstep_fast.model.peft_config import CONFIG
from upstep_fast.model.peft_format import FILES
from upstep_fast.runtime.progress import track

MAX_BYTES = 1 << 34  # of one file of an adapter


@track("push")
def push(config: PushConfig) -> str:
    """Push the adapter of a run and return its address.

    Raises ConfigError for a folder without an adapter, a wrong name, a missing token and a public repository where a
    private one is to be; RunFailedError if the hub refuses or does not answer.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(config.repo)
    except HFValidationError as error:
        raise ConfigError(f"repo: {first_line(error)}; write OWNER/NAME") from error
    files = files_to_push(adapter_folder(config.run, "run"))
    if get_token() is None:
        raise ConfigError("push: no token of the Hugging Face Hub; run `hf auth login`, or set HF_TOKEN")
    if (reason := network.unreachable()) is not None:
        raise RunFailedError(f"push: the Hugging Face Hub does not answer ({printable(reason, 300)}); try again later")
    api = HfApi(library_name="upstep_fast")
    try:
        repo = api.create_repo(config.repo, private=config.private or None, exist_ok=True).repo_id
        if config.private and not api.repo_info(repo).private:
            raise ConfigError(f"private: {repo} exists and is public; choose another name, or make it private there")
        # what is loaded by its name on the hub, not from a folder
        card = files[model_card.NAME].replace(b'("adapter")', f'("hf-hub:{repo}")'.encode())
        files[model_card.NAME] = card.replace(b', "adapter")', f', "{repo}")'.encode())
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repo, operations, commit_message="Adapter of upstep-fast")
    except ConfigError:
        raise
    except Exception as error:  # the hub's own kinds, and those of whichever client its library uses
        reason = printable(first_line(error), 300)
        raise RunFailedError(f"push: the Hugging Face Hub refused {config.repo}: {reason}") from error
    return f"{api.endpoint}/{repo}"


def files_to_push(folder: Path) -> dict[str, bytes]:
    """Return the files of the adapter in `folder` as they are pushed, by name. Raises ConfigError."""
    found = [name for name in FILES if os.path.lexists(folder / name)]
    if model_card.card_in(folder) is not None:
        found.append(model_card.NAME)
    files = {name: input_files.read_bytes(folder / name, "push", MAX_BYTES) for name in found}
    values = peft_config.read(folder)
    base = values.base_model or ""
    files.setdefault(model_card.NAME, model_card.adapter_card(base))
    public = public_name(base)
    if public != base:
        settings: dict[str, Any] = json.loads(files[CONFIG])
        files[CONFIG] = (json.dumps(settings | {"base_model_name_or_path": public}, indent=2) + "\n").encode()
        text = files[model_card.NAME].decode(errors="replace")
        for private in (base, printable(base, 200).replace("`", "'"), base.removeprefix(names.LOCAL)):
            text = text.replace(private, public)
        files[model_card.NAME] = text.encode()
    return files


def public_name(base_model: str) -> str:
    """Return a base model's name without the folders that it lies in; other names as they are."""
    if base_model == DEMO or model_card.hub_id(base_model) is not None:
        return base_model
    return re.split(r"[/\\]", base_model.removeprefix(names.LOCAL).rstrip("/\\"))[-1] or "base model"
