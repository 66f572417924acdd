"""DICOM and NIfTI files made in code, with the values that they hold."""

from __future__ import annotations

import io

import numpy as np
import pydicom
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset


def dicom(values: np.ndarray, bits: int | None = None, syntax: str = uid.ExplicitVRLittleEndian, **elements) -> Dataset:
    """Return a data set of integers [H, W], [F, H, W] or [H, W, 3], not compressed. elements: by keyword."""
    allocated = 8 * values.dtype.itemsize
    bits = bits or allocated
    is_color = values.shape[-1] == 3
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.UID(syntax)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = uid.CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid.generate_uid(entropy_srcs=["test"])
    ds.Modality = "CT"
    ds.Rows, ds.Columns = values.shape[-3:-1] if is_color else values.shape[-2:]
    ds.SamplesPerPixel = 3 if is_color else 1
    if is_color:
        ds.PlanarConfiguration = 0
    ds.PhotometricInterpretation = "RGB" if is_color else "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = allocated, bits, bits - 1
    ds.PixelRepresentation = int(values.dtype.kind == "i")
    if values.ndim - is_color == 3:
        ds.NumberOfFrames = len(values)
    order = ">" if syntax == uid.ExplicitVRBigEndian else "<"
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OB" if allocated == 8 else "OW"
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def written(ds: Dataset) -> bytes:
    """Return a data set as a file."""
    file = io.BytesIO()
    pydicom.dcmwrite(file, ds, enforce_file_format=True)
    return file.getvalue()


def smooth(shape: tuple[int, ...], low: int, high: int, dtype: str, seed: int = 0) -> np.ndarray:
    """Return integers from low to high, both included, that differ from pixel to pixel and axis to axis."""
    rng = np.random.default_rng(seed)
    values = rng.integers(low, high, shape, endpoint=True)
    values.flat[0], values.flat[-1] = low, high
    return values.astype(dtype)
