#!/usr/bin/env bash
# pydicom 3.0.2: the frames of a 1-bit image (a segmentation) follow each other without padding, so that most of them begin
# inside a byte. pixel_array(file, index=i) unpacks as many bytes as one frame fills, which is one too few for some of these
# frames, and raises an error. Reading all frames at once is right.
# Seen: 4 frames of 5 x 7 pixels. Frames 0, 1 and 3 are read; frame 2 is "cannot reshape array of size 34 into shape (5,7)".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pydicom==3.0.2 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'EOF'
import io
import numpy
from pydicom import Dataset
from pydicom.dataset import FileMetaDataset
from pydicom.pixels import pack_bits, pixel_array
from pydicom.uid import ExplicitVRLittleEndian, SegmentationStorage, generate_uid

masks = numpy.random.default_rng(0).integers(0, 2, (4, 5, 7)).astype("uint8")
image = Dataset()
image.file_meta = FileMetaDataset()
image.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = SegmentationStorage
image.SOPInstanceUID = image.file_meta.MediaStorageSOPInstanceUID = generate_uid()
image.NumberOfFrames, image.Rows, image.Columns = masks.shape
image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
image.BitsAllocated, image.BitsStored, image.HighBit, image.PixelRepresentation = 1, 1, 0, 0
image.PixelData = pack_bits(masks.ravel())
image["PixelData"].VR = "OB"
stored = io.BytesIO()
image.save_as(stored, enforce_file_format=True)

def frames(**choice):
    stored.seek(0)
    try:
        return pixel_array(stored, **choice)
    except ValueError as error:
        return str(error)

assert (frames() == masks).all()
for index in range(4):
    found = frames(index=index)
    print(f"frame {index} begins at bit {35 * index}:", found if isinstance(found, str) else (found == masks[index]).all())
    assert isinstance(found, str) if index == 2 else (found == masks[index]).all()
EOF
