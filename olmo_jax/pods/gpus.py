"""Nodes with GPUs, for the analytic model: no compiler's figures stand behind these."""

import dataclasses
import math
import re

from olmo_jax.config import costs
from olmo_jax.config.model import MeshConfig, mesh_shape
from olmo_jax.config.options import shown


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A GPU, by its data sheet.

    Attributes:
      kind: JAX's `device_kind`.
      hbm: bytes that a program can have with XLA_PYTHON_CLIENT_MEM_FRACTION=0.92 (JAX: 0.75).
      bandwidth: of the memory, bytes/s.
      link: bytes/s to the other GPUs of its node, one way.
      network: bytes/s to other nodes.
    """

    kind: str
    hbm: float
    bandwidth: float
    link: float
    network: float

    @property
    def peak(self) -> float:
        """Dense bf16 FLOP/s, what MFU is a share of."""
        return costs.peak_flops(self.kind) or math.nan


GPUS = {
    "a100": Gpu("NVIDIA A100-SXM4-80GB", 0.92 * 80e9, 2.04e12, 300e9, 25e9),
    "h100": Gpu("NVIDIA H100 80GB HBM3", 0.92 * 80e9, 3.35e12, 450e9, 50e9),
    "h200": Gpu("NVIDIA H200", 0.92 * 141e9, 4.8e12, 450e9, 50e9),
    "b200": Gpu("NVIDIA B200", 0.92 * 180e9, 7.7e12, 900e9, 50e9),
}


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Equal nodes in one network, such as h100:8x16: 16 nodes of 8."""

    name: str
    chip: Gpu
    per_node: int
    n_nodes: int

    @classmethod
    def parse(cls, name: str) -> "Nodes":
        """From its name.

        Raises:
          ValueError: if no such node is known.
        """
        found = re.fullmatch(r"(\w+):(\d{1,2})x(\d{1,5})", name)
        if found is None or found[1] not in GPUS or not int(found[2]) * int(found[3]):
            raise ValueError(
                f"topology {shown(name)}: needed is GPU:PER_NODExNODES, such as h100:8x16, with a"
                f" GPU of {', '.join(GPUS)}"
            )
        return cls(name, GPUS[found[1]], int(found[2]), int(found[3]))

    @property
    def n_devices(self) -> int:
        """All GPUs."""
        return self.per_node * self.n_nodes

    @property
    def size(self) -> str:
        """How many GPUs, in words."""
        return f"{self.n_devices} devices, {self.n_nodes} node(s) of {self.per_node}"

    def rates(self, mesh: MeshConfig) -> dict[str, float]:
        """Bytes/s that a device sends in a group along each axis of a mesh.

        The last axes lie within a node; a group over several nodes is as fast as their network,
        which all of a node's GPUs use together.
        """
        shape = mesh_shape(mesh, self.n_devices)
        found, inside = {}, 1
        for axis, n in reversed(shape.items()):
            here = math.gcd(n, max(1, self.per_node // inside))
            inside *= n
            found[axis] = self.chip.link if here == n else self.chip.network * here
        return found
