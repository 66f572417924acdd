#!/usr/bin/env bash
# OpenVINO 2026.4.1: the ONNX operator Attention has had left_window_size and right_window_size since opset 25. OpenVINO reads such
# a model without a warning and ignores both, so that every token attends to all; ONNX's reference evaluator heeds them.
# Seen: 8 tokens with one neighbor on each side: the reference equals softmax over the window, OpenVINO softmax over all tokens.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openvino==2026.4.1 onnx==1.23.2 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import numpy
import onnx
import openvino
from onnx.reference import ReferenceEvaluator

model = onnx.parser.parse_model("""
    <ir_version: 13, opset_import: ["" : 25]>
    window (float[1,2,8,4] q, float[1,2,8,4] k, float[1,2,8,4] v) => (float[1,2,8,4] y) {
        y = Attention <left_window_size: int = 1, right_window_size: int = 1> (q, k, v)
    }""")
onnx.checker.check_model(model)
inputs = dict(zip("qkv", numpy.random.default_rng(0).normal(size=(3, 1, 2, 8, 4)).astype("float32")))

def attention(window):
    q, k, v = inputs.values()
    distance = abs(numpy.subtract.outer(numpy.arange(8), numpy.arange(8)))
    weights = numpy.exp(q @ k.swapaxes(2, 3) / 2) * (distance <= window)  # 2 is the root of the width 4
    return weights / weights.sum(-1, keepdims=True) @ v

core = openvino.Core()
compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
reference, found = ReferenceEvaluator(model).run(None, inputs)[0], compiled(inputs)[0]
for name, y in (("reference", reference), ("OpenVINO", found)):
    errors = [float(abs(y - attention(window)).max()) for window in (1, 7)]
    print(f"{name}: largest difference from the window {errors[0]:.1e}, from all tokens {errors[1]:.1e}")
assert numpy.allclose(reference, attention(1), atol=1e-5)
assert numpy.allclose(found, attention(7), atol=1e-4) and abs(found - attention(1)).max() > 0.1
EOF
