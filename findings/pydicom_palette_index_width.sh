#!/usr/bin/env bash
# pydicom 3.0.2: apply_color_lut keeps the 16-bit indices of a PALETTE COLOR image in the type of the table's entries. Where
# these have 8 bits, indices above 255 wrap around and get the colors of other indices, without a warning.
# Seen: a table of 512 entries in which entry i is i // 2. Index 300 should give 150 and gives 22, which is entry 300 - 256.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pydicom==3.0.2 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import numpy
from pydicom import Dataset
from pydicom.pixels import apply_color_lut

table = (numpy.arange(512) // 2).astype("uint8")
image = Dataset()
image.PhotometricInterpretation = "PALETTE COLOR"
image.SamplesPerPixel, image.BitsAllocated, image.BitsStored, image.PixelRepresentation = 1, 16, 16, 0
for color in ("Red", "Green", "Blue"):
    setattr(image, f"{color}PaletteColorLookupTableDescriptor", [512, 0, 8])  # entries, first index, bits of an entry
    setattr(image, f"{color}PaletteColorLookupTableData", table.tobytes())

indices = numpy.array([[0, 100, 255, 256, 300, 511]], "uint16")
reds = apply_color_lut(indices, image)[0, :, 0]
print("indices:", indices[0].tolist(), "colors:", reds.tolist(), "entries of the table:", table[indices][0].tolist())
assert (reds[:3] == table[indices[0, :3]]).all()
assert (reds[3:] == table[indices[0, 3:] - 256]).all() and (reds[3:] != table[indices[0, 3:]]).all()
EOF
