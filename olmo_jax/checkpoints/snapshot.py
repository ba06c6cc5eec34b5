"""The state of a run, written by all its processes together, if wanted behind the training."""

import collections
import contextlib
import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from olmo_jax import files
from olmo_jax.checkpoints import layout, storage
from olmo_jax.files import Path
from olmo_jax.parallel import processes

Part = tuple[str, tuple[int, ...], np.ndarray]  # leaf, where it starts, values

_calls = itertools.count()  # all processes save the same things in the same order


def save(
    folder: Path,
    tree: Any,
    meta: Mapping[str, Any],
    *,
    kind: str = "permanent",
    files: Mapping[str, bytes] | None = None,
    background: bool = False,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
) -> "Save":
    """Save a tree of arrays; with several processes all call this, each writes its own shards.

    Args:
      folder: new or empty, from `storage.path`; all processes see it.
      tree: jax.Arrays, which may be donated as soon as this returns, or NumPy arrays.
      meta, kind, files: as in `storage.ArrayWriter.commit`.
      background: copy to the host and return; a thread writes.
      before, after: run by process 0 ahead of the writing, and when the checkpoint is complete.
    Raises:
      OSError: if the save failed; in the background, `Save.wait` raises it.
    """
    meta = json.loads(json.dumps(meta))  # as it is now, not when the thread comes to it
    arrays = storage.names(tree)
    leaves = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))
        for name, x in arrays.items()
    }
    shards = [shard for i, (name, x) in enumerate(arrays.items()) for shard in _own(i, name, x)]
    if background:
        for _, _, data in shards:
            if isinstance(data, jax.Array):
                data.copy_to_host_async()
    blocks = itertools.chain.from_iterable(
        _chunks(name, origin, data, layout.chunk_shape(name, leaves[name]), copy=background)
        for name, origin, data in shards
    )
    if background:
        blocks = _drain(collections.deque(blocks))

    def commit(writer: storage.ArrayWriter) -> None:
        writer.commit(meta, kind=kind, files=files)

    job = Save(folder, leaves, blocks, before, commit, after)
    if not background:
        job.wait()
    return job


class Save:
    """A save under way; `save` makes it."""

    def __init__(
        self,
        folder: files.Path,
        leaves: layout.Leaves,
        blocks: Iterable[Part],
        before: Callable[[], None],
        commit: Callable[[storage.ArrayWriter], None],
        after: Callable[[], None],
    ):
        self.error: str | None = None  # why it failed, in one line
        self.seconds = 0.0  # that it took
        self._folder, self._leaves, self._blocks = folder, leaves, blocks
        self._before, self._commit, self._after = before, commit, after
        self._writer: storage.ArrayWriter | None = None
        self._key = f"olmo_jax save {folder} {next(_calls)}"
        # Not a daemon: a process that ends waits for its last checkpoint.
        self._thread = threading.Thread(target=self._run, name=f"save {folder.name}")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the end.

        Raises:
          OSError: if the save failed in any process.
        """
        self._thread.join()
        if self.error:
            raise OSError(self.error)

    def _run(self) -> None:
        began = time.perf_counter()
        try:
            processes.from_process_0(self._prepare, f"{self._key} begin")
            error = self._write()
            processes.tell(f"{self._key} {jax.process_index()}", error)
            processes.from_process_0(lambda: self._finish(error), f"{self._key} end")
        except Exception as failure:
            self.error = f"checkpoint {self._folder} was not saved: {storage.cause(failure)}"
        self.seconds = time.perf_counter() - began

    def _prepare(self) -> None:
        self._before()
        self._writer = storage.ArrayWriter(self._folder, self._leaves)

    def _write(self) -> str:
        """Write the blocks of this process; the error, if any, is for process 0 to hear."""
        try:
            if self._writer is None:
                self._writer = storage.ArrayWriter(self._folder, self._leaves, create=False)
            for block in self._blocks:
                self._writer.write(*block)
            self._writer.wait()
        except Exception as error:
            return storage.cause(error)
        return ""

    def _finish(self, own_error: str) -> None:
        others = range(1, jax.process_count())
        try:
            errors = {i: processes.hear(f"{self._key} {i}") for i in others} | {0: own_error}
            wrong = [f"process {i}: {error}" for i, error in sorted(errors.items()) if error]
            if wrong:
                raise OSError("; ".join(wrong) if others else own_error)
            assert self._writer is not None
            self._commit(self._writer)
        except Exception:
            with contextlib.suppress(OSError):  # make room; what is left does not count
                layout.remove(self._folder)
            raise
        self._after()


def _own(number: int, name: str, x: Any) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    """The shards that this process writes: (leaf, first index, data); replicas take turns."""
    if not isinstance(x, jax.Array):
        if jax.process_index() == 0:
            yield name, (0,) * x.ndim, x
        return
    shard_shape = x.sharding.shard_shape(x.shape)
    n_shards = math.prod(a // b for a, b in zip(x.shape, shard_shape, strict=True) if b)
    n_replicas = len(x.sharding.device_set) // n_shards
    for shard in x.addressable_shards:
        if shard.replica_id == number % n_replicas:
            yield name, tuple(part.start or 0 for part in shard.index), shard.data


def _chunks(
    name: str, origin: Sequence[int], data: Any, chunk: Sequence[int], copy: bool
) -> Iterator[Part]:
    # A CPU array's NumPy view is the array itself, which the next step will overwrite.
    is_view = not isinstance(data, jax.Array) or next(iter(data.devices())).platform == "cpu"
    host = np.asarray(data)
    for start in itertools.product(*map(range, itertools.repeat(0), host.shape, chunk)):
        block = host[tuple(slice(i, i + n) for i, n in zip(start, chunk, strict=True))]
        where = tuple(a + b for a, b in zip(origin, start, strict=True))
        yield name, where, block.copy() if copy and is_view else block


def _drain(queue: collections.deque[Part]) -> Iterator[Part]:
    """Let go of each block as it is written."""
    while queue:
        yield queue.popleft()
