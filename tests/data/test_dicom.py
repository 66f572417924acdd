"""DICOM: values of files made in code, by the formulas of the standard in float64; bad files; packaged files."""

import itertools
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom")
imagecodecs = pytest.importorskip("imagecodecs")
pytest.importorskip("libjpeg")

from medical_files import dicom, smooth, written  # noqa: E402
from pydicom import uid  # noqa: E402
from pydicom.dataset import Dataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.sequence import Sequence  # noqa: E402

from upstep_fast.config.reading import Intensity  # noqa: E402
from upstep_fast.data.formats import dicom as reader  # noqa: E402
from upstep_fast.data.formats import dicom_file  # noqa: E402
from upstep_fast.data.reading.intensity import to_bytes  # noqa: E402
from upstep_fast.data.reading.stored import Piece  # noqa: E402
from upstep_fast.errors import BadImage  # noqa: E402

NATIVE = (
    uid.ImplicitVRLittleEndian,
    uid.ExplicitVRLittleEndian,
    uid.ExplicitVRBigEndian,
    uid.DeflatedExplicitVRLittleEndian,
)
LOSSLESS = (uid.RLELossless, uid.JPEG2000Lossless, uid.JPEGLSLossless, uid.JPEGLosslessSV1, uid.HTJ2KLossless)


def values_of(file, frame=0):
    return reader.read(file, Piece(at=(("F", frame),)))


def limits(bits, kind):
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if kind == "i" else (0, 2**bits - 1)


def coded(frame, syntax, bits):
    """A frame as a codestream, by another library than the one that reads it where there is one."""
    if syntax == uid.JPEGLSLossless:
        return imagecodecs.jpegls_encode(frame.view(f"u{frame.dtype.itemsize}"))
    if syntax == uid.JPEGLosslessSV1:
        return imagecodecs.ljpeg_encode(frame.view(f"u{frame.dtype.itemsize}") & (2**bits - 1), bitspersample=bits)
    if syntax == uid.HTJ2KLossless:
        return imagecodecs.htj2k_encode(frame, reversible=True)
    return imagecodecs.jpeg2k_encode(frame, level=0, codecformat="j2k", reversible=True, bitspersample=bits)


def compressed(ds, frames, syntax):
    ds.file_meta.TransferSyntaxUID = syntax
    if syntax == uid.RLELossless:
        ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        ds.compress(syntax, generate_instance_uid=False)
        return ds
    ds.PixelData = encapsulate([coded(frame, syntax, ds.BitsStored) for frame in frames])
    ds["PixelData"].VR = "OB"
    ds["PixelData"].is_undefined_length = True
    return ds


@pytest.mark.parametrize("syntax", NATIVE, ids=lambda syntax: syntax.keyword)
def test_native_values_through_the_rescale(syntax):
    kinds = itertools.product((8, 10, 12, 16, 32), "ui", ("MONOCHROME1", "MONOCHROME2"))
    rescales = itertools.cycle([None, (1, -1024), (0.5, 3.25), (-2, 7), (1, 0)])
    for (bits, kind, photometric), rescale in zip(kinds, rescales, strict=False):
        low, high = limits(bits, kind)
        size = 1 if bits == 8 else 2 if bits <= 16 else 4
        x = smooth((5, 7), low, high, f"{kind}{size}", bits)
        slope, intercept = rescale or (1, 0)
        elements = {} if rescale is None else {"RescaleSlope": slope, "RescaleIntercept": intercept}
        file = written(dicom(x, bits, syntax, PhotometricInterpretation=photometric, **elements))
        stored = values_of(file)
        expected = x.astype(np.float64) * slope + intercept
        assert stored.values.dtype.isnative and stored.valid is None
        assert np.array_equal(stored.values[0].astype(np.float64), expected), (bits, kind, rescale)
        assert [stored.low, stored.high] == sorted(end * slope + intercept for end in (low, high))
        assert stored.inverted == (photometric == "MONOCHROME1")
        assert stored.is_8_bit == (bits == 8 and kind == "u" and (slope, intercept) == (1, 0))


@pytest.mark.parametrize("syntax", LOSSLESS, ids=lambda syntax: syntax.keyword)
def test_compressed_values(syntax):
    """Signed and unsigned, of 8 to 16 bits, in two frames."""
    for bits, kind in itertools.product((8, 10, 12, 16), "ui"):
        x = smooth((2, 24, 30), *limits(bits, kind), f"{kind}{1 if bits == 8 else 2}", bits)
        file = written(compressed(dicom(x, bits, RescaleSlope=2, RescaleIntercept=1), x, syntax))
        assert reader.layout(file).shape == (2, 24, 30)
        for frame in range(2):
            assert np.array_equal(values_of(file, frame).values[0], x[frame].astype(int) * 2 + 1), (bits, kind)


@pytest.mark.parametrize("syntax", [*NATIVE, uid.RLELossless, uid.JPEG2000Lossless], ids=lambda syntax: syntax.keyword)
def test_colors(syntax):
    """RGB of 8 and 16 bits, interleaved and planar."""
    for dtype, planar in itertools.product(("u1", "u2"), (0, 1)):
        x = smooth((5, 6, 3), 0, np.iinfo(dtype).max, dtype)
        ds = dicom(x, syntax=syntax if syntax in NATIVE else uid.ExplicitVRLittleEndian)
        if syntax in NATIVE and planar:
            order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
            ds.PlanarConfiguration = 1
            ds.PixelData = np.moveaxis(x, 2, 0).astype(np.dtype(dtype).newbyteorder(order)).tobytes()
        elif syntax not in NATIVE:
            ds = compressed(ds, [x], syntax)
        stored = values_of(written(ds))
        assert np.array_equal(stored.values, np.moveaxis(x, 2, 0)) and stored.high == np.iinfo(dtype).max
        assert reader.layout(written(ds)).axes == "YXC"


@pytest.mark.parametrize("dtype", ["u1", "u2"])
def test_ybr_is_converted_once(dtype):
    """By the inverse of the standard's matrix, in float64."""
    high = np.iinfo(dtype).max
    half = (high + 1) // 2
    ybr = smooth((9, 8, 3), 0, high, dtype)
    matrix = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
    rgb = (ybr.astype(float) - [0, half, half]) @ np.linalg.inv(np.array(matrix)).T
    expected = np.clip(np.floor(rgb + 0.5), 0, high)
    stored = values_of(written(dicom(ybr, PhotometricInterpretation="YBR_FULL")))
    off = np.abs(np.moveaxis(stored.values, 0, 2) - expected)
    assert off.max() <= high * 2e-6 + 1 and (off > high * 2e-6).mean() < 0.01  # the matrix has six digits
    assert stored.high == high


def test_subsampled_ybr():
    """YBR_FULL_422, not compressed: two Y, one Cb and one Cr of two pixels."""
    y, blue, red = smooth((4, 6), 0, 255, "u1"), smooth((4, 3), 0, 255, "u1", 1), smooth((4, 3), 0, 255, "u1", 2)
    ybr = np.stack([y, blue.repeat(2, 1), red.repeat(2, 1)], -1)
    whole = dicom(ybr, PhotometricInterpretation="YBR_FULL")
    half = dicom(ybr, PhotometricInterpretation="YBR_FULL_422")
    half.PixelData = np.stack([y[:, ::2], y[:, 1::2], blue, red], -1).tobytes()
    assert np.array_equal(values_of(written(half)).values, values_of(written(whole)).values)
    wrong = dicom(ybr, PhotometricInterpretation="YBR_FULL_422")
    with pytest.raises(BadImage, match="YBR_FULL_422 with as many bytes as RGB"):
        values_of(written(wrong))


def test_lossy_jpeg_colors():
    """Against Pillow's decoder, an independent one: three levels at most."""
    import io

    from PIL import Image

    y, x = np.mgrid[:32, :48]
    picture = np.stack([x * 5, y * 7, 255 - x * 3], -1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=95, subsampling=0)
    expected = np.asarray(Image.open(file))
    for photometric in ("YBR_FULL", "YBR_FULL_422", "RGB"):  # a JFIF marker says YBR, whatever the header does
        ds = dicom(picture, PhotometricInterpretation=photometric)
        ds.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
        ds.PixelData = encapsulate([file.getvalue()])
        stored = values_of(written(ds))
        assert np.abs(np.moveaxis(stored.values, 0, 2).astype(int) - expected).max() <= 3


def test_frames_of_enhanced_objects_have_their_own_rescale():
    x = smooth((3, 4, 5), 0, 4095, "u2")

    def group(slope, intercept):
        item, transform = Dataset(), Dataset()
        transform.RescaleSlope, transform.RescaleIntercept, transform.RescaleType = slope, intercept, "US"
        item.PixelValueTransformationSequence = Sequence([transform])
        return item

    frames = [group(2, 1), Dataset(), group(0.5, -3)]
    ds = dicom(x, 12, RescaleSlope=9, RescaleIntercept=9)
    ds.SharedFunctionalGroupsSequence = Sequence([group(4, 0)])
    ds.PerFrameFunctionalGroupsSequence = Sequence(frames)
    file = written(ds)
    for frame, (slope, intercept) in enumerate([(2, 1), (4, 0), (0.5, -3)]):
        stored = values_of(file, frame)
        assert np.array_equal(stored.values[0], x[frame] * float(slope) + intercept)
        assert (stored.low, stored.high) == (intercept, 4095 * slope + intercept)


def test_modality_lut():
    """Entries before the first and behind the last take the ends; signed values do not overflow."""
    table = smooth((300,), 0, 65535, "u2")
    item = Dataset()
    item.LUTDescriptor, item.ModalityLUTType = [300, -150, 16], "US"
    item.LUTData = table.astype("<u2").tobytes()
    item["LUTData"].VR = "OW"
    item["LUTDescriptor"].VR = "SS"
    x = smooth((20, 20), -32768, 32767, "i2")
    x[:10] = smooth((10, 20), -150, 149, "i2")
    stored = values_of(written(dicom(x, ModalityLUTSequence=Sequence([item]))))
    assert np.array_equal(stored.values[0], table[np.clip(x.astype(int) + 150, 0, 299)])
    assert (stored.low, stored.high) == (0, 65535)


def palette(indices, table, first, descriptor_bits, syntax=uid.ExplicitVRLittleEndian):
    ds = dicom(indices, syntax=syntax, PhotometricInterpretation="PALETTE COLOR")
    order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    for color, column in zip(("Red", "Green", "Blue"), table.T, strict=True):
        data = column.astype(column.dtype.newbyteorder(order)).tobytes()
        setattr(ds, f"{color}PaletteColorLookupTableDescriptor", [len(table) % 65536, first, descriptor_bits])
        setattr(ds, f"{color}PaletteColorLookupTableData", data + b"\0" * (len(data) % 2))
    return written(ds)


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ExplicitVRBigEndian], ids=["little", "big"])
@pytest.mark.parametrize(
    ("index", "entry", "length", "first", "bits"),
    [
        ("u1", "u1", 256, 0, 8),
        ("u1", "u2", 256, 0, 16),
        ("u1", "u2", 100, 30, 16),  # values outside take the ends
        ("u1", "u2", 255, 0, 8),  # 8 bits stored in 16
        ("u2", "u1", 1000, 0, 8),  # more entries than 8 bits count
        ("u2", "u2", 65536, 0, 16),
        ("u2", "u2", 5000, 40000, 16),
    ],
)
def test_palettes(index, entry, length, first, bits, syntax):
    table = smooth((length, 3), 0, 2**bits - 1, entry)
    indices = smooth((30, 40), 0, np.iinfo(index).max, index)
    indices[:15] = smooth((15, 40), first, min(first + length - 1, np.iinfo(index).max), index)
    stored = values_of(palette(indices, table, first, bits, syntax))
    expected = table[np.clip(indices.astype(int) - first, 0, length - 1)]
    assert np.array_equal(np.moveaxis(stored.values, 0, 2), expected) and stored.high == 2**bits - 1


def test_segmented_palette():
    """Discrete and linear segments (PS3.3, C.7.9.2)."""
    segments = np.array([0, 2, 100, 300, 1, 4, 1100], "<u2")  # two entries, then four on the line to 1100
    expected = np.array([100, 300, 500, 700, 900, 1100])
    indices = np.arange(6, dtype=np.uint8).reshape(1, 6)
    ds = dicom(indices, PhotometricInterpretation="PALETTE COLOR")
    for color in ("Red", "Green", "Blue"):
        setattr(ds, f"{color}PaletteColorLookupTableDescriptor", [6, 0, 16])
        setattr(ds, f"Segmented{color}PaletteColorLookupTableData", segments.tobytes())
    assert np.array_equal(values_of(written(ds)).values[1], expected[indices])


@pytest.mark.parametrize(
    ("dtype", "bits", "value", "limit", "padding"),
    [
        ("i2", 16, 63536, None, [-2000]),  # its type says unsigned, the pixels are signed
        ("i2", 16, -2000, None, [-2000]),
        ("u2", 12, 4095, None, [4095]),
        ("u2", 12, 0, 10, range(11)),
        ("u2", 12, 10, 0, range(11)),
        ("u1", 8, 255, 250, range(250, 256)),
        ("i2", 12, -2048, -2000, range(-2048, -1999)),
    ],
)
def test_padding_is_not_valid(dtype, bits, value, limit, padding):
    low, high = limits(bits, np.dtype(dtype).kind)
    x = smooth((40, 50), low, high, dtype)
    x.flat[:600:2] = np.resize(np.array(padding), 300)
    ds = dicom(x, bits, RescaleSlope=3, RescaleIntercept=-7)
    ends = [("PixelPaddingValue", value), ("PixelPaddingRangeLimit", limit)]
    for keyword, end in ends:
        if end is not None:
            ds.add_new(pydicom.tag.Tag(keyword), "SS" if end < 0 else "US", end)
    stored = values_of(written(ds))
    assert np.array_equal(stored.valid, ~np.isin(x, list(padding)))
    assert np.array_equal(stored.values[0], x.astype(int) * 3 - 7)


def test_padding_above_the_bits_stored():
    """63536 in files of 12 bits: valid values that look the same without the upper four bits stay."""
    x = np.full((4, 4), 0xF830, np.uint16)
    x[1:] = 0x830
    x[2, 0] = 0x1123  # an overlay in an unused bit
    stored = values_of(written(dicom(x, 12, PixelPaddingValue=0xF830)))
    assert np.array_equal(stored.valid, x != 0xF830)
    assert stored.values.max() == 0x830 and stored.values[0, 2, 0] == 0x123


@pytest.mark.parametrize(("keyword", "dtype"), [("FloatPixelData", "<f4"), ("DoubleFloatPixelData", "<f8")])
def test_floating_point(keyword, dtype):
    x = np.random.default_rng(0).normal(size=(2, 4, 5)).astype(dtype)
    x[0, 0, :3] = -1000, np.nan, -999
    ds = dicom(np.zeros((2, 4, 5), np.uint16))
    for name in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        del ds[name]
    ds.BitsAllocated = 8 * np.dtype(dtype).itemsize
    setattr(ds, keyword, x.tobytes())
    setattr(ds, keyword.replace("PixelData", "PixelPaddingValue"), -1000.0)
    file = written(ds)
    stored = values_of(file)
    assert np.array_equal(stored.values[0], x[0], equal_nan=True) and stored.low is None
    assert np.array_equal(stored.valid, x[0] != -1000)
    assert np.array_equal(values_of(file, 1).values[0], x[1]) and "floats" in reader.layout(file).what


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 8, 8), (4, 3, 5)])
def test_one_bit_segmentations(shape):
    """Frames that do not end with a byte."""
    x = smooth(shape, 0, 1, "u1")
    ds = dicom(x, Modality="SEG")
    ds.BitsAllocated = ds.BitsStored = 1
    ds.HighBit = 0
    data = np.packbits(x.ravel(), bitorder="little").tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    file = written(ds)
    for frame in range(shape[0]):
        stored = values_of(file, frame)
        assert np.array_equal(stored.values[0], x[frame]) and (stored.low, stored.high) == (0, 1)
    assert set(to_bytes(stored, Intensity("full")).unique().tolist()) <= {0, 255}


def test_dose_grid():
    x = smooth((2, 4, 4), 0, 2**32 - 1, "u4")
    ds = dicom(x, Modality="RTDOSE", DoseGridScaling="0.00125")
    assert np.array_equal(values_of(written(ds), 1).values[0], x[1] * 0.00125)


def test_windows_and_places():
    x = smooth((3, 20, 30), 0, 65535, "u2")
    ds = dicom(x, PixelPaddingValue=int(x[1, 6, 8]))
    stored = reader.read(written(ds), Piece(at=(("F", 1),), window=(5, 7, 4, 6)))
    assert np.array_equal(stored.values[0], x[1, 5:9, 7:13])
    assert stored.valid.shape == (4, 6) and not stored.valid[1, 1]
    with pytest.raises(BadImage, match="F=3"):
        values_of(written(ds), 3)


def test_path_and_bytes_are_alike(tmp_path):
    file = written(dicom(smooth((3, 20, 30), 0, 4095, "u2"), 12))
    path = tmp_path / "image"
    path.write_bytes(file)
    for frame in range(3):
        assert np.array_equal(values_of(str(path), frame).values, values_of(memoryview(file), frame).values)
    assert reader.layout(str(path)) == reader.layout(file)


def test_headers_of_several_frames_are_kept(tmp_path, monkeypatch):
    """Read once for all frames, again when the file has changed, and only the last ones are kept."""
    monkeypatch.setattr(dicom_file, "_kept", {})
    monkeypatch.setattr(dicom_file, "_MAX_KEPT", 2)
    calls = []
    real = dicom_file.read_dataset
    monkeypatch.setattr(dicom_file, "read_dataset", lambda *args, **options: calls.append(0) or real(*args, **options))
    paths = [tmp_path / f"{number}.dcm" for number in range(3)]
    for number, path in enumerate(paths):
        x = smooth((3, 4, 5), 0, 4095, "u2", number)
        path.write_bytes(written(dicom(x, 12)))
        assert all(np.array_equal(values_of(str(path), frame).values[0], x[frame]) for frame in (2, 0, 1))
    assert len(calls) == 6 and len(dicom_file._kept) == 2  # the meta group and the header of each file
    paths[2].write_bytes(written(dicom(x[:2] // 2, 12)))
    assert np.array_equal(values_of(str(paths[2]), 1).values[0], x[1] // 2)


def test_threads_read_alike():
    """Each decoder, called by eight threads at once."""
    x = smooth((4, 64, 64), 0, 4095, "u2")
    files = [written(compressed(dicom(x, 12), x, syntax)) for syntax in LOSSLESS]
    with ThreadPoolExecutor(8) as pool:
        places = [(i % len(files), frame) for i in range(60) for frame in range(4)]
        jobs = [(file, frame, pool.submit(values_of, files[file], frame)) for file, frame in places]
        for _, frame, job in jobs:
            assert np.array_equal(job.result().values[0], x[frame])


def test_files_without_preamble_or_transfer_syntax():
    x = smooth((4, 5), 0, 4095, "u2")
    for syntax in NATIVE[:3]:
        ds = dicom(x, 12, syntax)
        file = written(ds)
        at = 144 + struct.unpack_from("<L", file, 140)[0]  # behind the meta group
        assert np.array_equal(values_of(file[at:]).values[0], x)
        assert np.array_equal(values_of(file[132:]).values[0], x)


def _bad():
    """Name, file, and a part of the reason."""
    x = smooth((40, 50), 0, 4095, "u2")
    good = written(dicom(x, 12))
    report = dicom(x, 12)
    report.SOPClassUID = uid.ComprehensiveSRStorage
    del report.PixelData
    index = dicom(x, 12)
    index.DirectoryRecordSequence = Sequence([])
    del index.PixelData
    high = dicom(x, 12, HighBit=15)
    huge = dicom(x, 12, Rows=65535, Columns=65535)
    frames = dicom(x, 12, NumberOfFrames=2000000000)
    zero = dicom(x, 12, RescaleSlope=0, RescaleIntercept=5)
    jpeg2000 = compressed(dicom(x, 12), [x], uid.JPEG2000Lossless)
    coded_frames = compressed(dicom(x, 12), [x], uid.JPEG2000Lossless)
    coded_frames.NumberOfFrames = 1000000
    other_size = compressed(dicom(x, 12), [smooth((41, 50), 0, 4095, "u2")], uid.JPEGLSLossless)
    wide = compressed(dicom(x, 12), [x], uid.JPEG2000Lossless)
    wide.Rows = wide.Columns = 65535
    video = compressed(dicom(x, 12), [x], uid.JPEG2000Lossless)
    video.file_meta.TransferSyntaxUID = uid.MPEG2MPML
    samples = dicom(np.zeros((4, 5, 3), np.uint8), PhotometricInterpretation="HSV")
    no_rows = dicom(x, 12)
    del no_rows.Rows
    raw = written(jpeg2000)
    rle = written(compressed(dicom(x, 12), x, uid.RLELossless))
    native, run_length = b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.5\0"  # transfer syntaxes
    yield "empty", b"", "not a DICOM file"
    yield "text", b"The quick brown fox jumps over the lazy dog." * 10, "not a DICOM file"
    yield "cut in the pixels", good[:-100], "truncated: 3900 of 4000 bytes"
    yield "cut in the header", good[:300], "without pixel data"
    yield "cut after the magic", good[:132], "without pixel data"
    yield "report", written(report), "without pixel data (Comprehensive SR Storage)"
    yield "DICOMDIR", written(index), "DICOMDIR"
    yield "HighBit", written(high), "HighBit 15 with BitsStored 12"
    yield "absurd size", written(huge), "truncated: 4000 of 8589672450 bytes"
    yield "absurd frames", written(frames), "truncated: 4000 of"
    yield "slope 0", written(zero), "slope 0 and intercept 5"
    yield "coded frames", written(coded_frames), "1000000 frames in"
    yield "size of the codestream", written(other_size), "declares (40, 50) rows and columns"
    yield "absurd coded size", written(wide), "above the limit"
    yield "cut codestream", raw[:-600], ""
    yield "not encapsulated", good.replace(native, run_length), "not encapsulated"
    yield "encapsulated", rle.replace(run_length, native), "encapsulated, against Explicit VR Little Endian"
    yield "video", written(video), "MPEG2"
    yield "HSV", written(samples), "3 samples of HSV"
    yield "no rows", written(no_rows), "no rows in its header"


BAD = list(_bad())


@pytest.mark.parametrize(("file", "reason"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_files_are_refused_with_one_line(file, reason):
    with pytest.raises(BadImage) as caught:
        reader.layout(file)
        values_of(file)
    assert reason in caught.value.reason and "\n" not in caught.value.reason and len(caught.value.reason) < 220


def test_deflated_data_are_bounded(monkeypatch):
    file = written(dicom(np.zeros((200, 200), np.uint16), syntax=uid.DeflatedExplicitVRLittleEndian))
    assert values_of(file).values.max() == 0
    for name, limit in (("LARGE", 1000), ("MAX_INFLATED", 10_000)):  # a hundred times its size, or this number
        monkeypatch.setattr(dicom_file, name, limit)
        with pytest.raises(
            BadImage, match="deflated data of more than 10000 bytes" if limit > 1000 else "in [0-9]{3};"
        ):
            values_of(file)


def test_missing_decoders_are_named(monkeypatch):
    """No other decoder takes their place."""
    x = smooth((8, 9), 0, 4095, "u2")
    file = written(compressed(dicom(x, 12), [x], uid.JPEG2000Lossless))
    decoder = dicom_file.get_decoder(uid.JPEG2000Lossless)
    monkeypatch.setattr(decoder, "_available", {"pillow": decoder._available["pillow"]})
    with pytest.raises(BadImage, match=r"JPEG 2000 .* pip install 'upstep_fast\[medical\]'"):
        reader.layout(file)


def test_bytes_changed_at_random_never_crash():
    rng = np.random.default_rng(0)
    x = smooth((16, 16), 0, 4095, "u2")
    files = [written(dicom(x, 12)), *(written(compressed(dicom(x, 12), [x], syntax)) for syntax in LOSSLESS)]
    for file in files:
        for _ in range(60):
            data = bytearray(file)
            for at in rng.integers(128, len(data), 3):
                data[at] = rng.integers(256)
            try:
                assert "\n" not in reader.layout(bytes(data)).what
                assert values_of(bytes(data)).values.ndim == 3
            except BadImage as error:
                assert "\n" not in error.reason


def test_unused_bits_are_masked():
    """Junk above BitsStored, also above the sign."""
    rng = np.random.default_rng(0)
    for bits, kind in itertools.product((9, 10, 12, 15), "ui"):
        x = smooth((20, 30), *limits(bits, kind), f"{kind}2")
        junk = rng.integers(0, 2 ** (16 - bits), x.shape).astype(np.uint16) << bits
        file = written(dicom(((x.view(np.uint16) & (2**bits - 1)) | junk).view(x.dtype), bits))
        assert np.array_equal(values_of(file).values[0], x)


def test_windows_of_the_file_are_not_applied_and_monochrome1_is_inverted_once():
    """After the rescale: by hand, in float64."""
    x = smooth((20, 30), 0, 4095, "u2")
    elements = {"RescaleSlope": 2, "RescaleIntercept": -1024, "PhotometricInterpretation": "MONOCHROME1"}
    plain = values_of(written(dicom(x, 12, **elements)))
    voi = Dataset()
    voi.LUTDescriptor, voi.LUTData = [2, 0, 16], np.array([0, 65535], "<u2").tobytes()
    windowed = dicom(x, 12, WindowCenter=40, WindowWidth=400, VOILUTSequence=Sequence([voi]), **elements)
    assert np.array_equal(values_of(written(windowed)).values, plain.values)
    y = to_bytes(plain, Intensity("range", ranges=((-160, 240),))).numpy()[0]
    scaled = np.clip((x.astype(np.float64) * 2 - 1024 + 160) / 400, 0, 1)
    assert np.array_equal(y, 255 - np.rint(255 * scaled).astype(np.uint8))


def test_padding_everywhere_is_no_picture():
    stored = values_of(written(dicom(np.full((4, 5), 7, np.uint16), 12, PixelPaddingValue=7)))
    with pytest.raises(BadImage, match="no valid value"):
        to_bytes(stored, Intensity("full"))


def test_extended_jpeg_of_12_bits():
    """Against libjpeg-turbo, through imagecodecs: one level at most."""
    y, x = np.mgrid[:64, :80]
    picture = (2000 + 1500 * np.sin(x / 9) * np.cos(y / 7)).astype(np.uint16)
    code = imagecodecs.jpeg8_encode(picture, level=95, bitspersample=12)
    ds = dicom(picture, 12, syntax=uid.ExplicitVRLittleEndian)
    ds.file_meta.TransferSyntaxUID = uid.JPEGExtended12Bit
    ds.PixelData = encapsulate([code])
    values = values_of(written(ds)).values[0].astype(int)
    assert np.abs(values - imagecodecs.jpeg8_decode(code)).max() <= 1 and np.abs(values - picture).max() < 60
