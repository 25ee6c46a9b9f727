"""Byte-level BPE tokenizer: training, loading, and encoding of documents."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from launch.data.errors import DataError
from launch.data.files import reading

END_OF_TEXT = "<|endoftext|>"
END_OF_TEXT_ID = 0
MIN_VOCABULARY = 300
SAMPLE_CHARACTERS = 16_000_000
_PIECE_CHARACTERS = 250_000
_GROUP_CHARACTERS = 4_000_000


def train_tokenizer(texts: Iterable[str], *, vocabulary: int) -> Tokenizer:
    """Train a tokenizer on the first `SAMPLE_CHARACTERS` characters of `texts`; equal texts give equal tokenizers.

    Args:
        texts: The texts, in order.
        vocabulary: Largest number of token ids; short texts may yield fewer. Id 0 is `END_OF_TEXT`.

    Raises:
        DataError: If the vocabulary is too small for the 256 bytes and a few merges.
    """
    if vocabulary < MIN_VOCABULARY:
        raise DataError(
            f"vocabulary={vocabulary} is too small for a byte-level tokenizer; use {MIN_VOCABULARY} or more"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_sample(texts), trainer)
    assert tokenizer.token_to_id(END_OF_TEXT) == END_OF_TEXT_ID
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer that `prepare` saved.

    Raises:
        DataError: If the file is not one.
    """
    with reading(path, "tokenizer") as file:
        return Tokenizer.from_str(file.read().decode())


def encode_documents(tokenizer: Tokenizer, texts: list[str]) -> list[np.ndarray]:
    """Encode each text and append the id of `END_OF_TEXT`.

    If a text contains the characters of `END_OF_TEXT`, they are encoded as plain characters.

    Returns:
        The token ids of each text, uint32 `[tokens]`.
    """
    tokenizer.encode_special_tokens = True
    documents: list[list[np.ndarray]] = [[] for _ in texts]
    for group in _groups(texts):
        encodings = tokenizer.encode_batch_fast([piece for _, piece in group])
        for (index, _), encoding in zip(group, encodings, strict=True):
            documents[index].append(np.array(encoding.ids, dtype=np.uint32))
    end = np.array([END_OF_TEXT_ID], dtype=np.uint32)
    return [np.concatenate([*parts, end]) for parts in documents]


def _groups(texts: list[str]) -> Iterator[list[tuple[int, str]]]:
    """Yield the texts in pieces, with their numbers, as many as are encoded at once.

    A very long document is encoded in parts, since an encoding takes about a hundred bytes per token.
    """
    group: list[tuple[int, str]] = []
    characters = 0
    for index, text in enumerate(texts):
        for start in range(0, len(text), _PIECE_CHARACTERS):
            group.append((index, text[start : start + _PIECE_CHARACTERS]))
            characters += len(group[-1][1])
            if characters >= _GROUP_CHARACTERS:
                yield group
                group, characters = [], 0
    if group:
        yield group


def _sample(texts: Iterable[str]) -> Iterator[str]:
    remaining = SAMPLE_CHARACTERS
    for text in texts:
        yield text[:remaining]
        remaining -= len(text)
        if remaining <= 0:
            return
