"""Text to ids and back, for Hugging Face `tokenizer.json` and sentencepiece `.model` files.

Both kinds follow the same rules: no BOS or EOS is ever added, whatever the file says; a special
token's name inside a text is ordinary text (so a document cannot forge a boundary); special ids
decode to no text. Who wants an EOS appends `eos_id`.
"""

import os
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from olmo_jax import files

EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")


class Tokenizer:
    """A tokenizer file, behind the same few calls for every format."""

    def __init__(self, path: str | os.PathLike[str], eos: str | None = None):
        """Load `tokenizer.json` (any name but *.model) or a sentencepiece `.model`.

        Args:
          path: the file.
          eos: the text of the EOS token; None: the first of EOS_NAMES that the file has, or
            what the sentencepiece model says.

        Raises:
          FileNotFoundError: if there is no such file.
          ValueError: if it is not a tokenizer, or has no token `eos`.
        """
        if not pathlib.Path(path).is_file():
            raise FileNotFoundError(f"config.data.tokenizer: {path}: no such file")
        content = pathlib.Path(path).read_bytes()
        kind = _SentencePiece if pathlib.Path(path).suffix == ".model" else _HuggingFace
        try:
            self._backend = kind(content, eos)
        except Exception as error:  # both packages raise bare Exception or RuntimeError
            raise ValueError(f"config.data.tokenizer: cannot read {path}: {error}") from error
        self._content = content

    @classmethod
    def train_bpe(
        cls, texts: Iterable[str], vocab_size: int, eos: str = "<|endoftext|>"
    ) -> "Tokenizer":
        """A byte-level BPE trained on `texts`; the same texts give the same tokenizer.

        Args:
          texts: what to learn merges from. Words are split by GPT-2's rule, which gives 1 %
            fewer tokens on Python source than that of dolma2.
          vocab_size: ids, with 256 bytes and `eos` (which gets id 0) among them; a small text
            may give fewer.
          eos: name of the EOS token.

        Raises:
          ValueError: if `vocab_size` cannot hold the bytes and the EOS.
        """
        if vocab_size < 257:
            raise ValueError(f"vocab_size={vocab_size}: 256 bytes and the EOS need at least 257")
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
        bpe.decoder = decoders.ByteLevel()  # type: ignore
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[eos],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        self = cls.__new__(cls)
        self._content = bpe.to_str(pretty=True).encode()
        self._backend = _HuggingFace(self._content, eos)
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file that this tokenizer was made from, byte for byte."""
        with files.whole(path) as file:
            file.write(self._content)

    @property
    def vocab_size(self) -> int:
        """The largest id + 1."""
        return self._backend.vocab_size

    @property
    def eos_id(self) -> int | None:
        """The id that ends a document; None where the file names none."""
        return self._backend.eos_id

    def special(self) -> dict[int, str]:
        """Ids and names of the EOS and of all tokens that no text is merged to."""
        return self._backend.special()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, and nothing but them."""
        return self._backend.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text; uses all cores for `tokenizer.json` files."""
        return self._backend.encode_batch(list(texts))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD, special ids nothing."""
        return self._backend.decode([int(i) for i in ids])

    def byte_lengths(self) -> np.ndarray:
        """How many bytes of text each id stands for, int32 `[vocab_size]`; 0 for special ids.

        The sum over `encode(text)` is exactly `len(text.encode())` for a byte-level BPE without
        normalizer (dolma2, `train_bpe`) and for sentencepiece with byte fallback, identity
        normalization and no dummy prefix. A normalizer changes bytes before they are counted; a
        dummy prefix counts one space per text; an unknown token counts 0.
        """
        return self._backend.byte_lengths()


class _HuggingFace:
    """The Rust package `tokenizers`, for any `tokenizer.json`."""

    def __init__(self, content: bytes, eos: str | None):
        self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        self._tokenizer.no_truncation()  # both may be left in the file by whoever saved it
        self._tokenizer.no_padding()
        names = self._tokenizer.get_vocab()
        self.vocab_size = max(names.values()) + 1
        if eos is not None and eos not in names:
            raise ValueError(f"it has no token {eos!r}")
        known = [name for name in EOS_NAMES if name in names] if eos is None else [eos]
        self.eos_id = names[known[0]] if known else None
        if known:  # some files declare their EOS as an ordinary added token
            self._tokenizer.add_special_tokens(known[:1])
        self._tokenizer.encode_special_tokens = True  # as text: documents may contain their names

    def special(self) -> dict[int, str]:
        return {i: t.content for i, t in self._tokenizer.get_added_tokens_decoder().items()}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        batch = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def byte_lengths(self) -> np.ndarray:
        parts = (self._tokenizer.pre_tokenizer, self._tokenizer.decoder)
        byte_level = any("ByteLevel" in repr(part) for part in parts)
        lengths = np.zeros(self.vocab_size, np.int32)
        for piece, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            # Byte-level pieces write every byte as one printable character.
            lengths[i] = len(piece) if byte_level else _piece_bytes(piece)
        for i, token in self._tokenizer.get_added_tokens_decoder().items():
            lengths[i] = 0 if token.special else len(token.content.encode())
        return lengths


class _SentencePiece:
    """The package `sentencepiece`."""

    def __init__(self, content: bytes, eos: str | None):
        self._model = sentencepiece.SentencePieceProcessor(model_proto=content)
        self.vocab_size = self._model.get_piece_size()
        self.eos_id = self._model.eos_id() if self._model.eos_id() >= 0 else None
        if eos is not None:
            self.eos_id = self._model.piece_to_id(eos)
            if self._model.id_to_piece(self.eos_id) != eos:  # it answers <unk> for any other
                raise ValueError(f"it has no token {eos!r}")

    def special(self) -> dict[int, str]:
        m = self._model
        return {i: m.id_to_piece(i) for i in range(len(m)) if m.is_control(i) or i == self.eos_id}

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self._model.encode(texts, add_bos=False, add_eos=False)

    def decode(self, ids: list[int]) -> str:
        return self._model.decode(ids)

    def byte_lengths(self) -> np.ndarray:
        m: Any = self._model
        special = lambda i: m.is_control(i) or m.is_unknown(i) or m.is_unused(i)  # noqa: E731
        lengths = [0 if special(i) else _piece_bytes(m.id_to_piece(i)) for i in range(len(m))]
        return np.array(lengths, np.int32)


def _piece_bytes(piece: str) -> int:
    """Bytes of a sentencepiece piece: `<0x0A>` is one, and `▁` a space."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return 1
    return len(piece.replace("▁", " ").encode())
