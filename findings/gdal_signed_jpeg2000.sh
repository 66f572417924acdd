#!/usr/bin/env bash
# GDAL 3.10.3 (in rasterio 1.4.4): a JPEG 2000 image of signed 8-bit components opens as uint8 and its negative values are read
# as 0, although GDAL has had int8 since 3.7. Signed components of 16 bits are read right, as int16.
# Seen: -8 to 7 in 8 bits, losslessly compressed, are 0 (nine times) to 7; imagecodecs 2026.3.6 gives -8 to 7.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet rasterio==1.4.4 imagecodecs==2026.3.6 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import warnings
import imagecodecs
import numpy
import rasterio
from rasterio.io import MemoryFile

warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
print("GDAL", rasterio.__gdal_version__)
for dtype in ("int8", "int16"):
    values = numpy.tile(numpy.arange(-8, 8, dtype=dtype), (16, 1))
    stored = imagecodecs.jpeg2k_encode(values, level=0, reversible=True, codecformat="jp2")
    with MemoryFile(stored) as file, file.open() as image:
        read = image.read(1)
    print(f"{dtype}: GDAL gives {read.dtype}:", read[0].tolist())
    assert (imagecodecs.jpeg2k_decode(stored) == values).all()
    if dtype == "int8":
        assert read.dtype == numpy.uint8 and (read == values.clip(0)).all()
    else:
        assert read.dtype == numpy.int16 and (read == values).all()
EOF
