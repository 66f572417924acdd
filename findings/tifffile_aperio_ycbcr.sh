#!/usr/bin/env bash
# tifffile 2026.3.3 against OpenSlide 4.0.1: Aperio's JPEG 2000 of YCbCr (compression 33003) comes out of tifffile as YCbCr,
# also where PhotometricInterpretation says RGB, so that nothing tells the caller to convert; OpenSlide converts.
# Seen: a color of YCbCr (150, 100, 180) is (150, 100, 180) by tifffile and (223, 123, 100) by OpenSlide. Tiles of
# compression 33005 (RGB) are equal by both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tifffile==2026.3.3 imagecodecs==2026.3.6 openslide-bin==4.0.1.2 openslide-python==1.4.7 pillow==13.0.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import numpy
import openslide
import tifffile
from PIL import Image

def both(compression, photometric, color):
    values = numpy.full((64, 64, 3), color, "uint8")
    options = {"tile": (64, 64), "photometric": photometric, "compression": compression, "metadata": None}
    if photometric == "ycbcr":
        options["subsampling"] = None
    text = "Aperio Image Library v11\r\n64x64 [0,0 64x64] (64x64)|AppMag = 20|MPP = 0.5"
    tifffile.imwrite("slide.svs", values, description=text, compressionargs={"mct": False}, **options)
    with tifffile.TiffFile("slide.svs") as file, openslide.OpenSlide("slide.svs") as slide:
        page = file.pages[0]
        by_tifffile = page.asarray()[0, 0].tolist()
        by_openslide = list(slide.read_region((0, 0), 0, (1, 1)).getpixel((0, 0))[:3])
        print(f"{page.compression.name}, {page.photometric.name}: tifffile {by_tifffile}, OpenSlide {by_openslide}")
    return by_tifffile, by_openslide

ycbcr = [150, 100, 180]
rgb = Image.new("YCbCr", (1, 1), tuple(ycbcr)).convert("RGB").getpixel((0, 0))
for photometric in ("rgb", "ycbcr"):
    by_tifffile, by_openslide = both("aperio_jp2000_ycbc", photometric, ycbcr)
    assert by_tifffile == ycbcr and max(abs(a - b) for a, b in zip(by_openslide, rgb)) <= 1
by_tifffile, by_openslide = both("aperio_jp2000_rgb", "rgb", ycbcr)
assert by_tifffile == by_openslide == ycbcr
EOF
