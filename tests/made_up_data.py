"""Tiny data sets in their standard distributions, made up."""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np


def cifar_batches(classes: int) -> dict[str, bytes]:
    """Return the files of a tiny CIFAR in the standard distribution."""
    rng = np.random.default_rng(0)
    names = (
        [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
        if classes == 10
        else ["train", "test"]
    )
    key, count = ("labels", 10) if classes == 10 else ("fine_labels", 100)
    return {
        name: pickle.dumps(
            {
                "data": rng.integers(256, size=(count, 3072), dtype=np.uint8),
                key: list(map(int, rng.permutation(count) % classes)),
                "filenames": ["a.png"] * count,
            },
            protocol=2,
        )
        for name in names
    }


FOLDERS = {10: "cifar-10-batches-py", 100: "cifar-100-python"}


def write_cifar(folder: Path, classes: int) -> None:
    (folder / FOLDERS[classes]).mkdir(parents=True)
    for name, content in cifar_batches(classes).items():
        (folder / FOLDERS[classes] / name).write_bytes(content)


def write_compact(path: Path, classes: int, side: int) -> Any:
    """Write images as JPEG streams with one header for all, and return how they decode."""
    from PIL import Image

    rng = np.random.default_rng(0)
    streams = []
    for _ in range(2 * classes):
        made = io.BytesIO()
        pixels = rng.integers(256, size=(side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(made, "jpeg", quality=95, subsampling=0)
        streams.append(made.getvalue())
    header = streams[0][: streams[0].index(b"\xff\xda")]
    short = [s.removeprefix(header) if i else s for i, s in enumerate(streams)]
    arrays: dict[str, Any] = {"jpeg_header": np.frombuffer(header, np.uint8)}
    for split in ("train", "test"):
        arrays[f"{split}_bytes"] = np.frombuffer(b"".join(short), np.uint8)
        arrays[f"{split}_offsets"] = np.cumsum([0, *map(len, short)])
        arrays[f"{split}_labels"] = (np.arange(2 * classes) % classes).astype(np.uint8)
    np.savez(path, **arrays)
    return np.stack([np.asarray(Image.open(io.BytesIO(stream))) for stream in streams])


def write_imagenet(folder: Path) -> None:
    from PIL import Image

    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("n01", "n02"):
            (folder / part / name).mkdir(parents=True)
            for index in range(4):
                pixels = rng.integers(256, size=(90, 70 + index, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{index}.JPEG")


def write_stories(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for shard in range(3):
        tokens = rng.integers(32_000, size=400, dtype=np.uint16)
        tokens.tofile(folder / f"data{shard:02}.bin")


def write_wikitext(folder: Path) -> None:
    (folder / "wikitext-2").mkdir(parents=True)
    words = np.random.default_rng(0).choice(["the", "of", "<unk>", "café", "=\n"], size=(2, 600))
    for split, chosen in zip(("train", "valid"), words, strict=True):
        text = " ".join(chosen)
        (folder / "wikitext-2" / f"{split}.txt").write_text(text, encoding="utf-8")
