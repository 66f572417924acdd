#!/usr/bin/env bash
# tifffile 2026.3.3: imwrite takes an iterator of tiles in which None stands for a tile that is not stored (a sparse file), but
# not as its first item, from which it takes the type of the others.
# Seen: tiles [t, None, t, None] are written with byte counts (4096, 0, 4096, 0); [None, t, t, t], with shape and dtype given
# as well, raises IndexError "tuple index out of range", and ValueError for RGB tiles.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tifffile==2026.3.3 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import io
import numpy
import tifffile

def write(tiles, shape):
    file = io.BytesIO()
    color = {"photometric": "rgb"} if shape[2:] else {}
    try:
        tifffile.imwrite(file, iter(tiles), shape=shape, dtype="uint8", tile=(64, 64), **color)
    except (IndexError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    file.seek(0)
    with tifffile.TiffFile(file) as image:
        return image.pages[0].databytecounts

for channels in ((), (3,)):
    tile = numpy.ones((64, 64, *channels), "uint8")
    later, first = (write(tiles, (128, 128, *channels)) for tiles in ([tile, None, tile, None], [None, tile, tile, tile]))
    print(f"tile {tile.shape}: second and fourth None: {later}; first None: {first}")
    assert later == (tile.size, 0, tile.size, 0)
    assert isinstance(first, str)
EOF
