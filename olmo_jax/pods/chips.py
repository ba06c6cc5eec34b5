"""TPU chips: what they can do, slices of them, and how fast a group of them exchanges data."""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from olmo_jax.config import costs
from olmo_jax.config.costs import GIB
from olmo_jax.config.model import MeshConfig
from olmo_jax.config.options import shown
from olmo_jax.parallel.sharding import make_mesh

AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))
# What libtpu must find before it starts on a machine that has no TPU.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",  # else it waits for a server of Google's cloud
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device as JAX counts them: a chip, or for tpu7x one of its two cores.

    Attributes:
      kind: JAX's `device_kind`.
      clock: of the compiler's estimates, cycles per second.
      hbm: bytes that the compiler lets a program use.
      bandwidth: of HBM, bytes/s.
      link: bytes/s that a device sends in one direction of one axis of the torus.
      wraps: length from which an axis is a ring, and not a line.
      cores: that share the heads of an attention kernel.
      hosts: chips of a host, where the topology must be told.
    """

    kind: str
    clock: float
    hbm: float
    bandwidth: float
    link: float
    wraps: int
    cores: int = 1
    hosts: tuple[int, int, int] | None = None

    @property
    def peak(self) -> float:
        """bf16 FLOP/s of the data sheet, what MFU is a share of."""
        return costs.peak_flops(self.kind) or math.nan


CHIPS = {
    "v4": Chip("TPU v4", 1.05e9, 30.75 * GIB, 1.2e12, 45e9, 4, cores=2),
    "v5e": Chip("TPU v5 lite", 1.5e9, 15.75 * GIB, 0.82e12, 45e9, 16, hosts=(2, 2, 1)),
    "v5p": Chip("TPU v5", 1.75e9, 95.73 * GIB, 2.765e12, 90e9, 4, cores=2),
    "v6e": Chip("TPU v6 lite", 1.75e9, 31.24 * GIB, 1.64e12, 90e9, 16, hosts=(2, 2, 1)),
    "tpu7x": Chip("TPU7x", 2.2e9, 94.75 * GIB, 3.69e12, 90e9, 4),
}


class NoSuchMeshError(ValueError):
    """A torus cannot be divided as a mesh asks."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """A slice of TPU chips such as v5p:4x4x8."""

    name: str
    chip: Chip
    shape: tuple[int, ...]

    @classmethod
    def parse(cls, name: str) -> "Slice":
        """From its name.

        Raises:
          ValueError: if no such slice is known.
        """
        found = re.fullmatch(r"(\w+):(\d{1,4}(?:x\d{1,4}){1,2})", name)
        if found is None or found[1] not in CHIPS:
            raise ValueError(
                f"topology {shown(name)}: needed is CHIP:AxB or CHIP:AxBxC, such as v5p:4x4x8, with"
                f" a chip of {', '.join(CHIPS)}"
            )
        chip, shape = CHIPS[found[1]], tuple(map(int, found[2].split("x")))
        if (wanted := 2 if chip.hosts else 3) != len(shape):
            raise ValueError(f"topology {name!r}: slices of {found[1]} have {wanted} dimensions")
        return cls(name, chip, shape)

    @property
    def n_devices(self) -> int:
        """As JAX counts them."""
        return math.prod(self.shape) * (2 if self.chip.kind == "TPU7x" else 1)

    @property
    def size(self) -> str:
        """How many devices, in words."""
        return f"{self.n_devices} devices"

    @functools.cache  # noqa: B019  (slices are few, and their devices are always the same)
    def devices(self) -> list[Any]:
        """The devices, which are not here: to compile for, not to run on.

        Raises:
          ValueError: if libtpu is missing or does not know the slice.
        """
        options: dict[str, Any] = {}
        if self.chip.hosts:
            options["chips_per_host_bounds"] = tuple(
                min(of_slice, of_host)
                for of_slice, of_host in zip((*self.shape, 1), self.chip.hosts, strict=True)
            )
        if self.chip.kind == "TPU v4":
            options["chip_config_name"] = "megacore"
        if importlib.util.find_spec("libtpu") is None:
            raise ValueError("the TPU compiler is not installed; it comes with `jax[tpu]`")
        os.environ |= ENVIRONMENT
        try:
            with _silence():
                there = topologies.get_topology_desc(self.name, "tpu", **options)
        except Exception as error:
            reason = str(error).strip().splitlines()[0][:300]
            raise ValueError(f"topology {self.name!r}: {reason}") from error
        return list(there.devices)

    def mesh(self, config: MeshConfig) -> Mesh:
        """A mesh over the slice, laid along its torus.

        Raises:
          ValueError: as `devices`.
          NoSuchMeshError: if the torus cannot be divided so.
        """
        try:
            return make_mesh(config, self.devices())
        except NotImplementedError as error:
            raise NoSuchMeshError(f"topology {self.name!r} has no such mesh: {error}") from error

    def rates(self, mesh: MeshConfig) -> dict[str, float]:
        """Bytes/s that a device sends in a group along each axis of a mesh."""
        devices, found = self.mesh(mesh).devices, {}
        for at, axis in enumerate(AXES):
            line = np.moveaxis(devices, at, -1).reshape(-1, devices.shape[at])[0]
            found[axis] = self.exchange([tuple(device.coords) for device in line])
        return found

    def exchange(self, places: Sequence[tuple[int, ...]]) -> float:
        """Bytes/s that each device of a group sends, in all directions that the group spans.

        Args:
          places: coordinates of the group's devices in the torus.
        """
        sent = 0.0
        for axis, length in enumerate(self.shape):
            used = len({place[axis] for place in places})
            if used > 1:
                is_ring = used == length >= self.chip.wraps
                sent += self.chip.link * (2 if is_ring else 1)
        return sent or self.chip.link  # two cores of one chip


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps to itself what libtpu says, past `sys.stderr`, about the TPU that is not here."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
