"""The training step and, in words, what the compiler made of it: memory, FLOPs, collectives."""

import contextlib
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import compilation_cache  # in public it cannot be read
from jax.sharding import Mesh

from olmo_jax import files
from olmo_jax.config.costs import GIB
from olmo_jax.config.options import ConfigError
from olmo_jax.files import brief
from olmo_jax.parallel import xla_flags
from olmo_jax.parallel.processes import say
from olmo_jax.records import writer
from olmo_jax.training.losses import Arrays
from olmo_jax.training.state import TrainState
from olmo_jax.training.step import Jitted, Report

COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "ragged-all-to-all", "all-to-all",
    "collective-permute",
)  # fmt: skip


KEPT_FROM_S = 0.5  # a program that is compiled in less is not worth a file
_read_compiled = compilation_cache.get_executable_and_time


def keep_compiled(name: str) -> None:
    """Keep compiled programs in a folder, where that can be written, for the starts that follow."""
    try:
        folder = files.path(name)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError, ImportError) as error:  # slower starts are no reason to end a run
        reason = getattr(error, "strerror", None) or error
        say(f"compute.compilation_cache: cannot write {brief(name)}: {reason}")
        return
    say(f"compilation cache: {folder}")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", KEPT_FROM_S)
    compilation_cache.get_executable_and_time = _compiled


def _compiled(key: str, *arguments: Any) -> Any:
    """JAX's own function, but an entry that a kill tore is removed.

    JAX warns of it at every start, and never writes it anew.
    """
    try:
        return _read_compiled(key, *arguments)
    except OSError:  # of the disk
        raise
    except Exception as error:
        entry = files.path(jax.config.jax_compilation_cache_dir) / f"{key}-cache"  # type: ignore
        entry.unlink(missing_ok=True)
        why = brief(str(error) or type(error).__name__)
        say(f"compute.compilation_cache: removed {entry.name}, which is damaged ({why})")
        return None, None


class CompiledUpdate:
    """An update, compiled ahead of its first call with each shape of a batch.

    JAX keeps the program for the calls that follow: nothing is compiled twice.

    Args:
      update: from `step.make_update`.
      log: records what the compiler said, at the step that is called next.
      flags: `compute.xla_flags`.
      row_flops: useful FLOPs of a row of so many tokens, by formula.
    """

    def __init__(
        self,
        update: Jitted,
        log: writer.Writer,
        flags: tuple[str, ...],
        row_flops: Callable[[int], float],
    ):
        self._update, self._log = update, log
        self._flags, self._row_flops = flags, row_flops
        self._shapes: set[tuple[int, int]] = set()  # of batches whose program is there

    def __call__(
        self, at: int, state: TrainState, batch: Arrays, lr: Any, max_grad_norm: Any
    ) -> tuple[TrainState, Report]:
        """One update, number `at`; returns without waiting for the devices."""
        arguments = state, batch, lr, max_grad_norm
        rows, seq_len = batch["tokens"].shape
        if (rows, seq_len) not in self._shapes:
            self._compile(at, rows, seq_len, arguments)
        return self._update(*arguments)

    def _compile(self, at: int, rows: int, seq_len: int, arguments: Any) -> None:
        kind = self._update.mesh.devices.flat[0].device_kind
        if not self._shapes:
            chosen = xla_flags.flags(kind, self._flags)
            for name, (value, reason) in chosen.items():
                say(f"XLA flag: {name}={value} ({reason})")
        self._shapes.add((rows, seq_len))
        say(f"compiling the step for batches of {rows:,} rows")
        began = time.perf_counter()
        with _cache_hits() as hits:
            compiled = self._update.lower(*arguments).compile()
        seconds = time.perf_counter() - began
        say(f"compiled in {seconds:.1f} s{' (found in the compilation cache)' if hits else ''}")
        memory = memory_of(compiled, arguments)
        there = jax.local_devices()[0].memory_stats() or {}  # a CPU has none
        say(f"  memory per device: {memory_words(memory, there.get('bytes_limit'))}")
        by_formula = self._row_flops(seq_len) * rows / self._update.mesh.size
        by_compiler = (compiled.cost_analysis() or {}).get("flops", math.nan)
        say(
            f"  FLOPs per device: {by_formula:.3g} by formula; {by_compiler:.3g} by the compiler,"
            " which counts the body of a loop once"
        )
        if jax.process_index() == 0:  # the text of a large program takes seconds
            found = collectives(compiled.as_text())
            words = ", ".join(f"{n} {name}" for name, n in sorted(found.items())) or "none"
            say(f"  collectives, those of a loop's body once: {words}")
        self._log.write(
            at,
            {"compile/duration_s": seconds, "compile/FLOPs per device": by_formula}
            | {f"compile/{name} memory per device (GiB)": n / GIB for name, n in memory.items()},
        )


@contextlib.contextmanager
def _cache_hits() -> Iterator[list[str]]:
    """Gives a list that fills with the programs found in the persistent compilation cache."""
    hits: list[str] = []

    def listen(event: str, **_: Any) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


def check_flags(flags: tuple[str, ...], mesh: Mesh) -> None:
    """Show the flags of the step to the compiler, with a program of one number.

    Raises:
      ConfigError: if it refuses an option of `compute.xla_flags`.
    """
    kind = mesh.devices.flat[0].device_kind
    chosen: Any = xla_flags.options(kind, flags)
    try:
        jax.jit(lambda: 0).lower().compile(compiler_options=chosen)
    except jax.errors.JaxRuntimeError as error:
        raise _explained(error) from error


def _explained(error: Exception) -> Exception:
    """A compiler's complaint about a flag as one line that names the option; else the error."""
    option, text = "config.compute.xla_flags", str(error)
    if found := re.search(r"No such compile option: '(\w+)'", text):
        found = f"{option}: this compiler has no flag {found[1]}; {found[1]}=none leaves it out"
        return ConfigError([found])
    if found := re.search(r"While setting option (\w+), '(.*?)' is not a valid (\w+)", text):
        name, value, kind = found.groups()
        return ConfigError([f"{option}: {name}={value}: need a value of type {kind}"])
    return error


def memory_of(compiled: Any, arguments: tuple[TrainState, Arrays, Any, Any]) -> dict[str, int]:
    """Bytes that a compiled step takes on a device: `parameters`, `optimizer`, `batch`,
    `temporary`, and the `total` with the program itself.

    Args:
      compiled: of the step.
      arguments: what it was compiled for; arrays, or their shapes and shardings.
    """  # fmt: skip
    state, batch, *_ = arguments
    sizes = compiled.memory_analysis()
    total = (
        sizes.argument_size_in_bytes
        + (sizes.output_size_in_bytes - sizes.alias_size_in_bytes)  # the new state is the old one's
        + sizes.temp_size_in_bytes
        + sizes.generated_code_size_in_bytes
    )
    return {
        "parameters": _shard_bytes(state.params),
        "optimizer": _shard_bytes(state.opt_state),
        "batch": _shard_bytes(batch),
        "temporary": sizes.temp_size_in_bytes,
        "total": total,
    }


def _shard_bytes(tree: Any) -> int:
    return sum(
        math.prod(a.sharding.shard_shape(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree)
    )


def memory_words(memory: dict[str, int], limit: int | None) -> str:
    """`12.1 GiB of 95.7: parameters 1.7, optimizer 3.4, …`, or in MiB.

    Args:
      memory: bytes by name, from `memory_of`.
      limit: bytes that the device has, where it tells.
    """
    unit, size = ("GiB", GIB) if memory["total"] > GIB / 4 else ("MiB", GIB // 1024)
    of = f" of {limit / size:.4g}" if limit else ""
    parts = [f"{name} {n / size:.3g}" for name, n in memory.items() if name != "total"]
    return f"{memory['total'] / size:.3g} {unit}{of}: {', '.join(parts)}"


def collectives(hlo: str) -> Counter[str]:
    """How many collectives of each kind the text of a program has, whatever repeats them."""
    return Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", hlo))
