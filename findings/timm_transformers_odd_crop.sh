#!/usr/bin/env bash
# timm 1.0.31 against transformers 5.24.0: where a center crop leaves an odd margin, transformers' processors take the
# floor of half of it and torchvision, which timm uses, rounds half to even, so that the two see an image shifted by one pixel.
# Seen: a margin of 13 starts at pixel 6 for both, one of 15 at 7 for transformers and at 8 for timm.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.24.0 torch==2.14.1 torchvision==0.29.1 pillow==13.0.0 numpy==2.4.6 timm==1.0.31
cd "$folder"
venv/bin/python - <<'EOF'
import numpy
import torch
from PIL import Image
from timm.data import create_transform
from transformers import BitImageProcessor

def starts(side, crop):
    ramp = numpy.broadcast_to(numpy.arange(side, dtype="uint8")[None, :, None], (side, side, 3))
    image = Image.fromarray(numpy.ascontiguousarray(ramp))
    processor = BitImageProcessor(
        do_resize=False, crop_size={"height": crop, "width": crop}, do_rescale=False, do_normalize=False
    )
    theirs = torch.as_tensor(numpy.asarray(processor(image)["pixel_values"][0]))
    timms = create_transform((3, crop, crop), crop_pct=crop / side, mean=(0, 0, 0), std=(1, 1, 1))(image)
    return int(theirs[0, 0, 0]), round(255 * float(timms[0, 0, 0]))

found = {(side, crop): starts(side, crop) for side, crop in ((96, 84), (97, 84), (98, 83), (99, 84))}
print("first column of the crop, transformers and timm:", found)
assert found[96, 84] == found[97, 84] == (6, 6) and found[98, 83] == found[99, 84] == (7, 8)
EOF
