"""Readers of the data sets, in their standard distributions and as compact files."""

import io
import lzma
import pickle
import tarfile
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "COARSE",
    "DataMissingError",
    "cifar",
    "coarse",
    "folder_of",
    "jpegs",
    "shakespeare",
    "text",
    "wikitext",
]

Array = np.ndarray[Any, np.dtype[Any]]
Split = tuple[Tensor, Tensor]

#: By number of classes: compact files, folder and archive of the standard distribution, its
#: files of training and testing, and the key of the labels.
CIFAR: dict[int, tuple[tuple[str, ...], str, str, dict[str, tuple[str, ...]], str]] = {
    10: (
        ("cifar10-q95.npz",),
        "cifar-10-batches-py",
        "cifar-10-python.tar.gz",
        {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        "labels",
    ),
    100: (
        ("cifar100-jpeg.npz",),
        "cifar-100-python",
        "cifar-100-python.tar.gz",
        {"train": ("train",), "test": ("test",)},
        "fine_labels",
    ),
}

#: The coarse class, of 20, of each of the 100 classes of CIFAR-100.
COARSE = (
    *(4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11),
    *(6, 11, 5, 10, 7, 6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5),
    *(5, 19, 8, 8, 15, 13, 14, 17, 18, 10, 16, 4, 17, 4, 2, 0, 17, 4, 18, 17),
    *(10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16, 12, 9, 13, 15, 13),
    *(16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13),
)


class DataMissingError(RuntimeError):
    """Raised where a data set is not found; the text says what was looked for."""


class _Plain(pickle.Unpickler):
    """Reads arrays, lists and strings, and nothing that could run code."""

    ALLOWED: ClassVar[set[tuple[str, str]]] = {
        ("numpy", "dtype"),
        ("numpy", "ndarray"),
        ("numpy.core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("_codecs", "encode"),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            msg = f"A CIFAR file must hold arrays and lists alone; got {module}.{name}."
            raise pickle.UnpicklingError(msg)
        return super().find_class(module, name)


def folder_of(data: Path | None) -> Path:
    """Return the data folder, or raise DataMissingError where there is none."""
    if data is None or not data.is_dir():
        msg = f"`--data` must be the folder with the data sets; got {data}."
        raise DataMissingError(msg)
    return data


def cifar(data: Path | None, classes: int) -> dict[str, Split]:
    """Return CIFAR-10 or CIFAR-100 (fine labels).

    Parameters
    ----------
    data : Path
        Folder with the standard distribution for Python, as archive or unpacked, or with the
        compact file.
    classes : {10, 100}

    Returns
    -------
    dict of "train" and "test" to (uint8 tensor (n, 3, 32, 32), integer tensor (n,))

    Raises
    ------
    DataMissingError
        If the folder has none of them.
    """
    return _cifar(folder_of(data), classes)


def coarse(data: Path | None) -> dict[str, Split]:
    """Return CIFAR-100 with the 20 coarse classes as labels, as `cifar` does."""
    table = torch.tensor(COARSE)
    return {split: (images, table[labels]) for split, (images, labels) in cifar(data, 100).items()}


@lru_cache(maxsize=2)
def _cifar(data: Path, classes: int) -> dict[str, Split]:
    compact, unpacked, archive, files, key = CIFAR[classes]
    for name in compact:
        if (data / name).is_file():
            return {split: _tensors(*jpegs(data / name, split)) for split in ("train", "test")}
    if (data / unpacked).is_dir():
        return {
            split: _pickled([(data / unpacked / name).read_bytes() for name in names], key)
            for split, names in files.items()
        }
    if (data / archive).is_file():
        with tarfile.open(data / archive) as packed:
            return {
                split: _pickled([_member(packed, f"{unpacked}/{name}") for name in names], key)
                for split, names in files.items()
            }
    msg = (
        f"`--data` must hold CIFAR-{classes}: {archive}, {unpacked}/ or {compact[0]}; "
        f"got {data}, which has none of them."
    )
    raise DataMissingError(msg)


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    found = archive.extractfile(name)
    assert found is not None
    return found.read()


def _pickled(files: list[bytes], key: str) -> Split:
    batches = [_Plain(io.BytesIO(file), encoding="latin1").load() for file in files]
    images = np.concatenate([batch["data"] for batch in batches]).reshape(-1, 3, 32, 32)
    return torch.from_numpy(images), torch.tensor([n for batch in batches for n in batch[key]])


def _tensors(images: Array, labels: Array) -> Split:
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def jpegs(path: Path, split: str) -> tuple[Array, Array]:
    """Return the images of a compact file: JPEG streams one after another, a header stored once.

    Parameters
    ----------
    path : Path
        An .npz with `jpeg_header` and, of each split, `_bytes`, `_offsets` and `_labels`.
    split : {"train", "test"}

    Returns
    -------
    images : uint8 array (n, height, width, 3)
    labels : int64 array (n,)
    """
    from PIL import Image

    with np.load(path) as stored:
        header, streams = stored["jpeg_header"].tobytes(), stored[f"{split}_bytes"].tobytes()
        ends, labels = stored[f"{split}_offsets"], stored[f"{split}_labels"].astype(np.int64)
    images = []
    for start, end in pairwise(ends):
        stream = streams[start:end]
        whole = stream if stream[:2] == b"\xff\xd8" else header + stream
        images.append(np.asarray(Image.open(io.BytesIO(whole)).convert("RGB")))
    return np.stack(images), labels


def text(data: Path | None, name: str) -> str:
    """Return a text file of the data folder, plain or with .xz.

    Parameters
    ----------
    data : Path
    name : str
        Such as "tinyshakespeare.txt".

    Raises
    ------
    DataMissingError
        If there is neither.
    """
    path = folder_of(data) / name
    if path.is_file():
        return path.read_text(encoding="utf-8")
    packed = path.with_name(f"{name}.xz")
    if packed.is_file():
        with lzma.open(packed, "rt", encoding="utf-8", newline="") as file:
            return file.read()
    msg = f"`--data` must hold {name} or {name}.xz; got {data}, which has neither."
    raise DataMissingError(msg)


def shakespeare(data: Path | None) -> tuple[Array, Array, int]:
    """Return Tiny Shakespeare as character numbers: nine tenths, the last tenth, and how many."""
    plays = text(data, "tinyshakespeare.txt")
    numbers = {character: index for index, character in enumerate(sorted(set(plays)))}
    coded = np.array([numbers[character] for character in plays], dtype=np.int64)
    cut = int(0.9 * len(coded))
    return coded[:cut], coded[cut:], len(numbers)


def wikitext(data: Path | None) -> dict[str, Array]:
    """Return WikiText-2 as bytes, integers in [0, 256).

    Parameters
    ----------
    data : Path
        Folder with wikitext-2/ of train.txt and valid.txt, or wikitext-2.tar.xz of it.

    Returns
    -------
    dict of "train" and "valid" to uint8 array

    Raises
    ------
    DataMissingError
        If the folder has neither.
    """
    return _wikitext(folder_of(data))


@lru_cache(maxsize=1)
def _wikitext(data: Path) -> dict[str, Array]:
    folder, archive = data / "wikitext-2", data / "wikitext-2.tar.xz"
    files = {split: f"{split}.txt" for split in ("train", "valid")}
    if folder.is_dir():
        read = {split: (folder / name).read_bytes() for split, name in files.items()}
    elif archive.is_file():
        with tarfile.open(archive) as packed:
            read = {split: _member(packed, f"wikitext-2/{name}") for split, name in files.items()}
    else:
        msg = f"`--data` must hold wikitext-2/ or {archive.name}; got {data}, which has neither."
        raise DataMissingError(msg)
    return {split: np.frombuffer(content, dtype=np.uint8).copy() for split, content in read.items()}
