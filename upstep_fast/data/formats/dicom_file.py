"""DICOM files: the header, checked before anything is decoded, and the place of the pixel data."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

from pydicom import uid
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.utils import as_pixel_options

from upstep_fast.data.formats.dicom_values import rescale_of_frames
from upstep_fast.data.reading.regular import LARGE, MAX_RATIO
from upstep_fast.data.reading.stored import File
from upstep_fast.errors import BadImage, printable

MAX_INFLATED = 1 << 30  # bytes of a deflated file
PLUGIN = "pylibjpeg"  # pydicom's name of the decoders
MONOCHROME = ("MONOCHROME1", "MONOCHROME2")
COLORS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_UNDEFINED = 0xFFFFFFFF
_GROUPS = (b"\x02\0", b"\x08\0", b"\0\x02", b"\0\x08")  # first element of a file without preamble, in both orders
_KEPT_GROUPS = (0x0008, 0x0020, 0x0028)  # modality; series; description of the pixels and their tables
_MAX_KEPT = 1000  # headers of files of several frames, a few kB each
_kept: dict[Any, DicomImage] = {}
_lock = threading.Lock()
_KEYWORDS = {0x7FE00010: "PixelData", 0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData"}


@dataclass(frozen=True)
class DicomImage:
    """What a file's header says about its image."""

    header: Dataset  # what the values need: groups of _KEPT_GROUPS
    rescales: list[tuple[float, float]]  # slope and intercept of each frame; one for all of them
    syntax: uid.UID
    options: dict[str, Any]  # of pydicom's decoders: rows, columns, bits_stored ...
    at: int  # offset of the pixel data's value
    length: int | None  # its declared bytes; None: undefined, as of encapsulated data
    rest: int  # bytes from there to the file's end

    @property
    def frames(self) -> int:
        """Number of frames."""
        return int(self.options["number_of_frames"])

    @property
    def color(self) -> str:
        """Photometric interpretation: MONOCHROME1, RGB ..."""
        return printable(str(self.options.get("photometric_interpretation", "")), 32)

    @property
    def is_float(self) -> bool:
        """Whether the values are Float or Double Float Pixel Data."""
        return bool(self.options["pixel_keyword"] != "PixelData")

    @property
    def has_codestream(self) -> bool:
        """Whether the pixel data are JPEG, JPEG-LS or JPEG 2000, which say their own size and bits."""
        return bool(self.syntax.is_encapsulated and self.syntax != uid.RLELossless)


@contextlib.contextmanager
def open_image(file: File) -> Iterator[tuple[DicomImage, BinaryIO]]:
    """Yield a file's header, checked, and the stream at the value of its pixel data.

    Headers of files of several frames are kept: those of 500 frames take pydicom half a second. Raises BadImage.
    """
    with open(file, "rb") if isinstance(file, str) else io.BytesIO(file) as opened:
        stream = cast(BinaryIO, opened)
        status = os.fstat(stream.fileno()) if isinstance(file, str) else None
        key = None if status is None else (file, status.st_mtime_ns, status.st_size)
        image = _kept.get(key)
        if image is None:
            image, inner = _image(stream)
            if reason := _unsupported_reason(image):
                raise BadImage(reason)
            if key is not None and image.frames > 1 and inner is stream:
                _keep(key, image)
            stream = inner
        stream.seek(image.at)
        yield image, stream


def _keep(key: Any, image: DicomImage) -> None:
    with _lock:
        while len(_kept) >= _MAX_KEPT:
            _kept.pop(next(iter(_kept)))
        _kept[key] = image


def _image(stream: BinaryIO) -> tuple[DicomImage, BinaryIO]:
    """Return the header, and the stream that its offset counts in: another one for deflated files. Raises BadImage."""
    start = stream.read(132)
    if start[:2] == b"\x1f\x8b":
        raise BadImage("compressed by gzip; unpack it (gunzip)")
    if start[128:] != b"DICM":
        if start[:2] not in _GROUPS:
            raise BadImage("not a DICOM file: no 'DICM' at byte 128, and no element of group 2 or 8 at its start")
        stream.seek(0)
    meta = read_dataset(stream, is_implicit_VR=False, is_little_endian=True, stop_when=lambda tag, *_: tag >> 16 != 2)
    syntax = uid.UID(meta.get("TransferSyntaxUID") or _guessed_syntax(stream))
    if not syntax.is_transfer_syntax:
        raise BadImage(f"an unknown transfer syntax ({printable(syntax, 64)})")
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        stream, syntax = _inflated(stream), uid.ExplicitVRLittleEndian
    header = read_dataset(stream, syntax.is_implicit_VR, syntax.is_little_endian, stop_when=_is_pixel_data)
    element = stream.read(8)
    if len(element) < 8:
        raise BadImage(_without_pixels(header, meta))
    order = "<" if syntax.is_little_endian else ">"
    group, number, vr, length = struct.unpack(order + "HH2sH", element)
    if vr.isalpha():  # explicit, whatever the syntax says
        (length,) = struct.unpack(order + "L", stream.read(4))
    else:
        (length,) = struct.unpack(order + "L", element[4:])
    options = as_pixel_options(
        header,
        transfer_syntax_uid=syntax,
        pixel_keyword=_KEYWORDS[group << 16 | number],
        pixel_vr=vr.decode() if vr.isalpha() else "OW",
        allow_excess_frames=False,
    )
    at = stream.tell()
    rest = stream.seek(0, io.SEEK_END) - at
    rescales = rescale_of_frames(header, int(options["number_of_frames"]))
    for tag in [element.tag for element in header.elements() if element.tag.group not in _KEPT_GROUPS]:
        del header[tag]
    declared = None if length == _UNDEFINED else length
    return DicomImage(header, rescales, syntax, options, at, declared, rest), stream


def _is_pixel_data(tag: int, vr: str | None, length: int) -> bool:
    return tag in _KEYWORDS


def _guessed_syntax(stream: BinaryIO) -> uid.UID:
    """Return the transfer syntax of a file that does not name one, by its first element."""
    at = stream.tell()
    start = stream.read(6)
    stream.seek(at)
    if not start[4:6].isalpha():
        return uid.ImplicitVRLittleEndian
    return uid.ExplicitVRBigEndian if start[:1] == b"\0" else uid.ExplicitVRLittleEndian


def _inflated(stream: BinaryIO) -> BinaryIO:
    """Return the data set of a deflated file, as large as MAX_INFLATED and MAX_RATIO allow."""
    packed = stream.read()
    limit = min(MAX_INFLATED, max(LARGE, MAX_RATIO * len(packed)))
    data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, limit + 1)
    if len(data) > limit:
        raise BadImage(
            f"deflated data of more than {limit} bytes in {len(packed)}; store it in another transfer syntax"
        )
    return io.BytesIO(data)


def _without_pixels(header: Dataset, meta: Dataset) -> str:
    if "DirectoryRecordSequence" in header or meta.get("MediaStorageSOPClassUID") == uid.MediaStorageDirectoryStorage:
        return "a DICOMDIR, which lists files; give the folder of the images"
    kind = uid.UID(header.get("SOPClassUID") or meta.get("MediaStorageSOPClassUID") or "")
    return f"a DICOM file without pixel data ({printable(kind.name, 64) or 'of an unknown class'})"


def _unsupported_reason(image: DicomImage) -> str | None:
    """Return why a file is not read, by its header alone; None if it is."""
    options = image.options
    needed = ("rows", "columns", "samples_per_pixel", "bits_allocated")
    if missing := [name for name in needed if not options.get(name)]:
        return f"no {', '.join(missing)} in its header"
    samples = options["samples_per_pixel"]
    if samples != (3 if image.color in COLORS else 1) or image.color not in (*MONOCHROME, *COLORS, "PALETTE COLOR"):
        return f"{samples} samples of {image.color or 'unknown photometric interpretation'} are not read"
    try:
        decoder = get_decoder(image.syntax)
    except NotImplementedError:
        return f"transfer syntax {image.syntax.name} is not read"
    if image.syntax.is_encapsulated and PLUGIN not in decoder.available_plugins:
        return f"{image.syntax.name} needs pylibjpeg's decoders: pip install 'upstep_fast[medical]'"
    return _bits_reason(image) or _length_reason(image)


def _bits_reason(image: DicomImage) -> str | None:
    """Return whether the header does not say where in a sample its value is."""
    if image.is_float:
        return None
    allocated, stored = image.options["bits_allocated"], image.options.get("bits_stored")
    high = image.header.get("HighBit")
    sign = image.options.get("pixel_representation")
    if sign not in (0, 1) or stored is None or not 0 < stored <= allocated:
        return f"BitsAllocated {allocated}, BitsStored {stored} and PixelRepresentation {sign} define no values"
    if high not in (None, stored - 1) and not image.has_codestream:
        return f"HighBit {high} with BitsStored {stored}, a retired form; convert it to HighBit {stored - 1}"
    return None


def _length_reason(image: DicomImage) -> str | None:
    """Return whether the pixel data are shorter than the header declares, or of another form."""
    available = image.rest if image.length is None else min(image.length, image.rest)
    if image.syntax.is_encapsulated:
        if image.length is not None:
            return f"pixel data are not encapsulated, as {image.syntax.name} requires: another transfer syntax is meant"
        return f"{image.frames} frames in {available} bytes" if 8 * image.frames > available else None
    if image.length is None:
        return f"pixel data are encapsulated, against {image.syntax.name}: another transfer syntax is meant"
    pixels = image.frames * image.options["rows"] * image.options["columns"]
    bits = pixels * image.options["samples_per_pixel"] * image.options["bits_allocated"]
    expected = (bits + 7) // 8
    if image.color == "YBR_FULL_422":
        if available >= expected:
            return "YBR_FULL_422 with as many bytes as RGB: its PhotometricInterpretation is wrong"
        expected = expected * 2 // 3
    return f"truncated: {available} of {expected} bytes of pixel data" if available < expected else None
