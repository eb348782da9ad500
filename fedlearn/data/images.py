"""Labelled images from a MedMNIST-layout .npz file or from a folder with one subfolder a class."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from fedlearn.data.partition import client_ids
from fedlearn.errors import DataError
from fedlearn.learning.task import Examples, LeftOut

SPLITS: Final = ("train", "val", "test")
SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"})
MAX_PIXELS: Final = 64 * 1024**2
"""Of one image, decoded."""

NPZ_SCHEMA: Final = (
    ".npz in the layout of MedMNIST: arrays of all splits are joined, fedlearn makes its own test rows",
    "train_images: uint8, (n, height, width) or (n, height, width, channels)",
    "train_labels: integer, (n,) or (n, 1), classes from 0",
    "val_images, val_labels, test_images, test_labels (optional): the same",
    "train_clients, val_clients, test_clients (optional): text, (n,), whose row it is",
    "train_GROUP, val_GROUP, test_GROUP (for [privacy] group = GROUP): text or integers, (n,), such as the patient of each image",
)


def read_npz(path: Path, channels: int, classes: int, group: str = "") -> Examples:
    """All images of a MedMNIST-layout file; nothing is unpickled.

    Args:
        path: the file.
        channels: expected channels of an image.
        classes: labels must be 0 to classes - 1.
        group: the arrays `SPLIT_group` give the groups; empty for none.

    Returns:
        x uint8 (n, channels, height, width), y int64 (n,).

    Raises:
        DataError: the file, an array or its shape is not as expected. Rows whose label is not are left out.
    """
    try:
        # Opened here, because numpy takes anything that is not a zip archive for a pickle.
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise DataError(f"{path}: not an .npz archive; expected arrays named train_images and train_labels")
            file.seek(0)
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files if name.partition("_")[0] in SPLITS}
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; expected an .npz archive of images") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{path}: cannot be read as an .npz archive of plain arrays: {error}") from None
    splits = [split for split in SPLITS if f"{split}_images" in arrays]
    if not splits:
        raise DataError(f"{path}: no array 'train_images'; got {', '.join(sorted(arrays)) or 'nothing of that layout'}")
    parts = [_one_split(path, arrays, split, channels, classes, group) for split in splits]
    sizes = {part.x.shape[1:] for part in parts}
    if len(sizes) > 1:
        raise DataError(f"{path}: got images of shapes {sorted(sizes)} in its splits, expected one shape")
    clients = [part.client for part in parts if part.client is not None]
    if clients and len(clients) < len(parts):
        raise DataError(f"{path}: some splits name clients and some do not; expected all or none")
    groups = [part.groups for part in parts if part.groups is not None]
    if groups and len(groups) < len(parts):
        raise DataError(f"{path}: some splits have an array {group!r} and some do not; expected all or none")
    return Examples(
        np.concatenate([part.x for part in parts]),
        np.concatenate([part.y for part in parts]),
        client_ids(np.concatenate(clients)) if clients else None,
        np.concatenate(groups) if groups else None,
        _all_left_out([part.left_out for part in parts]),
    )


def _one_split(
    path: Path, arrays: dict[str, npt.NDArray[Any]], split: str, channels: int, classes: int, group: str
) -> Examples:
    images, name = arrays[f"{split}_images"], f"{split}_labels"
    if name not in arrays:
        raise DataError(f"{path}: array {split}_images has no array {name} beside it")
    if images.dtype != np.uint8:
        raise DataError(f"{path}: array {split}_images: got dtype {images.dtype}, expected uint8")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] != channels:
        raise DataError(
            f"{path}: array {split}_images: got shape {arrays[f'{split}_images'].shape}, "
            f"expected (n, height, width{'' if channels == 1 else f', {channels}'})",
            hint="set the task's option channels to what the images have",
        )
    labels = arrays[name]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: array {name}: got {labels.dtype}{list(labels.shape)}, expected integers of shape [{len(images)}]"
        )
    clients = arrays.get(f"{split}_clients")
    if clients is not None and (clients.shape != labels.shape or clients.dtype.kind != "U"):
        raise DataError(
            f"{path}: array {split}_clients: got {clients.dtype}{list(clients.shape)}, expected text of shape [{len(images)}]"
        )
    groups = arrays.get(f"{split}_{group}") if group else None
    if groups is not None and (groups.shape != labels.shape or groups.dtype.kind not in "Uiu"):
        raise DataError(
            f"{path}: array {split}_{group}: got {groups.dtype}{list(groups.shape)}, expected text or integers of shape [{len(images)}]"
        )
    owners = None if groups is None else groups.astype(np.str_)
    good = (labels >= 0) & (labels < classes)
    x = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    found = Examples(x, np.where(good, labels, 0).astype(np.int64), clients, owners)
    if good.all():
        return found
    error = DataError(
        f"{path}: array {name}: got label {labels[~good][0]}, expected 0 to {classes - 1}",
        hint="set the task's option classes to what the data has",
    )
    return replace(found.take(np.flatnonzero(good)), left_out=LeftOut(int((~good).sum()), error))


def _all_left_out(parts: Sequence[LeftOut | None]) -> LeftOut | None:
    some = [part for part in parts if part is not None]
    return LeftOut(sum(part.rows for part in some), some[0].error) if some else None


def read_folder(path: Path, class_names: Sequence[str], size: int, channels: int) -> Examples:
    """Images from `path/CLASS/*.png` (or .jpg, .tif, ...), resized to a square. Needs Pillow.

    Args:
        path: a folder with one subfolder a class; subfolders with other names are refused.
        class_names: in the order of their class ids.
        size: height and width after resizing, pixels.
        channels: 1 for grey, 3 for colour.

    Returns:
        x uint8 (n, channels, size, size), y int64 (n,); in the order of class, then file name.

    Raises:
        DataError: a folder is missing or unknown. Images that cannot be read are left out.
    """
    if not path.is_dir():
        raise DataError(f"{path}: no such folder; expected one with the subfolders {', '.join(class_names)}")
    found = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    missing, unknown = sorted(set(class_names) - set(found)), sorted(set(found) - set(class_names))
    if unknown or len(missing) == len(class_names):
        raise DataError(
            f"{path}: got the subfolders {', '.join(found[:20]) or 'none'}, expected {', '.join(class_names)}",
            hint="one subfolder a class, named in the task's option classes; a site may lack some of them",
        )
    images: list[npt.NDArray[np.uint8]] = []
    labels: list[int] = []
    errors: list[DataError] = []
    for label, name in enumerate(class_names):
        if name not in found:
            continue
        for file in sorted(p for p in (path / name).iterdir() if p.suffix.lower() in SUFFIXES):
            try:
                images.append(_read_image(file, size, channels))
                labels.append(label)
            except DataError as error:
                errors.append(error)
    if not images and not errors:
        errors.append(
            DataError(f"{path}: no images in its subfolders; expected files ending {', '.join(sorted(SUFFIXES))}")
        )
    x = np.array(images, dtype=np.uint8).reshape(len(images), channels, size, size)
    left_out = LeftOut(len(errors), errors[0]) if errors else None
    return Examples(x, np.array(labels, dtype=np.int64), left_out=left_out)


def _read_image(file: Path, size: int, channels: int) -> npt.NDArray[np.uint8]:
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(  # noqa: TRY301  # goes on as it is
                    f"{file}: {image.width} x {image.height} pixels, expected {MAX_PIXELS} at most"
                )
            square = image.convert("L" if channels == 1 else "RGB").resize((size, size), Image.Resampling.BILINEAR)
            pixels = np.asarray(square, dtype=np.uint8).reshape(size, size, channels)
    except DataError:
        raise
    except Exception as error:  # decoders of a dozen formats: some raise ValueError, some struct's own
        raise DataError(f"{file}: cannot be read as an image: {error}") from None
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def scaled(images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """Pixels 0 to 255 to -1 to 1: public constants, no statistics of the data."""
    return (images.astype(np.float32) / 127.5 - 1.0).astype(np.float32)
