"""What came out of a run, for people: its curves in one picture, and a page of words."""

import io
import math
import os
import pathlib
import sys
from typing import Any

import jax
import numpy as np

from olmo_jax import records, storage
from olmo_jax.config import Config
from olmo_jax.data.tokenizer import Tokenizer
from olmo_jax.evals.compression import compressed_bits_per_byte
from olmo_jax.generation import sampling

COLORS = ("#2f6db5", "#d9722e", "#3a9a5b", "#b5423f", "#7d5ba6", "#8a6d3b", "#c45a9a", "#5f6b76")
HELD_OUT_MARKERS = "os^Dv"
TEMPERATURE, N_NEW = 0.7, 96  # of the continuation; at 0 a small model repeats itself
MAX_POINTS = 300  # per curve; of more, groups are drawn as their mean and, pale, their range
LOSS, LR, NORM, SPEED = (
    "train/CE loss",
    "optim/LR (group 0)",
    "optim/total grad norm",
    "throughput/device/TPS",
)
TITLES = {
    LOSS: "loss, nats per token",
    LR: "learning rate",
    NORM: "gradient norm",
    SPEED: "tokens per second, each device",
}
Steps = dict[int, dict[str, float]]


def draw(run_dirs: list[Any], out: Any, x: str = "tokens") -> None:
    """Draw loss (held-out too), learning rate, gradient norm and speed of runs into one picture.

    A step has one value, that of the newest timeline, however often a run was resumed.

    Args:
      run_dirs: folders of runs, as strings or path objects.
      out: the picture, a file whose ending says the format.
      x: "tokens" or "steps".

    Raises:
      FileNotFoundError: if a folder has no records.
      ValueError: if they hold no training step.
    """
    from matplotlib.figure import Figure  # half a second, which training should not pay

    out = pathlib.Path(out) if isinstance(out, str) else out
    runs = dict(zip(_names(run_dirs), map(_load, run_dirs), strict=True))
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr]
    panels = dict(zip(TITLES, figure.subplots(2, 2).flat, strict=True))
    for i, (name, steps) in enumerate(runs.items()):
        color = COLORS[i % len(COLORS)]
        for metric, axes in panels.items():
            _curve(axes, *_points(steps, metric, x), color, name)
        _held_out(panels[LOSS], steps, x, color, is_alone=len(runs) == 1)
    for metric, axes in panels.items():
        _finish(axes, metric, x)
    _limit_loss(panels[LOSS], [_points(steps, LOSS, x)[1] for steps in runs.values()])
    _legend(figure, panels[LOSS], list(runs))
    picture = io.BytesIO()
    figure.savefig(picture, format=out.suffix[1:] or "png", dpi=120)
    out.write_bytes(picture.getvalue())


def _names(run_dirs: list[Any]) -> list[str]:
    """The folders' own names, or as much of their paths as tells them apart."""
    paths = [os.path.abspath(os.fspath(d)).split(os.sep) for d in run_dirs]
    for n in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-n:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError("a run is named twice")


def _load(run_dir: Any) -> Steps:
    if "://" in os.fspath(run_dir):
        run_dir = storage.path(run_dir)
    steps = records.read(run_dir)
    if not any(LOSS in values for values in steps.values()):
        raise ValueError(f"{run_dir}/{records.NAME}: no training step yet")
    return steps


def _points(steps: Steps, metric: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    """Positions and values `[n]` of a metric, where it is finite."""
    points = [
        (values["tokens"] if x == "tokens" else step, values[metric])
        for step, values in steps.items()
        if math.isfinite(values.get(metric, math.nan))
    ]
    at, values = np.array(points, float).reshape(-1, 2).T
    return at, values


def _curve(axes: Any, at: np.ndarray, values: np.ndarray, color: str, name: str) -> None:
    size = max(1, len(values) // MAX_POINTS)
    starts = np.arange(0, len(values), size)
    if size > 1:
        low, high = (f.reduceat(values, starts) for f in (np.minimum, np.maximum))
        counts = np.diff(starts, append=len(values))
        at, values = (np.add.reduceat(y, starts) / counts for y in (at, values))
        axes.fill_between(at, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(at, values, color=color, linewidth=1.6, label=name, marker="." * (len(at) == 1))


def _held_out(axes: Any, steps: Steps, x: str, color: str, is_alone: bool) -> None:
    """Held-out losses: their own colours beside one run, else dashes in the run's."""
    metrics = dict.fromkeys(
        name
        for values in steps.values()
        for name in values
        if name.startswith("eval/lm/") and name.endswith("/CE loss")
    )
    for i, metric in enumerate(metrics):
        axes.plot(
            *_points(steps, metric, x),
            color=COLORS[(i + 1) % len(COLORS)] if is_alone else color,
            linestyle="--",
            linewidth=1.2,
            marker=HELD_OUT_MARKERS[i % len(HELD_OUT_MARKERS)],
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=f"held out: {metric.split('/')[2]}",
        )


def _legend(figure: Any, axes: Any, names: list[str]) -> None:
    lines = {line.get_label(): line for line in axes.lines}
    if len(names) == 1:
        figure.suptitle(names[0], fontsize=14, fontweight="bold")
        lines = {"training": lines.pop(names[0]), **lines}
    else:
        runs = [lines.pop(name) for name in names]
        figure.legend(handles=runs, loc="outside upper center", ncols=4, frameon=False)
        for label, line in lines.items():  # the colours are the runs', so grey stands for any
            (lines[label],) = axes.plot([], [])
            lines[label].update_from(line)
            lines[label].set_color("0.4")
    if lines:
        axes.legend(lines.values(), lines.keys(), loc="upper right", frameon=False)


def _limit_loss(axes: Any, curves: list[np.ndarray]) -> None:
    """Give the room to the part of the curves that is worth seeing, not to the first fall."""
    curves = [v[len(v) // 20 if len(v) >= 100 else 0 :] for v in curves if len(v)]
    if not curves:
        return
    held_out = [line.get_ydata() for line in axes.lines]
    low, high = min(v.min() for v in [*curves, *held_out] if len(v)), max(v.max() for v in curves)
    margin = 0.05 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)


def _finish(axes: Any, metric: str, x: str) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    axes.set_title(TITLES[metric], loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.grid(color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("0.7")
    axes.tick_params(color="0.7")
    values = np.concatenate([line.get_ydata() for line in axes.lines])
    if not len(values):
        axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", color="0.5")
        return
    if metric == LR:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    if metric in (LR, SPEED):  # a step whose wait fell into another one's time is no speed
        axes.set_ylim(0, 1.1 * np.quantile(values, 0.98 if metric == SPEED else 1.0) or 1)
    if metric == SPEED:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    if metric == NORM and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")


# --- the written summary --------------------------------------------------------------------------


def is_written(run_dir: Any) -> bool:
    """Whether the run has its summary."""
    return (storage.path(run_dir) / "summary.md").exists()


def write(
    config: Config, model: Any, params: Any, scores: dict[str, float], seconds: float, saved: Any
) -> None:
    """Say what came out of a run: on the screen, in `summary.md`, and its curves in `summary.png`.

    Args:
      config: of the run.
      model: the Transformer.
      params: after the last step.
      scores: held-out metrics by OLMo-core's names, all rows scored.
      seconds: since the run was started (or resumed).
      saved: the folder of the last checkpoint.
    """
    folder = storage.path(config.run_dir)
    draw([folder], folder / "summary.png", x="steps")
    lines = [f"{config.name}: done; this command took {seconds / 60:.1f} minutes", ""]
    for path in config.eval.paths:
        lines += _held_out_lines(pathlib.Path(path), scores)
    if config.data.tokenizer is not None:
        lines += _continuation(config, model, params)
    here = os.path.relpath(sys.executable)  # a newcomer has not activated the environment
    python = "python" if here.startswith("..") else here
    given = next((a for a in sys.argv if a.startswith("--config=")), "--config=FILE")
    lines += [
        f"curves:      {folder / 'summary.png'}",
        f"checkpoint:  {saved}",
        "",
        "next:",
        f"  {python} tools/plot_run.py {config.run_dir} --x steps",
        f"  {python} -m olmo_jax.train {given} --config.name=slower"
        f" --config.optim.lr={config.optim.lr / 2:g}",
        f'  {python} -c "import olmo_jax; model, params = olmo_jax.load({config.run_dir!r})"',
    ]
    text = "\n".join(lines)
    (folder / "summary.md").write_text(f"```\n{text}\n```\n")
    print(f"\n{text}", flush=True)


def _held_out_lines(path: pathlib.Path, scores: dict[str, float]) -> list[str]:
    """Bits per byte of a held-out file beside what compressors need for the text beside it."""
    bits = scores.get(f"eval/lm/{path.stem}/BPB")
    text = path.with_suffix(".txt")
    if bits is None:
        return []
    rows = {"this model": bits}
    if text.exists():
        rows |= compressed_bits_per_byte(text.read_bytes())
    width = max(map(len, rows))
    table = [f"  {name:{width}}  {value:.3f}" for name, value in rows.items()]
    return [f"held-out text ({path.stem}), bits per byte:", *table, ""]


def _continuation(config: Config, model: Any, params: Any) -> list[str]:
    """A held-out prompt and what the model makes of it, as indented lines."""
    text = pathlib.Path(config.eval.paths[0]).with_suffix(".txt") if config.eval.paths else None
    if text is None or not text.exists() or jax.process_count() > 1:
        return []
    tokenizer = Tokenizer(str(config.data.tokenizer))
    prompt = _prompt(text.read_text(encoding="utf-8"))
    ids = tokenizer.encode(prompt)
    new = sampling.sample(
        model, params, ids, N_NEW, temperature=TEMPERATURE, context=config.data.seq_len
    )
    known = prompt[prompt.rindex("\n", 0, -60) + 1 :] if "\n" in prompt[:-60] else prompt
    shown = f"{known}\u2588{tokenizer.decode(new)}"
    return [
        f"a held-out prompt, continued by the model from \u2588 on (temperature {TEMPERATURE}):",
        *(f"  | {line}" for line in shown.splitlines()),
        "",
    ]


def _prompt(text: str) -> str:
    """The text up to the first words of a docstring, a third of the way in."""
    start = text.find('    """', len(text) // 3)
    end = text.find(" ", start + 24) if start >= 0 else len(text) // 3
    return text[max(0, end - 1000) : end]
