"""torchvision's JPEG decoder against Pillow: equal verdicts and equal pixels, on intact and on damaged files."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.test_decode import _mutate, encoded, mutations, picture
from upstep_fast.data.decode import fingerprint, jpeg
from upstep_fast.data.decode.image import decode
from upstep_fast.errors import BadImage

pytestmark = [
    pytest.mark.skipif(jpeg.reader() is None, reason="torchvision has no JPEG reader here"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


# colors subsampled in each way, scans, restart markers, tables, headers
KINDS = {
    "4:2:0": encoded(picture(), "JPEG", quality=92),
    "4:2:2": encoded(picture(61, 39), "JPEG", quality=80, subsampling=1),
    "4:4:4": encoded(picture(), "JPEG", quality=98, subsampling=0),
    "coarse": encoded(picture(300, 200), "JPEG", quality=10),
    "progressive": encoded(picture(), "JPEG", quality=90, progressive=True),
    "restarts": encoded(picture(128, 96), "JPEG", quality=85, restart_marker_rows=1),
    "optimized": encoded(picture(), "JPEG", quality=85, optimize=True),
    "RGB inside": encoded(picture(), "JPEG", quality=90, keep_rgb=True),
    "gray": encoded(picture().convert("L"), "JPEG", quality=90),
    "CMYK": encoded(picture().convert("CMYK"), "JPEG", quality=90),
    "two pictures": encoded(picture(), "MPO", save_all=True, append_images=[picture(20, 30)]),
    "broken ICC": encoded(picture(), "JPEG", icc_profile=b"this is no profile"),
    "broken EXIF": encoded(picture(), "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40),
    **{f"EXIF {i}": encoded(picture(), "JPEG", exif=turned(i)) for i in range(1, 9)},
    "1 x 1": encoded(picture(1, 1), "JPEG"),
    "1 x 3000": encoded(picture(1, 3000), "JPEG"),
    "3000 x 1": encoded(picture(3000, 1), "JPEG"),
}


def verdict(data: bytes, **options) -> torch.Tensor | str:
    try:
        return decode(data, max_pixels=1_000_000, **options)
    except BadImage as error:
        return error.reason


def by_pillow(data: bytes, **options) -> torch.Tensor | str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jpeg, "reader", lambda: None)
        return verdict(data, **options)


def difference(data: bytes) -> float | None:
    """Return the mean absolute difference in levels; None where both refuse with equal reasons."""
    ours, theirs = verdict(data), by_pillow(data)
    if isinstance(theirs, str):
        assert ours == theirs
        return None
    assert isinstance(ours, torch.Tensor), f"Pillow takes it, this refuses it: {ours}"
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    return float((ours.int() - theirs.int()).abs().float().mean())


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_equal_pillows(kind):
    """Builds of libjpeg differ in arithmetic by at most one level."""
    ours, theirs = verdict(KINDS[kind]), by_pillow(KINDS[kind])
    assert ours.shape == theirs.shape and (ours.int() - theirs.int()).abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_left_to_pillow(channels):
    for kind in ("4:2:0", "gray"):
        ours, theirs = (f(KINDS[kind], channels=channels) for f in (verdict, by_pillow))
        assert ours.shape == (channels, 40, 60) and torch.equal(ours, theirs)


def test_which_decoder_reads_which_file(monkeypatch):
    seen = []
    monkeypatch.setattr(jpeg, "reader", lambda: lambda encoded: seen.append(len(encoded)) or torch.zeros(0))
    for kind in ("CMYK", "two pictures"):
        assert isinstance(verdict(KINDS[kind]), torch.Tensor)
    large = encoded(picture(800, 600), "JPEG")
    assert decode(large, min_side=300).shape == (3, 300, 400), "decoded at a half"
    assert not seen
    # a reader whose result does not have the header's size is not believed
    assert decode(large, min_side=301).shape == (3, 600, 800) and len(seen) == 1
    with pytest.raises(BadImage, match="above the limit"):
        decode(large, max_pixels=1000)
    assert len(seen) == 1, "a bomb is refused before it is read"


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_file_is_refused(kind):
    """Also where an end marker follows the cut."""
    data = KINDS[kind]
    for percent in (1, 50, 80, 99):
        piece = data[: len(data) * percent // 100]
        assert not difference(piece) and not difference(piece + b"\xff\xd9")
        if kind != "two pictures":  # the second one may be cut
            assert isinstance(verdict(piece), str), percent


def test_decoder_fingerprint_names_the_decoder(monkeypatch):
    here = fingerprint.decoder_fingerprint()
    monkeypatch.setattr(jpeg, "reader", lambda: None)
    there = fingerprint.decoder_fingerprint.__wrapped__()
    assert here.startswith("torchvision ") and there.startswith("Pillow ") and here != there


def _compare(record_property, **options):
    """Compare verdict, reason, size and pixels (one level on average) on mutated files."""
    found: list[float | None] = []

    @settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large], **options)
    @given(kind=st.sampled_from(sorted(KINDS)), edits=mutations)
    def check(kind, edits):
        found.append(difference(_mutate(KINDS[kind], edits)))
        assert found[-1] is None or found[-1] <= 1

    check()
    taken = [d for d in found if d is not None]
    assert len(found) >= options["max_examples"] and 0.05 < len(taken) / len(found) < 0.95
    record_property("mutations", len(found))
    record_property("mutations_taken", len(taken))
    record_property("mutations_with_other_pixels", sum(d > 0 for d in taken))


def test_mutated_files_have_equal_verdicts(record_property):
    _compare(record_property, max_examples=300, derandomize=True)


@pytest.mark.long
def test_mutated_files_have_equal_verdicts_long(record_property):
    _compare(record_property, max_examples=10_000)


def test_an_image_that_ends_in_gray_prints_nothing(capfd):
    gray = encoded(Image.new("RGB", (40, 24), (128, 128, 128)), "JPEG")
    assert decode(gray).shape == (3, 24, 40)
    assert capfd.readouterr().err == ""
