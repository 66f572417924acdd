"""NIfTI and MGH volumes written by nibabel: values, slices and orientation; bad files; packaged files."""

import gzip
import itertools
import struct
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

nib = pytest.importorskip("nibabel")

from medical_files import smooth  # noqa: E402

from upstep_fast.data.formats import nifti  # noqa: E402
from upstep_fast.data.reading.stored import Piece  # noqa: E402
from upstep_fast.errors import BadImage  # noqa: E402

DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")


def volume(values, affine=None, kind=nib.Nifti1Image, order="<", slope=None, inter=0.0):
    """A file of stored values with slope and intercept in its header, in this byte order."""
    header = kind.header_class(endianness=order) if kind is not nib.MGHImage else None
    image = kind(values, affine, header, **({} if kind is nib.MGHImage else {"dtype": values.dtype}))
    file = image.to_bytes()
    if slope is not None:
        at, code = (112, "f") if kind is nib.Nifti1Image else (176, "d")
        file = file[:at] + struct.pack(f"{order}2{code}", slope, inter) + file[at + 2 * struct.calcsize(code) :]
    return file


def slices(file):
    """All pictures of a file, [Z, (T,) (C,) H, W], and its layout."""
    layout = nifti.layout(file)
    z, t = layout.size("Z"), layout.size("T")
    read = {(k, j): nifti.read(file, Piece(at=(("Z", k), ("T", j)))) for k in range(z) for j in range(t)}
    return layout, read


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.Nifti2Image])
def test_values(kind):
    """Every type, both byte orders, with and without scaling: in float64 by hand."""
    scales = itertools.cycle([None, (0.25, -3.5), (2, 1), (-1, 0), (0, 5)])
    for dtype, order in itertools.product(DTYPES, "<>"):
        slope, inter = scale = next(scales) or (None, 0)
        if dtype[0] == "f":
            x = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(dtype)
            x[0, 0, 0] = np.nan
        else:
            info = np.iinfo(dtype)
            x = smooth((4, 5, 3), int(info.min) // 2, int(info.max) // 2, dtype)
        file = volume(x, None, kind, order, *scale)
        layout, read = slices(file)
        assert (layout.axes, layout.shape) == ("XYZ", (4, 5, 3)) and "orientation unknown" in layout.what
        slope, inter = (1, 0) if slope in (None, 0) else (slope, inter)  # a slope of 0: no scaling
        for k in range(3):
            stored = read[k, 0]
            assert stored.values.dtype.isnative and stored.values.shape == (1, 5, 4)
            expected = x[..., k].T.astype(np.float64) * slope + inter
            assert np.array_equal(stored.values[0].astype(np.float64), expected, equal_nan=True), (dtype, order, scale)
            if dtype[0] == "f":
                assert stored.low is None and stored.high is None
            else:
                assert [float(stored.low), float(stored.high)] == sorted(
                    float(end) * slope + inter for end in (info.min, info.max)
                )
        assert stored.is_8_bit == (dtype == "u1" and (slope, inter) == (1, 0))


CODES = [  # directions of the three stored axes
    code for axes in itertools.permutations(("LR", "PA", "IS")) for code in itertools.product(*axes)
]


@pytest.mark.parametrize("kind", [nib.Nifti1Image, nib.MGHImage])
def test_every_orientation_gives_the_same_pictures(kind):
    """nibabel's as_closest_canonical is the oracle: one body, stored in 48 ways, oblique by 10 degrees."""
    body = smooth((4, 5, 6), 0, 1000, "i2")  # R, A, S
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(0.17), -np.sin(0.17)], [np.sin(0.17), np.cos(0.17)]]
    turned = nib.Nifti1Image(body, turn @ np.diag([1.0, 2, 3, 1]))
    for code in CODES:
        ornt = nib.orientations.axcodes2ornt(code)
        from_ras = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), ornt)
        image = turned.as_reoriented(from_ras)
        file = volume(np.asarray(image.dataobj), image.affine, kind)
        layout, read = slices(file)
        loaded = kind.from_bytes(file)
        canonical = np.asarray(nib.as_closest_canonical(loaded).dataobj)
        assert np.array_equal(canonical, body)
        across = ["LR", "PA", "IS"].index(next(pair for pair in ("LR", "PA", "IS") if code[2] in pair))
        order = range(body.shape[across])[:: 1 if code[2] in "RAS" else -1]
        for k, at in enumerate(order):
            picture = np.take(body, at, across).T[::-1, ::-1]  # rows S or A to I or P, columns R or A to L or P
            assert np.array_equal(read[k, 0].values[0], picture), code
        assert layout.size("Y") == picture.shape[0] and layout.size("X") == picture.shape[1]


def test_sform_and_qform():
    x = smooth((4, 5, 3), 0, 255, "u1")
    image = nib.Nifti1Image(x, None)
    image.set_qform(np.diag([1, 1, 1, 1]), 1)
    image.set_sform(np.diag([-1, 1, 1, 1]), 2)
    layout, read = slices(image.to_bytes())
    assert "sform taken, qform disagrees" in layout.what
    assert np.array_equal(read[0, 0].values[0], x[..., 0].T[::-1])  # stored from right to left
    image.set_sform(None, 0)
    layout, read = slices(image.to_bytes())
    assert "disagrees" not in layout.what and np.array_equal(read[0, 0].values[0], x[..., 0].T[::-1, ::-1])
    image.set_sform(np.diag([1, 1, 1, 1]), 2)
    assert "disagrees" not in nifti.layout(image.to_bytes()).what


def test_degenerate_affine_is_no_orientation():
    x = smooth((4, 5, 3), 0, 255, "u1")
    image = nib.Nifti1Image(x, None)
    image.set_sform(np.diag([0, 0, 0, 1]), 1)
    layout, read = slices(image.to_bytes())
    assert "orientation unknown" in layout.what and np.array_equal(read[1, 0].values[0], x[..., 1].T)


@pytest.mark.parametrize(("names", "count"), [("RGB", 3), ("RGBA", 4)])
def test_colors(names, count):
    x = smooth((4, 5, 3, count), 0, 255, "u1")
    structured = np.ascontiguousarray(x).view([(name, "u1") for name in names])[..., 0]
    layout, read = slices(volume(structured, None, slope=2, inter=1))  # which colors do not have
    assert (layout.axes, layout.shape) == ("XYZC", (4, 5, 3, 3)) and "RGB" in layout.what
    assert np.array_equal(read[2, 0].values, x[:, :, 2, :3].transpose(2, 1, 0)) and read[2, 0].is_8_bit


def test_time_and_vectors():
    x = smooth((4, 5, 3, 2), 0, 9999, "i2")
    layout, read = slices(volume(x))
    assert (layout.axes, layout.shape) == ("XYZT", x.shape)
    assert all(np.array_equal(read[k, j].values[0], x[..., k, j].T) for k in range(3) for j in range(2))
    x = smooth((4, 5, 3, 1, 3), 0, 9999, "i2")
    layout, read = slices(volume(x))
    assert (layout.axes, layout.shape) == ("XYZTC", x.shape)
    assert np.array_equal(read[1, 0].values, x[:, :, 1, 0].transpose(2, 1, 0))
    x = smooth((4, 5), 0, 9999, "i2")
    layout, read = slices(volume(x))
    assert layout.axes == "XY" and np.array_equal(read[0, 0].values[0], x.T)


def test_windows():
    x = smooth((30, 20, 3), 0, 9999, "i2")
    file = volume(x, np.diag([-2, 1, 1, 1]))
    whole = nifti.read(file, Piece(at=(("Z", 1),))).values
    window = nifti.read(file, Piece(at=(("Z", 1),), window=(5, 7, 4, 6))).values
    assert np.array_equal(window, whole[:, 5:9, 7:13])
    with pytest.raises(BadImage, match="Z=3"):
        nifti.read(file, Piece(at=(("Z", 3),)))


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mgz"])
def test_paths_in_any_order_and_from_many_threads(tmp_path, suffix):
    """A thread keeps a compressed file open: slices before its place are right too, and those of a changed file."""
    kind = nib.MGHImage if suffix == ".mgz" else nib.Nifti1Image
    x = smooth((64, 48, 12), 0, 9999, "i2")
    files = []
    for number in range(3):
        data = volume(x + np.int16(number), np.eye(4), kind)
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(data if suffix == ".nii" else gzip.compress(data))
        files.append(str(path))

    def check(job):
        number, k = job
        values = nifti.read(files[number], Piece(at=(("Z", k),))).values[0]
        return np.array_equal(values, (x[..., k] + number).T[::-1, ::-1])

    jobs = [(number, k) for k in np.random.default_rng(0).permutation(12) for number in range(3)]
    assert all(map(check, jobs))
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, jobs))
    content = (tmp_path / f"0{suffix}").read_bytes()
    assert np.array_equal(
        nifti.read(content, Piece(at=(("Z", 5),))).values, nifti.read(files[0], Piece((("Z", 5),))).values
    )
    changed = volume(x[::-1], np.eye(4), kind)
    (tmp_path / f"0{suffix}").write_bytes((changed if suffix == ".nii" else gzip.compress(changed)) + b"\0")
    assert np.array_equal(nifti.read(files[0], Piece((("Z", 0),))).values[0], x[::-1, :, 0].T[::-1, ::-1])


def test_slices_in_order_are_decompressed_once(tmp_path, monkeypatch):
    x = smooth((64, 64, 40), 0, 9999, "i2")
    path = tmp_path / "x.nii.gz"
    path.write_bytes(gzip.compress(volume(x)))
    total = 0
    real = gzip.GzipFile.read

    def read(self, size=-1):
        nonlocal total
        data = real(self, size)
        total += len(data)
        return data

    monkeypatch.setattr(gzip.GzipFile, "read", read)
    for k in range(40):
        assert np.array_equal(nifti.read(str(path), Piece((("Z", k),))).values[0], x[..., k].T)
    assert total < 1.1 * x.nbytes + 1000


def _bad():
    x = smooth((4, 5, 3), 0, 9999, "i2")
    good = volume(x)

    def changed(at, code, *values):
        data = bytearray(good)
        struct.pack_into("<" + code, data, at, *values)
        return bytes(data)

    yield "empty", b"", "not a volume"
    yield "text", b"The quick brown fox jumps over the lazy dog. " * 20, "not a volume"
    yield "encrypted", np.random.default_rng(0).bytes(2000), "not a volume"
    yield "cut in the header", good[:200], "not a volume"
    yield "cut in the data", good[:-10], "truncated, or a wrong header"
    yield "cut, compressed", gzip.compress(good)[:-60], "cannot be read"
    yield "absurd size", changed(40, "8h", 3, 32767, 32767, 32767, 1, 1, 1, 1), "truncated, or a wrong header"
    yield "absurd size, compressed", gzip.compress(changed(40, "8h", 3, *[32767] * 3, 1, 1, 1, 1)), "truncated, or"
    yield "negative size", changed(40, "8h", 3, -4, 5, 3, 1, 1, 1, 1), "shape (-4, 5, 3)"
    yield "no axes", changed(40, "8h", 0, 4, 5, 3, 1, 1, 1, 1), "shape (0,)"
    yield "seven axes", volume(smooth((2, 2, 2, 2, 2, 2), 0, 9, "i2")), "two to five axes"
    yield "offset in the header", changed(108, "f", 100), "wrong header"
    yield "offset behind the end", changed(108, "f", 1e9), "wrong header"
    yield "type", changed(70, "h", 77), "cannot be read"
    yield "complex", volume((x + 1j).astype("c8")), "values of complex64"
    yield "pair", changed(344, "4s", b"ni1\0"), "pair of .hdr and .img"
    yield "intercept", changed(112, "2f", 1, np.inf), "invalid intercept"


BAD = list(_bad())


@pytest.mark.parametrize(("file", "reason"), [bad[1:] for bad in BAD], ids=[bad[0] for bad in BAD])
def test_bad_files_are_refused_with_one_line(file, reason, tmp_path):
    (tmp_path / "x").write_bytes(file)
    for form in (file, str(tmp_path / "x")):
        with pytest.raises(BadImage) as caught:
            nifti.layout(form)
            nifti.read(form, Piece(at=(("Z", 2),)))
        assert reason in caught.value.reason and "\n" not in caught.value.reason and len(caught.value.reason) < 220


def test_bytes_changed_at_random_never_crash():
    rng = np.random.default_rng(0)
    good = volume(smooth((16, 16, 4), 0, 4095, "u2"), np.eye(4))
    for file in (good, gzip.compress(good), volume(smooth((16, 16, 4), 0, 4095, "i2"), np.eye(4), nib.MGHImage)):
        for _ in range(200):
            data = bytearray(file)
            for at in rng.integers(0, min(len(data), 400), 3):
                data[at] = rng.integers(256)
            try:
                assert nifti.read(bytes(data), Piece()).values.ndim == 3
            except BadImage as error:
                assert "\n" not in error.reason


def test_a_stream_that_ends_early_is_no_picture(tmp_path):
    """A compressed file that is cut gives the slices before the cut, then a reason."""
    x = smooth((64, 64, 20), 0, 9999, "i2")
    path = tmp_path / "x.nii.gz"
    path.write_bytes(gzip.compress(volume(x))[:-20_000])
    assert np.array_equal(nifti.read(str(path), Piece()).values[0], x[..., 0].T)
    with pytest.raises(BadImage, match="cannot be read"):
        nifti.read(str(path), Piece(at=(("Z", 19),)))
    assert np.array_equal(nifti.read(str(path), Piece()).values[0], x[..., 0].T)
