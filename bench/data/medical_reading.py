"""Reading of DICOM and NIfTI through this package against pydicom and nibabel alone: medians in ms, and their ratios.

    python bench/data/medical_reading.py bench/results/medical_reading_cpu2.json

The files are made here: a CT slice of 512 x 512 pixels and 12 bits with its rescale, in three transfer syntaxes, and a
volume of 256 x 256 x 100 voxels. Both sides read the same file from a path in turn and give physical values.

    dicom    dcmread, pixel_array with pydicom's choice of decoder, apply_modality_lut
    nifti    nibabel.load, and the slice of dataobj; slices in order

And `adapt` on 10,000 slices of 256 x 256 pixels: how long a step waits for its views, as a fraction of the step.
"""

from __future__ import annotations

import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from pydicom import uid
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut

from upstep_fast.data.formats import dicom, nifti
from upstep_fast.data.reading.stored import Piece
from upstep_fast.runtime.machine import processor_name

ROUNDS = {"JPEG 2000": 15}  # others: 100
SYNTAXES = {"not compressed": None, "RLE": uid.RLELossless, "JPEG 2000": uid.JPEG2000Lossless}


def slice_of(rng: np.random.Generator) -> np.ndarray:
    """Make a smooth picture with noise, uint16 of 12 bits, [512, 512]."""
    y, x = np.mgrid[:512, :512]
    values = 1000 + 500 * np.sin(x / 30) * np.cos(y / 20) + rng.normal(0, 20, (512, 512))
    return values.clip(0, 4095).astype(np.uint16)


def write_dicom(path: Path, values: np.ndarray, syntax: uid.UID | None) -> None:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = uid.CTImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid.generate_uid()
    ds.Modality, ds.PhotometricInterpretation, ds.SamplesPerPixel = "CT", "MONOCHROME2", 1
    ds.Rows, ds.Columns = values.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 12, 11, 0
    ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
    ds.PixelData = values.tobytes()
    ds["PixelData"].VR = "OW"
    if syntax is not None:
        ds.compress(syntax)
    ds.save_as(path, enforce_file_format=True)


def medians(ours: Callable[[int], object], library: Callable[[int], object], rounds: int) -> dict[str, float]:
    """Median milliseconds of both, called in turn with the number of the round, and their ratio."""
    seconds: dict[str, list[float]] = {"ours": [], "library": []}
    for number in range(rounds + 1):  # the first one warms both
        for name, call in (("ours", ours), ("library", library)):
            begin = time.perf_counter()
            call(number)
            seconds[name].append(time.perf_counter() - begin)
    found = {f"{name}_ms": round(1e3 * statistics.median(values[1:]), 3) for name, values in seconds.items()}
    return found | {"ratio": round(found["ours_ms"] / found["library_ms"], 3)}


def library_dicom(path: Path) -> np.ndarray:
    ds = pydicom.dcmread(path)
    return apply_modality_lut(ds.pixel_array, ds)


def loader_wait(folder: Path, rng: np.random.Generator, files: int = 10_000, steps: int = 12) -> dict[str, float]:
    """Return the median wait for views of the included model's steps, in seconds and as a fraction of the step."""
    data = folder / "slices"
    data.mkdir()
    write_dicom(data / "first.dcm", np.zeros((256, 256), np.uint16), None)
    header = (data / "first.dcm").read_bytes()[: -2 * 256 * 256]
    (data / "first.dcm").unlink()
    smooth = slice_of(rng)
    for number in range(files):
        top, left = rng.integers(0, 256, 2)
        values = smooth[top : top + 256, left : left + 256] + rng.integers(0, 64, (256, 256), np.uint16)
        (data / f"{number}.dcm").write_bytes(header + values.tobytes())
    flags = ["--steps", str(steps), "--batch-size", "64", "--verdict", "off", "--intensity", "window:40,400"]
    run = [sys.executable, "-m", "upstep_fast", "adapt", "--model", "demo", "--data", data, "--out", folder / "run"]
    subprocess.run([*map(str, run), *flags], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()][2:]
    wait = statistics.median(row["data_wait"] for row in rows)
    step = statistics.median(64 / row["images_per_s"] for row in rows)
    return {"files": files, "step_s": round(step, 3), "wait_s": round(wait, 4), "ratio": round(wait / step, 4)}


def main() -> int:
    warnings.simplefilter("ignore")
    rng = np.random.default_rng(0)
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, syntax in SYNTAXES.items():
            path = Path(folder) / "slice.dcm"
            write_dicom(path, slice_of(rng), syntax)
            read = lambda _, path=path: dicom.read(str(path), Piece()).values  # noqa: E731
            assert np.array_equal(read(0)[0], library_dicom(path))
            found[f"dicom, {name}"] = medians(read, lambda _, p=path: library_dicom(p), ROUNDS.get(name, 100))
        volume = rng.integers(0, 4000, (256, 256, 100)).astype(np.int16)
        for suffix in (".nii", ".nii.gz"):
            path = Path(folder) / f"volume{suffix}"
            nibabel.save(nibabel.Nifti1Image(volume, np.eye(4)), path)
            found[f"nifti, {suffix}"] = medians(
                lambda k, p=path: nifti.read(str(p), Piece(at=(("Z", k % 100),))).values,
                lambda k, p=path: np.asarray(nibabel.load(p).dataobj[..., k % 100]),
                99,
            )
        found["adapt, wait for views"] = loader_wait(Path(folder), rng)
    machine = {"cpu": processor_name(), "cores": os.cpu_count(), "gpu": "none"}
    versions = {"pydicom": pydicom.__version__, "nibabel": nibabel.__version__}
    command = f"python bench/data/medical_reading.py {sys.argv[1]}"
    record = {"date": str(datetime.date.today()), "command": command, "machine": machine, "versions": versions}
    Path(sys.argv[1]).write_text(json.dumps(record | {"reading": found}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
