#!/usr/bin/env bash
# pydicom 3.0.2: apply_modality_lut subtracts the table's first value from the pixels in the type of the pixels. For signed
# pixels and a negative first value the difference leaves int16, turns negative and is clipped to the first entry.
# Seen: a table of 60,000 entries for the values from -30,000, entry i being i: pixel 20,000 should give 50,000 and gives 0.
# The same pixels as int32 are right.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pydicom==3.0.2 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import numpy
from pydicom import Dataset
from pydicom.pixels import apply_modality_lut

first, entries = -30_000, 60_000
table = Dataset()
table.LUTDescriptor = [entries, first, 16]
table.LUTData = list(range(entries))
table["LUTData"].VR = "US"
image = Dataset()
image.ModalityLUTSequence = [table]

pixels = numpy.array([[-30_000, -20_000, 0, 2_767, 2_768, 20_000]], "int16")
narrow, wide = apply_modality_lut(pixels, image), apply_modality_lut(pixels.astype("int32"), image)
print("pixels:", pixels[0].tolist(), "as int16:", narrow[0].tolist(), "as int32:", wide[0].tolist())
assert wide[0].tolist() == [pixel - first for pixel in pixels[0].tolist()]
assert narrow[0].tolist() == [0, 10_000, 30_000, 32_767, 0, 0]
EOF
