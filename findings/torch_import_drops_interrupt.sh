#!/usr/bin/env bash
# torch 2.14.1: whatever is raised while `import torch` imports numpy is dropped, KeyboardInterrupt included, so a Ctrl-C (or
# a signal handler that raises) at that moment is lost and the program goes on.
# Seen: the import ends normally although a KeyboardInterrupt was raised inside it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import sys

class InterruptNumpy:
    raised = False

    def find_spec(self, name, path=None, target=None):
        if name == "numpy" and not self.raised:
            InterruptNumpy.raised = True
            raise KeyboardInterrupt

sys.meta_path.insert(0, InterruptNumpy())
import torch

print("torch", torch.__version__, "imported; interrupt raised:", InterruptNumpy.raised)
assert InterruptNumpy.raised
EOF
