#!/usr/bin/env bash
# Pillow 13.0.0: the signed a* and b* of a CIELAB TIFF become Pillow's offset form (a* 80 is 208) where the pixels are
# interleaved, and stay as they are where the planes are stored one after the other (PlanarConfiguration 2).
# Seen: one color, two values: interleaved (136, 208, 195), planar (136, 80, 67).
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
l, a, b = (numpy.full((4, 6), v, "uint8") for v in (136, 80, 67))  # L* 53, a* 80, b* 67: a red
planar = Image.open(tiff([l, a, b], photometric=8))
buffer = io.BytesIO()
tifffile.imwrite(buffer, numpy.stack([l, a, b], -1), photometric=8, planarconfig="contig")
buffer.seek(0)
contiguous = Image.open(buffer)
print("planar:", planar.mode, planar.getpixel((0, 0)), "interleaved:", contiguous.mode, contiguous.getpixel((0, 0)))
assert planar.mode == contiguous.mode == "LAB" and planar.getpixel((0, 0)) == (136, 80, 67)
assert contiguous.getpixel((0, 0)) == (136, 208, 195)
EOF
