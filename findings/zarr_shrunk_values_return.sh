#!/usr/bin/env bash
# zarr 3.1.6: an array that is shrunk and then grown by resize should hold the fill value where it grew. Only whole chunks are
# deleted, so the old values of the chunk that was cut come back; with shards, which are the files, those of all the cut
# shard's chunks.
# Seen: 1 to 8 in chunks of 4, resized to 2 and back to 8, gives 1 2 3 4 0 0 0 0, and 1 2 3 4 5 6 7 8 with one shard of 8.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet zarr==3.1.6 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import numpy
import zarr

def shrunk_and_grown(chunk, shard):
    array = zarr.create_array(zarr.storage.MemoryStore(), shape=(8,), chunks=(chunk,), shards=shard, dtype="f4", fill_value=0)
    array[:] = numpy.arange(1, 9)
    array.resize((2,))
    array.resize((8,))
    return array[:].astype(int).tolist()

found = {layout: shrunk_and_grown(*layout) for layout in ((2, None), (4, None), (4, (8,)))}
for (chunk, shard), values in found.items():
    print(f"chunks of {chunk}, shards {shard}: {values}")
assert found[2, None] == [1, 2, 0, 0, 0, 0, 0, 0]
assert found[4, None] == [1, 2, 3, 4, 0, 0, 0, 0]
assert found[4, (8,)] == [1, 2, 3, 4, 5, 6, 7, 8]
EOF
