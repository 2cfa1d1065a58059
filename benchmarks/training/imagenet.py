"""ImageNet as folders of JPEG files, one a class, and as a compact file."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.training.data import DataMissingError, folder_of, jpegs

__all__ = ["ImageSet", "image_sets"]

COMPACT = "tiny-imagenet50-jpeg.npz"
SUFFIXES = {".jpeg", ".jpg", ".png"}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ImageSet(torch.utils.data.Dataset[tuple[Tensor, int]]):
    """Images with random crops and flips, or cropped in the middle; keys are (seed, pass, index).

    What is random depends on the key alone.

    Parameters
    ----------
    images : sequence of Path, or uint8 array (n, height, width, 3)
    labels : sequence or array of int
    classes : int
    side : int
        Of the images handed out.
    augmented : bool
    """

    def __init__(
        self, images: Any, labels: Any, classes: int, *, side: int, augmented: bool
    ) -> None:
        self._images, self._labels = images, labels
        self.classes, self._side, self._augmented = classes, side, augmented

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self._labels)

    def __getitem__(self, key: tuple[int, int, int]) -> tuple[Tensor, int]:
        """Return an image, float32 (3, side, side), and its class."""
        from PIL import Image

        image = self._images[key[2]]
        picture = (
            Image.fromarray(image)
            if isinstance(image, np.ndarray)
            else Image.open(io.BytesIO(image.read_bytes())).convert("RGB")
        )
        crop = self._random(picture, key) if self._augmented else self._middle(picture)
        pixels = torch.from_numpy(np.array(crop, dtype=np.float32) / 255)
        scaled = (pixels - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
        return scaled.permute(2, 0, 1), int(self._labels[key[2]])

    def _random(self, picture: Any, key: tuple[int, int, int]) -> Any:
        """Return a random part of 8 to 100% of the area, 3:4 to 4:3, flipped half of the time."""
        rng = np.random.default_rng(key)
        wide, high = picture.size
        box: tuple[float, ...] = (0, 0, wide, high)
        for _ in range(10):
            area, ratio = (
                wide * high * rng.uniform(0.08, 1),
                np.exp(rng.uniform(-1, 1) * np.log(4 / 3)),
            )
            width, height = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < width <= wide and 0 < height <= high:
                left, top = rng.integers(wide - width + 1), rng.integers(high - height + 1)
                box = (left, top, left + width, top + height)
                break
        crop = picture.resize((self._side, self._side), 2, box=box)
        return crop.transpose(0) if rng.integers(2) else crop

    def _middle(self, picture: Any) -> Any:
        """Return the middle of the image, scaled so that it is 7/8 of its shorter side."""
        part = min(picture.size) * 7 / 8
        left, top = (length / 2 - part / 2 for length in picture.size)
        return picture.resize((self._side, self._side), 2, box=(left, top, left + part, top + part))


def image_sets(data: Path | None, *, small: bool = False) -> dict[str, ImageSet]:
    """Return ImageNet.

    Parameters
    ----------
    data : Path
        Folder with `train/` and `val/`, which hold a folder for each class; or with the compact
        file of 50 classes at 64 by 64 pixels.
    small : bool
        Images of 64 by 64 pixels in place of 224 by 224.

    Returns
    -------
    dict of "train" and "test" to ImageSet

    Raises
    ------
    DataMissingError
        If the folder has neither.
    """
    folder = folder_of(data)
    if (folder / "train").is_dir() and (folder / "val").is_dir():
        side, sets = 64 if small else 224, {}
        names = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
        for split, part in (("train", "train"), ("test", "val")):
            found = [
                (path, label)
                for label, name in enumerate(names)
                for path in sorted((folder / part / name).iterdir())
                if path.suffix.lower() in SUFFIXES
            ]
            paths, labels = zip(*found, strict=True)
            sets[split] = ImageSet(paths, labels, len(names), side=side, augmented=split == "train")
        return sets
    if (folder / COMPACT).is_file():
        return {
            split: ImageSet(
                *jpegs(folder / COMPACT, split), 50, side=64, augmented=split == "train"
            )
            for split in ("train", "test")
        }
    msg = f"`--data` must hold ImageNet as train/ and val/, or {COMPACT}; got {folder}."
    raise DataMissingError(msg)
