"""Images in a folder for each class."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from hf_shrink.errors import CalibrationError

_METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


def images_by_class(root: Path) -> dict[str, list[Path]]:
    """The images in each folder directly below `root`, by the folder's name, in order.

    A name decides nothing but the class: `train`, `test` and `val` are names as any. Hidden files are left out.

    Raises:
        CalibrationError: there are no images, they lie beside the folders or deeper, or a file says what they are.
    """
    for name in _METADATA:
        if (root / name).is_file():
            raise CalibrationError(
                f"{root} has a {name}, which is not read with a folder; give that file as the data, with its column of "
                "paths called image"
            )
    if beside := _images(root):
        raise CalibrationError(
            f"{beside[0]} is in no folder of a class; give a folder with a folder of images for each class, or a "
            ".jsonl or .csv file of rows with image and label"
        )
    folders = _folders(root)
    if deeper := [folder for folder in folders if any(map(_images, _below(folder)))]:
        raise CalibrationError(
            f"{root} has images in folders of folders, and those of a class lie directly in its own: give the folder "
            f"that holds the classes, such as {' or '.join(map(str, deeper[:3]))}"
        )
    found = {folder.name: images for folder in folders if (images := _images(folder))}
    if not found:
        raise CalibrationError(f"{root} is not a folder with a folder of images for each class: no image was found")
    return found


def _folders(root: Path) -> list[Path]:
    return [path for path in sorted(root.iterdir()) if path.is_dir() and not path.name.startswith(".")]


def _below(folder: Path) -> list[Path]:
    return [found for inner in _folders(folder) for found in (inner, *_below(inner))]


def _images(folder: Path) -> list[Path]:
    visible = (path for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    return [path for path in visible if path.suffix.lower() in _suffixes() and path.is_file()]


@cache
def _suffixes() -> frozenset[str]:
    """Of files that Pillow can open."""
    from PIL import Image

    return frozenset(suffix for suffix, form in Image.registered_extensions().items() if form in Image.OPEN)
