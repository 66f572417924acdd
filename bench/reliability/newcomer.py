"""Times the way of a newcomer: README's commands in a fresh clone and a fresh environment, to an adapter in PEFT.

    python bench/reliability/newcomer.py FOLDER [--json bench/results/newcomer_cpu2.json]

FOLDER gets the clone, the environment and a folder of the user's own pictures: the demo's photographs without their
labels, names or layout. The commands are README's, in its order; the weights of timm's models cannot be had without
a network, so its line for the model that comes along is run, and `adapted/` in its Python block is that run's folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import resource
import subprocess
import tarfile
import time
from pathlib import Path

from upstep_fast.runtime.machine import processor_name

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 600


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True)
    clone = folder / "upstep_fast"
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "PYTHONPATH", "OMP_NUM_THREADS")}
    environment |= {"HF_HUB_OFFLINE": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    steps: list[dict] = []
    load = os.getloadavg()[0]

    def timed(command: str, cwd: Path) -> None:
        print(f"$ {command}", flush=True)
        began, used = time.monotonic(), processor_seconds()
        subprocess.run(["bash", "-ec", command], cwd=cwd, env=environment, check=True)
        took = {"seconds": time.monotonic() - began, "cpu_seconds": processor_seconds() - used}
        steps.append({"command": command, **{name: round(value, 1) for name, value in took.items()}})

    timed(f"git clone --quiet {ROOT} upstep_fast", folder)
    images = own_pictures(clone / "photos", clone / "upstep_fast/assets/sign_digits_64.tar")
    readme = (clone / "README.md").read_text()
    install, adapt = (find(readme, start) for start in ("pip install '.[peft", "upstep-fast adapt --model demo"))
    venv = find(readme, "python3 -m venv").partition(" && ")[0]
    # what `. venv/bin/activate` does
    environment["PATH"] = f"{clone / 'venv/bin'}:{environment['PATH']}"
    for command in (venv, install, adapt):
        timed(command, clone)
    code = re.search(r"```python\n(import timm, peft.*?)```", readme, re.S)
    assert code is not None
    # the weights are in a file of the clone, not on the hub
    text = (
        code[1].replace("vit_base_patch16_224", "local-dir:upstep_fast/assets/base_tiny").replace("adapted/", "small/")
    )
    (folder / "use.py").write_text(f"{text}{CHECK}")
    timed(f"python {folder / 'use.py'}", clone)
    total = sum(step["seconds"] for step in steps)
    done = {
        "command": f"python bench/reliability/newcomer.py {options.folder}",
        "commit": output("git", "rev-parse", "--short", "HEAD", cwd=clone),
        "machine": {"cpu": processor_name(), "cores": os.cpu_count(), "python": platform.python_version()},
        "load_1min": {"before": round(load, 1), "after": round(os.getloadavg()[0], 1)},
        "versions": output(str(clone / "venv/bin/pip"), "list", "--format=freeze", cwd=clone).splitlines(),
        "pictures": images,
        "steps": steps,
        "seconds": round(total, 1),
        "limit_seconds": LIMIT_SECONDS,
    }
    done["versions"] = [
        v for v in done["versions"] if v.split("==")[0] in ("torch", "timm", "peft", "upstep_fast", "numpy")
    ]
    print(json.dumps(done, indent=1))
    if options.json:
        options.json.write_text(json.dumps(done, indent=1) + "\n")
    # lizard forgives: the arguments, then the measurement in its order
    raise SystemExit(total > LIMIT_SECONDS)


CHECK = """
import torch

x = torch.randn(2, 3, *model.base_model.model.patch_embed.img_size)
with torch.no_grad():
    model.eval()
    adapted = model(x)
    with model.disable_adapter():
        assert not torch.equal(model(x), adapted), "the adapter changes nothing"
print("PEFT has it:", sum("lora_B" in name for name, _ in model.named_parameters()), "adapted layers")
"""


def own_pictures(folder: Path, tar: Path) -> int:
    """Extract the pictures of a tar into one flat folder, named as a camera would; return their number."""
    folder.mkdir()
    count = 0
    with tarfile.open(tar) as archive:
        for member in archive:
            if member.isfile() and member.name.lower().endswith((".jpg", ".jpeg", ".png")):
                content = archive.extractfile(member)
                assert content is not None
                (folder / f"IMG_{count:04}{Path(member.name).suffix}").write_bytes(content.read())
                count += 1
    return count


def find(readme: str, start: str) -> str:
    """README's command that begins so."""
    lines = [line[2:].partition(" # ")[0].strip() for line in readme.splitlines() if line.startswith("$ ")]
    return next(line for line in lines if line.startswith(start))


def output(*command: str, cwd: Path) -> str:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()


def processor_seconds() -> float:
    """Of all commands so far: on a busy machine what an idle one would need, shared by its cores."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
