"""What a plan says: memory, time by kind of work, and what follows from them."""

import dataclasses

# MaxText's published recipe for tpu7x comes out at 47.7 % MFU by the way in which programs are
# estimated here, and its authors report 44.5 % on 512 chips: the one public pair of figures.
OPTIMISM = 1.07


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs of each device.

    Attributes:
      memory: bytes by kind: parameters, moments, batch, temporary, program.
      available: bytes that a device has for them.
      activations: bytes that the forward pass keeps for the backward pass, a part of temporary.
      flops: useful FLOPs of a step per device (`olmo_jax.config.costs`).
      done: FLOPs per device that are really done in products, recomputation included; without
        attention.
      seconds: by kind of work: products, other, attention, experts, kernels, collectives.
      other_floor: seconds that `other` takes at the bandwidth of the memory.
      collectives: {kind over n devices: (times, bytes of the arrays, seconds)}.
      exposed: seconds of collectives that the next operation waits for: sums of activations over
        `tensor`, and exchanges with experts.
      notes: what had to be assumed.
      compile_seconds: what the compiler took; None: nothing was compiled, all is a formula.
    """

    memory: dict[str, float]
    available: float
    activations: float
    flops: float
    done: float
    seconds: dict[str, float]
    other_floor: float
    collectives: dict[str, tuple[float, float, float]]
    exposed: float = 0.0
    notes: tuple[str, ...] = ()
    compile_seconds: float | None = None

    @property
    def total_memory(self) -> float:
        """Bytes of all kinds."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the device has as much."""
        return self.total_memory <= self.available

    @property
    def busy(self) -> float:
        """Seconds of everything but collectives."""
        return sum(self.seconds.values()) - self.seconds["collectives"]

    @property
    def step(self) -> float:
        """Seconds of a step with the collectives hidden behind the work, as far as that goes."""
        return max(self.busy + self.exposed, self.seconds["collectives"])

    @property
    def serial(self) -> float:
        """Seconds of a step if no collective is hidden."""
        return sum(self.seconds.values())

    @property
    def fastest(self) -> float:
        """Seconds if, besides, memory-bound work runs at the bandwidth."""
        saved = self.seconds["other"] - self.other_floor
        return max(self.busy + self.exposed - saved, self.seconds["collectives"])

    @property
    def slowest(self) -> float:
        """Seconds if no collective is hidden, and the method is as optimistic as it was once."""
        return OPTIMISM * self.serial
