"""Loss, perplexity and bits per byte of held-out token files.

A file is scored as one stream. Rows of `seq_len` tokens start `stride` tokens apart and each
scores only what the row before has not, so that every token is scored exactly once, and with at
least `seq_len - stride` tokens of context wherever the stream has so many. The first token is
scored with an EOS in front, where the EOS is known; else it is only context.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from olmo_jax.config.data import DataConfig
from olmo_jax.config.model import ComputeConfig, ModelConfig
from olmo_jax.config.training import EvalConfig
from olmo_jax.data import checks
from olmo_jax.data.batch import segments
from olmo_jax.data.documents import read_boundaries
from olmo_jax.data.token_files import TokenFile, TokenFiles, resolve_paths, token_dtype
from olmo_jax.data.tokenizer import Tokenizer
from olmo_jax.nn.transformer import Transformer
from olmo_jax.parallel import sharding
from olmo_jax.training import step
from olmo_jax.training.loop import Budget

EvalStep = Callable[[Any, Any], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Score:
    """What a model thinks of a text, as sums and counts."""

    nats: float  # -ln p, summed over the scored tokens
    n_tokens: int  # scored, the EOS of each document among them
    n_bytes: int | None  # of text that the scored tokens stand for; None: not known

    @property
    def ce(self) -> float:
        """Mean cross-entropy, nats per token."""
        return self.nats / self.n_tokens

    @property
    def ppl(self) -> float:
        """Perplexity per token; infinite where it is too large for a float."""
        return math.exp(self.ce) if self.ce < 700 else math.inf

    @property
    def bits_per_byte(self) -> float | None:
        """Bits per byte of text, comparable across tokenizers; None if bytes are not known."""
        return self.nats / (self.n_bytes * math.log(2)) if self.n_bytes else None


@dataclasses.dataclass(frozen=True)
class Stream:
    """One held-out text as tokens.

    Args:
      tokens: [n], or a file, of which only the rows that are scored are in memory.
      eos_id: stands before the first token; None: the first token is not scored.
      document_starts: sorted offsets, the first 0, that attention does not look behind; None: it
        looks across documents.
      byte_lengths: bytes of text per id, [vocab_size]; None: not known.
    """

    tokens: np.ndarray | TokenFile
    eos_id: int | None = None
    document_starts: np.ndarray | None = None
    byte_lengths: np.ndarray | None = None

    @property
    def n_targets(self) -> int:
        """Tokens that are scored."""
        return len(self.tokens) - (self.eos_id is None)


def evaluate(
    eval_step: EvalStep,
    params: Any,
    mesh: Mesh,
    stream: Stream,
    *,
    seq_len: int,
    stride: int | None = None,
    batch_rows: int = 16,
    max_rows: int | None = None,
) -> Score:
    """Score a stream, with one shape of batch (the last one is filled up with weight 0).

    Args:
      eval_step: `(params, batch) -> {"ce_sum": …}`, from `step.make_eval_step`.
      params: of the model.
      mesh: where batches go.
      stream: what to score.
      seq_len: tokens per row.
      stride: tokens that a row scores; None: all of the row.
      batch_rows: rows per batch, rounded up to what the mesh can split.
      max_rows: score only so many rows, evenly spaced over the stream; None: all.

    Raises:
      ValueError: if there is nothing to score, or `stride` is not in [1, seq_len].
    """
    stride = seq_len if stride is None else stride
    if not 1 <= stride <= seq_len:
        raise ValueError(f"config.eval.stride={stride}: need 1 to seq_len={seq_len}")
    if stream.n_targets < 1:
        raise ValueError(f"config.eval.paths: {len(stream.tokens)} tokens hold nothing to score")
    n_rows = 1 + -(-max(0, stream.n_targets - seq_len) // stride)
    rows = np.arange(n_rows)
    if max_rows is not None and max_rows < n_rows:
        rows = np.linspace(0, n_rows - 1, max_rows).astype(np.int64)
    ways = sharding.data_parallel_ways(mesh)
    batch_rows = -(-batch_rows // ways) * ways

    nats, n_tokens, n_bytes = 0.0, 0, 0
    for batch in _batches(stream, rows, seq_len, stride, batch_rows):
        scored = batch["loss_weights"] > 0
        n_tokens += int(scored.sum())
        if stream.byte_lengths is not None:
            n_bytes += int(stream.byte_lengths[batch["targets"][scored]].sum())
        arrays = sharding.to_global(batch, mesh, batch_rows, np.arange(batch_rows))
        # Waiting for each batch keeps many virtual CPU devices from starving in a collective.
        nats += float(eval_step(params, arrays)["ce_sum"])
    return Score(nats, n_tokens, None if stream.byte_lengths is None else n_bytes)


def _batches(
    stream: Stream, rows: np.ndarray, seq_len: int, stride: int, batch_rows: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches `[batch_rows, seq_len]` of numbered rows of the stream."""
    columns = np.arange(seq_len + 1)[None] - (stream.eos_id is not None)  # -1: the EOS in front
    for first in range(0, len(rows), batch_rows):
        chosen = rows[first : first + batch_rows]
        filled = np.pad(chosen, (0, batch_rows - len(chosen)), mode="edge")[:, None]
        place = filled * stride + columns  # [batch_rows, seq_len + 1]
        ids = np.stack([_row(stream, begin, seq_len + 1) for begin in place[:, 0].tolist()])
        scored = place[:, 1:] < len(stream.tokens)
        scored &= np.arange(batch_rows)[:, None] < len(chosen)
        scored &= (filled == 0) | (np.arange(seq_len)[None] >= seq_len - stride)
        batch = {
            "tokens": ids[:, :-1],
            "targets": ids[:, 1:],
            "loss_weights": scored.astype(np.float32),
        }
        if (starts := stream.document_starts) is not None:
            last = starts.searchsorted(place[:, :-1], "right") - 1
            is_start = starts[last] == place[:, :-1]
            batch["segment_ids"], batch["positions"] = segments(is_start)
        yield batch


def _row(stream: Stream, first: int, width: int) -> np.ndarray:
    """The tokens from `first` on, [width] int32: -1 is the EOS in front, the last one repeats."""
    row = np.empty(width, np.int32)
    if first < 0:
        assert stream.eos_id is not None  # nothing else is in front
        row[0] = stream.eos_id
    there = stream.tokens[max(first, 0) : first + width]
    at = max(-first, 0)
    row[at : at + len(there)] = there
    row[at + len(there) :] = there[-1]
    return row


class HeldOut:
    """The files of `config.eval.paths`, opened and checked once, scored whenever called."""

    def __init__(
        self,
        options: EvalConfig,
        data: DataConfig,
        model: ModelConfig,
        compute: ComputeConfig,
        mesh: Mesh,
    ):
        """Open the files.

        Args:
          options: which files, and in which rows.
          data: how tokens are stored, and documents masked, in training.
          model: what is scored.
          compute: how it is computed.
          mesh: where.
        Raises:
          FileNotFoundError: if a file is missing.
          ValueError: if a file is no token file of this model, or two files have one name.
        """
        self._options, self._seq_len, self._mesh = options, options.seq_len or data.seq_len, mesh
        self._eval_step = step.make_eval_step(Transformer(model, compute), mesh)
        option, vocab_size = "config.eval.paths", model.vocab_size
        paths = resolve_paths(options.paths, data.root, option=option)
        files = TokenFiles(paths, token_dtype(data.dtype, vocab_size), option)
        checks.check(files, vocab_size, check_dtype=data.check_dtype)
        if data.check_dtype and data.document_mask != "boundaries":
            checks.check_side_files(files)
        lengths = _byte_lengths(data.tokenizer, vocab_size)
        self.streams: dict[str, Stream] = {}
        for i, path in enumerate(paths):
            for start, ids in files.pieces(i):
                files.check_ids(i, start, ids, vocab_size)
            if Path(path).stem in self.streams:
                raise ValueError(f"{option}: two files are called {Path(path).stem}")
            starts = _document_starts(data, files, i)
            stream = Stream(TokenFile(files, i), data.eos_id, starts, lengths)
            if not stream.n_targets:
                raise ValueError(
                    f"{option}: {path} has one token and nothing to score: the first one needs"
                    " config.data.eos_id before it"
                )
            self.streams[Path(path).stem] = stream

    def scores(
        self,
        params: Any,
        max_rows: int | None = None,
        on_batch: Callable[[], object] = lambda: None,
    ) -> dict[str, Score]:
        """The score of each file, by the stem of its name; of `max_rows` rows only if given.

        `on_batch` is called before each batch, and may end the evaluation by raising.
        """

        def eval_step(params: Any, batch: Any) -> dict[str, Any]:
            on_batch()
            return self._eval_step(params, batch)

        e, seq_len = self._options, self._seq_len
        options = {"stride": e.stride, "batch_rows": e.batch_rows, "max_rows": max_rows}
        return {
            label: evaluate(eval_step, params, self._mesh, stream, seq_len=seq_len, **options)
            for label, stream in self.streams.items()
        }

    def __call__(self, params: Any, budget: Budget) -> dict[str, float]:
        """The `scores` under OLMo-core's names, with `BPB` beside them where bytes are known."""
        out = {}
        for label, score in self.scores(params, *budget).items():
            out[f"eval/lm/{label}/CE loss"] = score.ce
            out[f"eval/lm/{label}/PPL"] = score.ppl
            if score.bits_per_byte is not None:
                out[f"eval/lm/{label}/BPB"] = score.bits_per_byte
        return out


def _byte_lengths(tokenizer: str | None, vocab_size: int) -> np.ndarray | None:
    """Bytes per id of the run's tokenizer, 0 for ids that it lacks, `[≥ vocab_size]`."""
    if tokenizer is None:
        return None
    lengths = Tokenizer(tokenizer).byte_lengths()
    return np.pad(lengths, (0, max(0, vocab_size - len(lengths))))


def _document_starts(data: DataConfig, files: TokenFiles, file: int) -> np.ndarray | None:
    """Where documents of a file start, if training masks them; found in the same way."""
    if data.document_mask == "none":
        return None
    if data.document_mask == "boundaries":
        return np.append(0, read_boundaries(files.paths[file], int(files.lengths[file])))
    ends = [at + np.flatnonzero(ids == data.eos_id) + 1 for at, ids in files.pieces(file)]
    return np.concatenate([[0], *ends])
