"""From texts to token ids. Both vocabularies pad on the right with the id 0."""

from __future__ import annotations

import re
import zlib
from pathlib import Path

import torch

from qexp.data.pretrained import pretrained_folder

# Names of the padding token, for a tokenizer that does not say which one it pads with.
PADDING = ("[PAD]", "<pad>", "<PAD>", "<|padding|>")


class HashedWords:
    """Lower-case words and punctuation marks, each hashed to one of `size` ids; 1 begins every text.

    It needs no file and is the same on every machine; words that share an id are one word to the model.
    Errors: ValueError for a size below 3.

    >>> ids, lengths = HashedWords(size=100).encode(["Read a file.", "read A FILE"], length=6)
    >>> ids
    tensor([[ 1, 19, 41, 48, 94,  0],
            [ 1, 19, 41, 48,  0,  0]])
    >>> lengths
    tensor([5, 4])
    """

    def __init__(self, size: int = 2048):
        if isinstance(size, bool) or not isinstance(size, int) or size < 3:
            raise ValueError(f"size={size!r}: must be a whole number of at least 3")
        self.size = size

    def encode(self, texts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (N, length) int64, cut and padded, and the lengths (N,) int64 that the texts have uncut."""
        # Not Python's own hash, which differs from process to process.
        rows = [
            [1] + [2 + zlib.crc32(word.encode()) % (self.size - 2) for word in re.findall(r"\w+|[^\w\s]", text.lower())]
            for text in texts
        ]
        return _padded([row[:length] for row in rows], length), _lengths(rows)


class WordPieces:
    """The tokenizer of a pretrained encoder, from the `tokenizer.json` in its folder.

    A text that is cut keeps the marks of beginning and end.
    Errors: ValueError, one sentence, without the library tokenizers, for a file that it cannot read, and for a padding
    other than 0.
    """

    def __init__(self, path: str | Path):
        file, key = Path(path) / "tokenizer.json", f"data.vocabulary={path}"
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise ValueError(f"{key}: needs tokenizers; install it with: pip install 'qexp[text]'") from None
        if not file.is_file():
            raise ValueError(f"{key}: the folder holds no tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises the bare class
            raise ValueError(f"{key}: tokenizer.json cannot be read ({' '.join(str(error).split())})") from None
        padding = self._tokenizer.padding
        names = map(self._tokenizer.token_to_id, PADDING)
        pad = padding["pad_id"] if padding else next((number for number in names if number is not None), None)
        if pad != 0:
            what = "names no padding" if pad is None else f"pads with the id {pad}"
            raise ValueError(f"{key}: tokenizer.json {what}, but padding must be the id 0")
        self.size = self._tokenizer.get_vocab_size()

    def encode(self, texts: list[str], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids (N, length) int64, cut and padded, and the lengths (N,) int64 that the texts have uncut."""
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        rows = [self._tokenizer.encode(text).ids for text in texts]
        lengths = _lengths(rows)
        # The tokenizer itself cuts what is too long, because it knows which marks have to stay.
        self._tokenizer.enable_truncation(length)
        rows = [
            row if len(row) <= length else self._tokenizer.encode(text).ids
            for text, row in zip(texts, rows, strict=True)
        ]
        return _padded(rows, length), lengths


def vocabulary(name: str | None) -> HashedWords | WordPieces:
    """The vocabulary of an encoder, found as `pretrained_folder` says; None means hashed words. Errors: ValueError.

    >>> vocabulary(None).size
    2048
    """
    return HashedWords() if name is None else WordPieces(pretrained_folder(name, "tokenizer.json", group="data"))


def _padded(rows: list[list[int]], length: int) -> torch.Tensor:
    filled = [row + [0] * (length - len(row)) for row in rows]
    return torch.tensor(filled, dtype=torch.int64).view(len(rows), length)


def _lengths(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([len(row) for row in rows], dtype=torch.int64)
