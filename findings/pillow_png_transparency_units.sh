#!/usr/bin/env bash
# Pillow 13.0.0: in a PNG of 4-bit gray with a transparent level (tRNS), the level stays in the file's units (0 to 15) while
# pixels are scaled to 0 to 255, so convert("RGBA") makes other pixels transparent, or none.
# Seen: level 5 of 15 is marked transparent; the pixels of level 5 (85) come out opaque.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0
cd "$folder"
venv/bin/python - <<'EOF'
import io, struct, zlib
from PIL import Image

def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

# 2 x 1 pixels of 4 bits: levels 5 and 9; level 5 is transparent
png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 4, 0, 0, 0, 0))
png += chunk(b"tRNS", struct.pack(">H", 5)) + chunk(b"IDAT", zlib.compress(b"\0\x59")) + chunk(b"IEND", b"")
image = Image.open(io.BytesIO(png))
pixels = [image.convert("RGBA").getpixel((x, 0)) for x in (0, 1)]
print("transparency:", image.info["transparency"], "pixels:", pixels)
assert pixels[0] == (85, 85, 85, 255)  # should be transparent: alpha 0
EOF
