"""Where a run ends, and the learning rate and clipping norm of each step on the way."""

import dataclasses

from olmo_jax.config.options import INT32, ConfigError
from olmo_jax.config.training import OptimConfig, TrainConfig
from olmo_jax.data.schedule import BatchSchedule
from olmo_jax.training import schedules


class Pacing:
    """What follows from the number of a step alone: whether the run ends there, and its rates."""

    def __init__(self, t: TrainConfig, o: OptimConfig, schedule: BatchSchedule):
        """Work out the end of the run.

        Raises:
          ConfigError: if the schedule does not fit the duration.
        """
        self._optim = o
        last = schedule.last_step(t.duration, t.duration_unit)
        self.last = last
        if t.hard_stop is not None:
            self.last = min(last, schedule.last_step(t.hard_stop, t.hard_stop_unit))
        if last > INT32:
            end = f"config.train.duration={t.duration} {t.duration_unit} is {last} steps"
            raise ConfigError([f"{end}, more than {INT32}"])
        self._first_batch = schedule.first_size
        if o.schedule.t_max is not None:
            self.schedule_end = o.schedule.t_max
        elif o.schedule.unit == t.duration_unit:
            self.schedule_end = t.duration
        elif o.schedule.unit == "steps":
            self.schedule_end = last
        else:
            self.schedule_end = schedule.position(last).tokens
        self._skipped = t.skip_steps

    def rates(self, at: int, tokens: int, batch_tokens: int) -> tuple[float, float]:
        """Learning rate and clipping norm of step `at`, whose batch ends at `tokens` seen."""
        t = at if self._optim.schedule.unit == "steps" else tokens
        # OLMo-core's batch-size schedule scales the peak; where a schedule ends stays as it is.
        peak = self._optim.lr * schedules.batch_lr_scale(self._first_batch, batch_tokens)
        scaled = dataclasses.replace(self._optim, lr=peak)
        return schedules.learning_rate(scaled, t, self.schedule_end), schedules.clip_norm(scaled, t)

    def is_skipped(self, at: int) -> bool:
        """Whether the batch of step `at` is passed over (`train.skip_steps`)."""
        return any(start <= at < stop for start, stop in self._skipped)
