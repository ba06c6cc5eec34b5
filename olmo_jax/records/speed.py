"""How fast a run goes, and the bar that shows how far it is."""

import math
import shutil
import sys
import time

from olmo_jax.config import costs
from olmo_jax.config.model import ModelConfig

BAR_PERIOD = 0.1  # seconds between drawings of the progress bar
DEVICE = "throughput/device/"


def peak_flops(said: float | None, dtype: str, device_kind: str) -> float | None:
    """FLOP/s that a device can do: as it is `said`, or known of its kind in bfloat16; else None."""
    if said is None and dtype == "bfloat16":  # as the table's figures are
        return costs.peak_flops(device_kind)
    return said


class Speed:
    """Times steps. As in OLMo-core, the first one is not counted: it compiles.

    Args:
      model: whose FLOPs are counted.
      seq_len: tokens of a row.
      peak: FLOP/s of a device; None: not known, so no MFU.
      n_devices: devices of all processes together.
    """

    def __init__(self, model: ModelConfig, seq_len: int, peak: float | None, n_devices: int):
        self._n_devices, self._peak = n_devices, peak
        self._flops = costs.flops_per_token(model, seq_len)
        self._flops_core2 = costs.flops_per_token_core2(model, seq_len)
        self._non_embedding = costs.n_params(model).non_embedding
        self.paused_s = 0.0  # since the last step, in evaluations and checkpoints
        self._start: float | None = None  # end of the first step
        self._last = 0.0
        self._steps = self._tokens = self._batch_tokens = 0
        self._interval = [0.0, 0.0, 0.0]  # since `interval`: seconds, tokens, seconds of waiting

    def step(self, tokens: int, batch_tokens: int, data_wait_s: float) -> dict[str, float]:
        """The throughput metrics of a step that ends now; `tokens` are seen in total after it."""
        now = time.perf_counter()
        values = {
            "throughput/total tokens": tokens,
            "throughput/total petaflops": self._flops * tokens / 1e15,
            "throughput/chinchilla multiple": tokens / (20 * self._non_embedding),
            DEVICE + "data loading (s)": data_wait_s,
        }
        seconds = max(now - self._last - self.paused_s, 1e-9)
        compiled = batch_tokens != self._batch_tokens  # a new shape: that time is the compiler's
        self._last, self._batch_tokens, self.paused_s = now, batch_tokens, 0.0
        if self._start is None:
            self._start = now
            return values
        self._steps += 1
        self._tokens += batch_tokens
        total = max(now - self._start, 1e-9)
        values |= self._rates(" (actual avg)", self._steps / total, self._tokens / total)
        if not compiled:
            values |= self._rates("", 1 / seconds, batch_tokens / seconds)
            # The host is a step ahead of the device, so a wait may lie outside the step's time.
            values[DEVICE + "data loading (%)"] = min(100 * data_wait_s / seconds, 100.0)
            for i, x in enumerate((seconds, batch_tokens, data_wait_s)):
                self._interval[i] += x
        return values

    def _rates(self, suffix: str, bps: float, global_tps: float) -> dict[str, float]:
        tps = global_tps / self._n_devices
        values = {
            f"{DEVICE}TPS{suffix}": tps,
            f"{DEVICE}BPS{suffix}": bps,
            f"{DEVICE}flopsPS{suffix}": self._flops * tps,
        }
        if self._peak:
            values[f"{DEVICE}MFU{suffix}"] = 100 * self._flops * tps / self._peak
            if not suffix:  # published figures of OLMo 1 to 3 count so
                values[f"{DEVICE}MFU (OLMo-core 2)"] = 100 * self._flops_core2 * tps / self._peak
        return values

    def interval(self) -> list[str]:
        """Speed since the last call, in words for the console; nothing before the second step."""
        seconds, tokens, waited = self._interval
        self._interval = [0.0, 0.0, 0.0]
        if not seconds:
            return []
        tps = tokens / seconds
        words = [f"{_short(tps)} tokens/s"]
        if self._peak:
            words.append(f"MFU {100 * self._flops * tps / self._n_devices / self._peak:.1f}%")
        return [*words, f"data wait {min(100 * waited / seconds, 100):.1f}%"]

    def eta(self, steps_left: int) -> list[str]:
        """How long the rest will take, with its evaluations and checkpoints, in words."""
        if not self._steps or self._start is None or steps_left <= 0:
            return []
        left = round(steps_left * (self._last - self._start) / self._steps)
        days, hours, minutes = left // 86400, left // 3600 % 24, left // 60 % 60
        if days:
            return [f"eta {days}d{hours:02}h"]
        return [f"eta {hours}h{minutes:02}m" if hours else f"eta {minutes}m{left % 60:02}s"]


def _short(x: float) -> str:
    """Three digits and a unit: 12.3K."""
    for unit in ("", "K", "M", "G"):
        if x < 999.5 or unit == "G":
            break
        x /= 1000
    return f"{x:.3g}{unit}"


class Bar:
    """One line on a terminal that is drawn again and again; nothing where stderr is not one."""

    def __init__(self):
        self._on, self._drawn = sys.stderr.isatty(), -math.inf

    def draw(self, done: int, total: int, text: str) -> None:
        """Show `done` of `total` steps, and a few words."""
        now = time.perf_counter()
        if not self._on or (now - self._drawn < BAR_PERIOD and done < total):
            return
        self._drawn = now
        fraction = min(done / max(total, 1), 1.0)
        words = f" {100 * fraction:3.0f}% | {done:,}/{total:,} | {text}"
        width = max(0, min(30, shutil.get_terminal_size().columns - len(words) - 1))
        filled = round(fraction * width)
        sys.stderr.write(f"\r\x1b[K{'█' * filled}{'░' * (width - filled)}{words}")
        sys.stderr.flush()

    def clear(self) -> None:
        """Leave an empty line for others to print on."""
        if self._on:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
