#!/usr/bin/env bash
# pydicom 3.0.2: apply_color_lut takes the well-known palettes of DICOM by name or by UID, but the names FALL and WINTER are
# exchanged: palette="FALL" gives the colors of the winter palette and the reverse. By UID they are right.
# Seen: index 0 is yellow in the fall palette (1.2.840.10008.1.5.7) and blue in the winter palette (1.2.840.10008.1.5.8);
# palette="FALL" makes it blue, palette="WINTER" yellow. SPRING and SUMMER are what they say.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pydicom==3.0.2 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import warnings
warnings.simplefilter("ignore")
import numpy
from pydicom.pixels import apply_color_lut
from pydicom.uid import UID

every_index = numpy.arange(256, dtype="uint8")[None]

def colors(palette):
    return apply_color_lut(every_index, palette=palette)[0].tolist()

uids = {UID(f"1.2.840.10008.1.5.{n}").name.split()[0].upper(): f"1.2.840.10008.1.5.{n}" for n in (5, 6, 7, 8)}
by_uid = {season: colors(uid) for season, uid in uids.items()}
for season in uids:
    given = next(other for other in uids if by_uid[other] == colors(season))
    print(f"{season}, UID {uids[season]}: first color {by_uid[season][0]}; by name: {colors(season)[0]}, that of {given}")
assert colors("SPRING") == by_uid["SPRING"] and colors("SUMMER") == by_uid["SUMMER"]
assert by_uid["FALL"] != by_uid["WINTER"]
assert colors("FALL") == by_uid["WINTER"] and colors("WINTER") == by_uid["FALL"]
EOF
