#!/usr/bin/env bash
# datasets 5.2.0: an Image feature stores a uint16 array of three channels as an 8-bit PNG by dropping the high byte of each
# value, so that brightness wraps around every 256 levels; it warns of "downcasting". One channel of uint16 is kept as it is.
# Seen: 0x1234 (4660) in all channels is read back as 0x34 (52), where the nearest 8-bit level is 18; 0x0100 is read as 0.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pillow==13.0.0 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import warnings
import numpy
from datasets import Dataset, Features, Image

def stored(values):
    data = Dataset.from_dict({"image": [values]}, features=Features({"image": Image()}))
    return numpy.asarray(data[0]["image"])

levels = numpy.array([[0, 0x00FF, 0x0100, 0x1234, 0xFF00, 0xFFFF]], "uint16")
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    color, gray = stored(numpy.repeat(levels[..., None], 3, -1)), stored(levels)
print("levels:", levels[0].tolist(), "three channels:", color[0, :, 0].tolist(), "one channel:", gray[0].tolist())
print("warnings:", sorted({str(w.message) for w in caught if issubclass(w.category, UserWarning)}))
assert gray.dtype == numpy.uint16 and (gray == levels).all()
assert color.dtype == numpy.uint8 and (color == (levels & 255)[..., None]).all()
EOF
