"""TinyStories as tokens of Llama 2."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.training.data import DataMissingError, folder_of, text

__all__ = ["stories"]

Array = np.ndarray[Any, np.dtype[Any]]

VOCABULARY = 32_000
#: As llama2.c writes them: one uint16 a token.
TOKENIZED = ("TinyStories_all_data", ".")
TOKENIZERS = ("tokenizer.model", "llama2-tokenizer.model")


def stories(data: Path | None) -> tuple[Array, Array, int]:
    """Return tokens to train on and to test on, and the size of the vocabulary.

    Parameters
    ----------
    data : Path
        Folder with what `tinystories.py pretokenize` of llama2.c makes, `data00.bin` (tested on)
        and the rest, there or in `TinyStories_all_data/`. Or with tinystories.txt (or .txt.xz),
        stories with `<|endoftext|>` between them, and the tokenizer: a small part of the data set
        in place of all of it, the last 300 stories tested on.

    Returns
    -------
    train, test : integer arrays
    vocabulary : int

    Raises
    ------
    DataMissingError
        If the folder has neither.
    ImportError
        If sentencepiece is needed and not installed.
    """
    folder = folder_of(data)
    for name in TOKENIZED:
        shards = sorted((folder / name).glob("data*.bin"))
        if len(shards) > 1:
            read = [np.fromfile(shard, dtype=np.uint16).astype(np.int32) for shard in shards]
            return np.concatenate(read[1:]), read[0], VOCABULARY
    model = next((folder / name for name in TOKENIZERS if (folder / name).is_file()), None)
    if model is None:
        msg = (
            f"`--data` must hold data00.bin and more made by llama2.c, or tinystories.txt and "
            f"{TOKENIZERS[0]}; got {folder}, which has neither."
        )
        raise DataMissingError(msg)
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(model))
    told = [story.strip() for story in text(folder, "tinystories.txt").split("<|endoftext|>")]
    told = [story for story in told if story]
    coded = [[tokenizer.bos_id(), *tokenizer.encode(story)] for story in told]
    train, test = (
        np.array([token for story in part for token in story], dtype=np.int32)
        for part in (coded[:-300], coded[-300:])
    )
    return train, test, tokenizer.vocab_size()
