"""The curves of runs in one picture, and for a mixture of experts how busy each of them is."""

import contextlib
import io
import math
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from olmo_jax import files
from olmo_jax.records import jsonl

COLORS = ("#2f6db5", "#d9722e", "#3a9a5b", "#b5423f", "#7d5ba6", "#8a6d3b", "#c45a9a", "#5f6b76")
HELD_OUT_MARKERS = "os^Dv"
MAX_POINTS = 300  # per curve; of more, groups are drawn as their mean and, pale, their range
LOSS, LR, NORM, SPEED = (
    "train/CE loss",
    "optim/LR (group 0)",
    "optim/total grad norm",
    "throughput/device/TPS",
)
IMBALANCE, LOAD = "load imbalance", "train/expert load"
MAX_MAPS = 3  # of experts, side by side
N_AVERAGED = 5  # last records of a map
TITLES = {
    LOSS: "loss, nats per token",
    LR: "learning rate",
    NORM: "gradient norm",
    SPEED: "tokens per second, each device",
    IMBALANCE: "busiest expert, times the mean",
}
Steps = dict[int, dict[str, Any]]


def draw(run_dirs: list[Any], out: Any, x: str = "tokens") -> None:
    """Draw loss (held-out too), learning rate, gradient norm and speed of runs into one picture.

    Runs with experts get a third row: the load of the busiest one, and maps of all at the end. A
    step has one value, that of the newest timeline, however often a run was resumed.

    Args:
      run_dirs: folders of runs, as strings or path objects.
      out: the picture, a file whose ending says the format.
      x: "tokens" or "steps".

    Raises:
      FileNotFoundError: if a folder has no records.
      ValueError: if they hold no training step.
    """
    out = pathlib.Path(files.expand(out)) if isinstance(out, str) else out
    runs = dict(zip(_names(run_dirs), map(_load, run_dirs), strict=True))
    picture = io.BytesIO()
    with _plain_style():
        _figure(runs, x).savefig(picture, format=out.suffix[1:] or "png", dpi=120)
    with files.whole(out) as file:
        file.write(picture.getvalue())


@contextlib.contextmanager
def _plain_style() -> Iterator[None]:
    """Matplotlib as it comes, whatever the environment and the user's own settings say.

    A cell of a notebook hands its MPLBACKEND to what it starts. Where that is not installed, it
    fails the import.
    """
    backend = None if "matplotlib" in sys.modules else os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.style  # half a second, which training should not pay
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend is not None:  # for others in this process who want to show something
        with contextlib.suppress(ValueError):
            matplotlib.rcParams["backend"] = backend
    with matplotlib.style.context("default"):
        yield


def _figure(runs: dict[str, Steps], x: str) -> Any:
    """The figure of runs by name, over `x`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    loads = {name: load for name, steps in runs.items() if (load := _last_load(steps)) is not None}
    n_rows = 3 if loads else 2
    figure = Figure(figsize=(12, 3.75 * n_rows), layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr]
    rows = figure.add_gridspec(n_rows, 1)
    cells = [cell for row in (0, 1) for cell in rows[row].subgridspec(1, 2)]
    maps = list(loads)[:MAX_MAPS]
    if maps:
        first, *others = rows[2].subgridspec(1, 1 + len(maps))
        cells.append(first)
        for name, cell in zip(maps, others, strict=True):
            _map(figure.add_subplot(cell), loads[name], name if len(runs) > 1 else "")
    panels = {metric: figure.add_subplot(cell) for metric, cell in zip(TITLES, cells, strict=False)}
    for i, (name, steps) in enumerate(runs.items()):
        color = COLORS[i % len(COLORS)]
        for metric, axes in panels.items():
            _curve(axes, *_points(steps, metric, x), color, name)
        _held_out(panels[LOSS], steps, x, color, is_alone=len(runs) == 1)
    for metric, axes in panels.items():
        _finish(axes, metric, x)
    _limit_loss(panels[LOSS], [_points(steps, LOSS, x)[1] for steps in runs.values()])
    _legend(figure, panels[LOSS], list(runs))
    return figure


def _names(run_dirs: list[Any]) -> list[str]:
    """The folders' own names, or as much of their paths as tells them apart."""
    paths = [os.path.abspath(os.fspath(d)).split(os.sep) for d in run_dirs]
    for n in range(1, max(map(len, paths)) + 1):
        names = ["/".join(path[-n:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    raise ValueError("a run is named twice")


def _load(run_dir: Any) -> Steps:
    run_dir = files.expand(run_dir)
    if "://" in run_dir:
        run_dir = files.path(run_dir)
    steps = jsonl.read(run_dir)
    for values in steps.values():
        of_layers = [v for k, v in values.items() if k.endswith(f"/{IMBALANCE}")]
        if of_layers:
            values[IMBALANCE] = max(of_layers)
    if not any(LOSS in values for values in steps.values()):
        raise ValueError(f"{run_dir}/{jsonl.NAME}: no training step yet")
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


def _last_load(steps: Steps) -> np.ndarray | None:
    """The mean of the last records of each expert's load, `[n_layers, n_experts]`."""
    loads = [np.array(values[LOAD]) for values in steps.values() if LOAD in values]
    return np.mean(loads[-N_AVERAGED:], axis=0) if loads else None


def _map(axes: Any, load: np.ndarray, name: str) -> None:
    """Layers by experts, white where an expert has the mean load."""
    from matplotlib.colors import TwoSlopeNorm

    top = max(2.0, float(load.max()))
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=top)
    image = axes.imshow(load, aspect="auto", cmap="RdBu_r", norm=norm, interpolation="nearest")
    bar = axes.figure.colorbar(image, ax=axes, ticks=[0.0, 1.0, top], format="%.1f")
    bar.outline.set_visible(False)
    axes.set_title(": ".join(filter(None, ["load of each expert", name])), loc="left", fontsize=11)
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    for axis, n in ((axes.yaxis, len(load)), (axes.xaxis, load.shape[1])):
        axis.set_ticks(range(0, n, -(-n // 8)))
    axes.spines[:].set_visible(False)


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
