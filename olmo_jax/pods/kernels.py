"""How long our attention kernels take on a TPU, from the compiler's own schedule.

The compiler has no estimate for a Pallas kernel, but can write down its final bundles of
instructions: one bundle is a cycle. A kernel is compiled for one chip, in a process of its own
whose environment asks for the bundles; those of each branch of a step are counted and multiplied by
how often a head takes it: once per pair of blocks of its kind, at the ends of rows, or always. That
knows neither waiting for memory nor what XLA does before and after the kernel.
"""

import glob
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from olmo_jax.config.model import MeshConfig
from olmo_jax.kernels import pallas_tpu, schedule
from olmo_jax.kernels.schedule import Blocks
from olmo_jax.parallel.sharding import make_mesh
from olmo_jax.pods.chips import CHIPS, ENVIRONMENT, Slice

NAMES = ("attention_forward", "attention_backward")  # of the kernels, in HLO and in dumps
_ONE_CHIP = {"v4": "v4:2x2x1", "v5e": "v5e:1x1", "v5p": "v5p:2x2x1", "v6e": "v6e:1x1",
             "tpu7x": "tpu7x:2x2x1"}  # fmt: skip
_SMALL = 48  # branches of fewer bundles are counted as always taken
# Room for large blocks of other kernels; ours ask for it themselves.
ROOM: dict[str, str | bool] = {"xla_tpu_scoped_vmem_limit_kib": "61440"}


class Case(NamedTuple):
    """A layer's attention on one chip, bf16, for one row."""

    chip: str
    seq: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    window: int | None = None
    n_documents: int = 0  # of unequal lengths; 0: no documents
    forward: Sequence[int] | None = None  # sizes of blocks; None: as the kernel chooses
    backward: Sequence[int] | None = None

    def tuning(self) -> pallas_tpu.TpuTuning:
        """As the kernel chooses it for this chip, but for sizes that were asked for."""
        chip = jax.sharding.AbstractDevice(CHIPS[self.chip].kind, 1, "tpu")
        mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=chip)
        with jax.sharding.use_abstract_mesh(mesh):
            tuning = pallas_tpu.tuning(self.head_dim, "bfloat16", self.n_documents > 0)
        asked = {w: Blocks(*x) for w in ("forward", "backward") if (x := getattr(self, w))}
        return tuning._replace(**asked)

    def document_ids(self) -> np.ndarray:
        """[1, seq] int32."""
        ends = np.random.default_rng(0).choice(
            np.arange(1, self.seq), self.n_documents - 1, replace=False
        )
        ids = np.searchsorted(np.sort(ends), np.arange(self.seq), side="right")
        return ids[None].astype(np.int32)


def seconds(case: Case) -> tuple[float, float]:
    """What one row takes, forward and backward.

    Raises:
      RuntimeError: if the kernel does not compile, or has another form than is known here.
    """
    command = [sys.executable, "-m", "olmo_jax.pods.kernels", json.dumps(case._asdict())]
    with bundles(command) as dump:
        forward, backward = (
            _seconds(case, way, dump(name))
            for way, name in zip(("forward", "backward"), NAMES, strict=True)
        )
    return forward, backward


def _seconds(case: Case, way: str, path: str) -> float:
    (opening, bodies, closing), always = branches(path)
    times = counts(case, way)
    # Around ours, chips of one core have branches of the pipeline of copies: one or two in a row.
    more = len(opening) - len(times.opening), len(closing) - len(times.closing)
    if len(bodies) != len(times.bodies) or not 0 <= min(more) <= max(more) <= 2:
        raise RuntimeError(
            f"{way}: the kernel has {len(opening)} + {len(bodies)} + {len(closing)} branches,"
            f" expected are {len(times.opening)} + {len(times.bodies)} + {len(times.closing)}"
        )
    often = [times.rows] * more[0] + [*times.opening, *times.bodies, *times.closing]
    often += [times.rows] * more[1]
    taken = zip([*opening, *bodies, *closing], often, strict=True)
    return per_row(case, sum(n * t for n, t in taken) + always * times.steps)


def per_row(case: Case, cycles: float) -> float:
    """Seconds for the heads of a row, of cycles for one head."""
    chip = CHIPS[case.chip]
    return cycles * case.n_heads / chip.cores / chip.clock


@contextmanager
def bundles(command: list[str]) -> Iterator[Any]:
    """Run a program that compiles; gives a function from a kernel's name to its bundles' file.

    Raises:
      RuntimeError: if it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
            " --xla_jf_dump_llo_pass_label_regex=packed-bundles-post-ra"
        )
        here = {"LIBTPU_INIT_ARGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
        environment = os.environ | ENVIRONMENT | here
        child = subprocess.run(command, env=environment, capture_output=True, encoding="utf-8")
        if child.returncode:
            said = child.stderr.strip().splitlines() or [f"signal {-child.returncode}"]
            raise RuntimeError(said[-1][-400:])

        def dump(name: str) -> str:
            found = glob.glob(f"{folder}/*{name}*packed-bundles-post-ra.txt")
            paths = [x for x in found if "schedule-analysis" not in x]
            if len(paths) != 1:
                raise RuntimeError(f"the compiler wrote {len(paths)} schedules of {name}")
            return paths[0]

        yield dump


def branches(path: str) -> tuple[tuple[list[int], list[int], list[int]], int]:
    """What a step of a kernel's grid does: the bundles of each branch, in order, before the first
    one with products, from there to the last, and after it; and those that are always passed.

    Raises:
      RuntimeError: if it has no loop over its grid, or no branch with products.
    """
    products, jumps = [], []
    for line in pathlib.Path(path).read_bytes().decode().splitlines():
        if not (found := re.match(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:", line)):
            continue
        here = int(found[1], 16)
        if "vmatmul" in line or "vmatpush" in line:
            products.append(here)
        if to := re.search(r"sbr\.rel.*?target bundleno = (\d+)", line):
            jumps.append((here, int(to[1])))
    if not any(to <= at for at, to in jumps):
        raise RuntimeError("the kernel has no loop over its grid")
    start, stop = max(((to, at) for at, to in jumps if to <= at), key=lambda x: x[1] - x[0])
    inside = sorted((at, to) for at, to in jumps if start <= at < to <= stop)
    length = stop - start
    while (top := _outermost(inside)) and (wide := [x for x in top if x[1] - x[0] > 0.9 * length]):
        inside.remove(wide[0])
    taken = [(to - at, any(at < p < to for p in products)) for at, to in _outermost(inside)]
    taken = [x for x in taken if x[0] >= _SMALL]
    sizes, has_products = [n for n, _ in taken], [x for _, x in taken]
    if True not in has_products:
        raise RuntimeError("the kernel has no branch with products")
    first, last = has_products.index(True), len(sizes) - has_products[::-1].index(True)
    return (sizes[:first], sizes[first:last], sizes[last:]), length - sum(sizes)


def _outermost(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for at, to in sorted(spans, key=lambda x: (x[0], -x[1])):
        if not found or at >= found[-1][1]:
            found.append((at, to))
    return found


class Branches(NamedTuple):
    """How often a head takes the branches before the products, with them, and after them; how many
    rows of pairs of blocks there are, and how many pairs."""

    opening: list[int]
    bodies: list[int]
    closing: list[int]
    rows: int
    steps: int


def counts(case: Case, way: str) -> Branches:
    """How often each branch of our kernel is taken by a head."""
    blocks = getattr(case.tuning(), way).fit(case.seq, case.seq)
    of_q, of_kv = -(-case.seq // blocks.q), -(-case.seq // blocks.kv)  # the last one is padded
    ids: list[jax.Array] | list[None] = [None, None]
    if case.n_documents:
        known, padded = case.document_ids(), (of_q * blocks.q, of_kv * blocks.kv)
        ids = [jnp.asarray(np.pad(known, [(0, 0), (0, n - case.seq)], "edge")) for n in padded]
    plan = schedule.make(
        of_q * blocks.q, of_kv * blocks.kv, blocks, by="q" if way == "forward" else "kv",
        window=case.window, q_ids=ids[0], kv_ids=ids[1],
    )  # fmt: skip
    kinds = np.asarray(schedule.kind(plan.pairs[0, : int(plan.count)]))
    n_kinds = 1 + (case.n_documents > 0) + len(schedule.borders(blocks, case.window))
    bodies = [int((kinds == schedule.FULL + i).sum()) for i in range(n_kinds)]
    if way == "forward":
        return Branches([1, of_q], bodies, [of_q], of_q, len(kinds))
    return Branches([of_kv, of_q], bodies, [of_q, of_kv], of_kv, len(kinds))


def one_chip(name: str) -> Mesh:
    """A mesh of a single chip, such as "v5p", to compile for."""
    return make_mesh(MeshConfig(), Slice.parse(_ONE_CHIP[name]).devices()[:1])


def compile_kernels(case: Case, run: Any = None) -> None:
    """Compile attention, forward and backward, for one chip.

    Args:
      case: what to compile.
      run: `(q, k, v, segment_ids) -> out` on `[heads, seq, head_dim]`; None: ours.
    """
    mesh = one_chip(case.chip)
    whole = jax.NamedSharding(mesh, jax.P())

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=whole)

    def ours(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array | None) -> jax.Array:
        q, k, v = (jnp.swapaxes(x, 0, 1)[None] for x in (q, k, v))
        out = pallas_tpu.attention(q, k, v, ids, case.window, case.head_dim**-0.5, case.tuning())
        return jnp.swapaxes(out[0], 0, 1)

    def both(q: Any, k: Any, v: Any, ids: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(lambda q, k, v: (run or ours)(q, k, v, ids), q, k, v)
        return out, pull(d_out)

    q = array(case.n_heads, case.seq, case.head_dim)
    kv = array(case.n_kv_heads, case.seq, case.head_dim)
    ids = array(1, case.seq, dtype=jnp.int32) if case.n_documents else None
    with jax.set_mesh(mesh):
        jax.jit(both).lower(q, kv, kv, ids, q).compile(compiler_options=ROOM)


if __name__ == "__main__":
    compile_kernels(Case(**json.loads(sys.argv[1])))
