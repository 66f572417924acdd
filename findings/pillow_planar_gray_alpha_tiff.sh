#!/usr/bin/env bash
# Pillow 13.0.0: a deflated 8-bit TIFF of gray and alpha stored as two planes (PlanarConfiguration 2) opens as LA without
# an error, with wrong values. tifffile 2026.3.3 reads the two planes as they were written.
# Seen: gray 200 and alpha 100 everywhere; Pillow does not give (200, 100).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 numpy==2.4.6 tifffile==2026.3.3
cd "$folder"
venv/bin/python - <<'EOF'
import io, struct
import numpy
from PIL import Image

def tiff(planes, photometric, extra=None):
    """A little-endian TIFF of 8-bit planes stored one after the other (PlanarConfiguration 2), uncompressed or deflate."""
    import zlib
    height, width = planes[0].shape
    strips = [zlib.compress(p.tobytes()) for p in planes]
    n = len(planes)
    tags = [(256, 4, [width]), (257, 4, [height]), (258, 3, [8] * n), (259, 3, [8]), (262, 3, [photometric]),
            (273, 4, None), (277, 3, [n]), (278, 4, [height]), (279, 4, [len(s) for s in strips]), (284, 3, [2])]
    if extra is not None:
        tags.append((338, 3, [extra]))
    tags.sort()
    size = {3: 2, 4: 4}
    ifd = 8
    after = ifd + 2 + 12 * len(tags) + 4
    room = sum(size[t] * (len(v) if v else n) for _, t, v in tags if size[t] * (len(v) if v else n) > 4)
    offsets, at = [], after + room
    for s in strips:
        offsets.append(at)
        at += len(s)
    out, heap = struct.pack("<2sHIH", b"II", 42, ifd, len(tags)), b""
    for tag, kind, values in tags:
        values = offsets if values is None else values
        data = struct.pack("<%d%s" % (len(values), {3: "H", 4: "I"}[kind]), *values)
        if len(data) <= 4:
            out += struct.pack("<HHI4s", tag, kind, len(values), data.ljust(4, b"\0"))
        else:
            out += struct.pack("<HHII", tag, kind, len(values), after + len(heap))
            heap += data
    return io.BytesIO(out + b"\0" * 4 + heap + b"".join(strips))

import tifffile
gray, alpha = numpy.full((4, 6), 200, "uint8"), numpy.full((4, 6), 100, "uint8")
stored = tiff([gray, alpha], photometric=1, extra=2)
theirs = tifffile.imread(stored)
assert theirs.shape == (2, 4, 6) and (theirs[0] == 200).all() and (theirs[1] == 100).all()
image = Image.open(stored)
array = numpy.asarray(image)
print("Pillow:", image.mode, sorted({tuple(p) for p in array.reshape(-1, array.shape[-1]).tolist()}))
assert image.mode == "LA" and not ((array[..., 0] == 200).all() and (array[..., 1] == 100).all())
EOF
