#!/usr/bin/env bash
# GDAL 3.10.3 (in rasterio 1.4.4): in a big-endian GeoTIFF the bytes of a pixel are swapped before LERC compresses them as
# numbers. MAX_Z_ERROR, the largest error allowed, then bounds that of the swapped numbers, and floats whose swapped bytes are
# a NaN are lost although MAX_Z_ERROR 0 means lossless. There is no error or warning.
# Seen: uint16 of 0 to 3,999 with MAX_Z_ERROR=1 are off by up to 256; with 0, 16 of 4,096 normal float32 numbers are other
# numbers. Little-endian files keep the bound.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet rasterio==1.4.4 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import warnings
import numpy
import rasterio
from rasterio.io import MemoryFile

def largest_error(values, order, bound):
    with MemoryFile() as file:
        layout = {"count": 1, "height": values.shape[0], "width": values.shape[1], "dtype": values.dtype.name}
        with file.open(driver="GTiff", compress="LERC", ENDIANNESS=order, MAX_Z_ERROR=bound, **layout) as image:
            image.write(values, 1)
        with file.open() as image:
            errors = abs(image.read(1).astype("float64") - values)
    return float(errors.max()), int((errors > bound).sum())

warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
generator = numpy.random.default_rng(0)
integers = generator.integers(0, 4000, (64, 64)).astype("uint16")
floats = generator.normal(size=(64, 64)).astype("float32")
print("GDAL", rasterio.__gdal_version__)
found = []
for values, bound in ((integers, 0), (integers, 1), (floats, 0)):
    little, big = (largest_error(values, order, bound) for order in ("LITTLE", "BIG"))
    print(f"{values.dtype}, bound {bound}: largest error and pixels above the bound: little {little}, big {big}")
    found.append((little[1], big[1]))
assert [little for little, _ in found] == [0, 0, 0]
assert found[0][1] == 0 and found[1][1] > 1000 and found[2][1] == 16
EOF
