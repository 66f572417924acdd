#!/usr/bin/env bash
# datasets 5.2.0: imagefolder decides split by split, over the classes met so far, whether it labels the images. If the first
# split holds one class only, all its labels are None, although later splits are labeled and the feature names both classes.
# Seen: train/cat, test/dog: labels of train [None, None], of test [1], names ['cat', 'dog']; expected [0, 0] and [1].
# With a dog in train as well, they are [0, 0, 1] and [1].
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pillow==13.0.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import os
os.environ["HF_HUB_OFFLINE"] = "1"
import datasets
from pathlib import Path
from PIL import Image

datasets.disable_progress_bars()

def labels(folder, *names):
    for name in names:
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(path)
    splits = datasets.load_dataset("imagefolder", data_dir=folder, cache_dir="cache")
    classes = splits["train"].features["label"].names
    found = {name: list(split["label"]) for name, split in splits.items()}
    print(names, "->", found, classes)
    assert classes == ["cat", "dog"]
    return found

files = ("train/cat/1.png", "train/cat/2.png", "test/dog/3.png")
assert labels("one", *files) == {"train": [None, None], "test": [1]}
assert labels("two", *files, "train/dog/4.png") == {"train": [0, 0, 1], "test": [1]}
EOF
