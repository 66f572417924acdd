"""The files that pydicom and nibabel ship for their own tests: each is read rightly, or refused with one line.

The oracle of a picture is the library's own array, by a second decoder where pydicom has one, through the rules of
docs/formats.md in float64. `python tests/data/test_packaged_medical_files.py` prints the table of that page.
"""

from __future__ import annotations

import collections
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
nib = pytest.importorskip("nibabel")
pytest.importorskip("libjpeg")

from upstep_fast.data.formats import dicom, kinds, nifti  # noqa: E402
from upstep_fast.data.reading.stored import Piece  # noqa: E402
from upstep_fast.errors import BadImage  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = {"pydicom": "3.0.2", "nibabel": "5.4.2"}
SECOND = {  # pydicom's other decoders, each with the levels by which a lossy decoder may differ
    "RLE Lossless": ("pydicom", 0),
    "JPEG Baseline (Process 1)": ("pillow", 3),
    "JPEG 2000 Image Compression (Lossless Only)": ("pillow", 0),
    "JPEG 2000 Image Compression": ("pillow", 1),
}
GROUPS = [  # of reasons: the start, and its words in the table
    ("a DICOM file without pixel data", "no pixel data: reports, plans, palettes, waveforms, headers alone"),
    ("a DICOMDIR", "DICOMDIR, a list of files"),
    ("compressed by gzip", "DICOM in gzip: unpack it"),
    ("not a DICOM file", "starts with a stray byte"),
    ("no rows", "no size in the header"),
    ("truncated", "pixel data shorter than declared"),
    ("its header declares", "codestream of another size than the header"),
    ("DICOM that cannot be read: libjpeg", "broken JPEG"),
    ("DICOM that cannot be read: invalid literal", "broken number of frames"),
    ("a volume of shape", "CIFTI matrix, no volume"),
]


def files():
    found = []
    for library in (pydicom, nib):
        root = Path(library.__file__).parent
        below = [path for path in sorted(root.rglob("*")) if path.is_file() and "data" in path.relative_to(root).parts]
        below = [path for path in below if path.suffix not in (".py", ".pyc") and path.name[0] != "."]
        found += [(library.__name__, path) for path in below]
    return found


def outcome(path):
    """The kind of a file, in words, and the reason why it is not read; None if it is."""
    data = path.read_bytes()
    kind = kinds.kind_of(path.name, data[: kinds.START])
    if kind is None:
        return "others", "no image by name and content: counted by suffix"
    try:
        layout = kinds.layout(kind, data)
        for frame in {0, layout.size("F") - 1}:
            kinds.read(kind, data, Piece(at=(("F", frame),) if frame else ()))
    except BadImage as error:
        assert "\n" not in error.reason
        return kind.name, next(words for start, words in GROUPS if error.reason.startswith(start))
    if kind is kinds.NIFTI:
        return layout.what.split()[0], None
    syntax = pydicom.dcmread(path, force=True).file_meta.TransferSyntaxUID.name
    return f"DICOM, {re.split(r'[,(]| Image', syntax)[0].strip()}", None


def table():
    """Rows of docs/formats.md, in the order of their kinds: library, kind, read, refused, reason."""
    counts = collections.Counter((library, *outcome(path)) for library, path in files())
    rows = sorted(((library, kind, reason or "", n) for (library, kind, reason), n in counts.items()))
    return [
        f"| {library} | {kind} | {n if not reason else ''} | {n if reason else ''} | {reason} |".replace("  ", " ")
        for library, kind, reason, n in rows
    ]


@pytest.mark.skipif({name: version(name) for name in VERSIONS} != VERSIONS, reason="files of other versions")
def test_counts_are_those_of_the_docs():
    page = (ROOT / "docs/formats.md").read_text()
    assert [line for line in page.splitlines() if re.match(r"\| (pydicom|nibabel) ", line)] == table()


def second_array(ds, frame):
    """A frame by another decoder where there is one, and the levels by which it may differ."""
    plugin, levels = SECOND.get(ds.file_meta.TransferSyntaxUID.name, ("", 0))
    try:
        return pydicom.pixels.pixel_array(ds, index=frame, decoding_plugin=plugin), levels
    except (RuntimeError, ValueError):  # Pillow refuses 16 bits, and pydicom 3.0.2 bits that are not in whole bytes
        return pydicom.pixels.pixel_array(ds, index=frame), 0


def by_hand(ds, array):
    """The values of a file's array, [C, H, W], by the rules of docs/formats.md in float64."""
    if ds.PhotometricInterpretation == "PALETTE COLOR":
        array = pydicom.pixels.apply_color_lut(array, ds)
    if array.ndim == 3:
        return np.moveaxis(array, 2, 0)
    slope = float(ds.get("RescaleSlope", ds.get("DoseGridScaling", 1)))
    return array[None] * slope + float(ds.get("RescaleIntercept", 0))


@pytest.fixture(scope="module")
def read_files():
    """Paths of the files that are read, by kind."""
    paths = collections.defaultdict(list)
    for _, path in files():
        name, reason = outcome(path)
        if reason is None:
            paths["DICOM" if name.startswith("DICOM") else "volume"].append(path)
    return paths


def test_dicom_files_against_the_library(read_files):
    for path in read_files["DICOM"]:
        check_dicom(path)


def check_dicom(path):
    ds = pydicom.dcmread(path, force=True)
    for frame in {0, int(ds.get("NumberOfFrames", 1)) - 1}:
        stored = dicom.read(str(path), Piece(at=(("F", frame),)))
        array, levels = second_array(ds, frame)
        assert np.abs(stored.values.astype(float) - by_hand(ds, array)).max() <= levels, path.name
        assert stored.inverted == (ds.PhotometricInterpretation == "MONOCHROME1")
        if "PixelPaddingValue" in ds:
            raw = array.astype(int) & (2**ds.BitsAllocated - 1)
            assert np.array_equal(stored.valid, raw != int(ds.PixelPaddingValue) & (2**ds.BitsAllocated - 1))
        assert stored.low <= stored.values.min() and stored.values.max() <= stored.high


def test_pictures_of_one_scene_are_alike(read_files):
    """pydicom's color bars in every syntax: lossless ones equal, lossy ones near."""
    colors = [(255, 0, 0), (255, 128, 128), (0, 255, 0), (128, 255, 128), (0, 0, 255), (128, 128, 255)]
    colors += [(0, 0, 0), (64, 64, 64), (192, 192, 192), (255, 255, 255)]
    for path in read_files["DICOM"]:
        if path.name.startswith("SC_rgb") and dicom.layout(str(path)).shape[-3:] == (100, 100, 3):
            stored = dicom.read(str(path), Piece())
            bars = stored.values[:, 5::10, 50].T / (stored.high / 255)
            lossy = "jpeg" in path.name or "jls" in path.name or "dcmtk" in path.name or "gdcm" in path.name
            assert np.abs(bars - colors).max() <= (20 if lossy else 0.5), path.name


def test_volumes_against_the_library(read_files):
    for path in read_files["volume"]:
        check_volume(path)


def check_volume(path):
    image = nib.load(path)
    array = image.get_fdata()
    layout = nifti.layout(str(path))
    world = nib.orientations.io_orientation(image.affine)
    for k in range(layout.size("Z")):
        stored = nifti.read(str(path), Piece(at=(("Z", k),)))
        picture = array[:, :, k] if array.ndim == 3 else array[:, :, k, 0]
        if "unknown" not in layout.what:
            picture = picture[:: -int(world[0, 1]), :: -int(world[1, 1])]
        if "unknown" in layout.what or world[0, 0] < world[1, 0]:
            picture = picture.T
        assert np.array_equal(stored.values[0], picture, equal_nan=True), path.name


if __name__ == "__main__":
    print("\n".join(table()))
