"""What came out of a run, for people: a page of words, and its curves."""

import os
import pathlib
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax

from olmo_jax import files
from olmo_jax.data.tokenizer import Tokenizer
from olmo_jax.evals.compression import compressed_bits_per_byte
from olmo_jax.generation import sampling
from olmo_jax.records import plot

TEMPERATURE, N_NEW = 0.7, 96  # of the continuation; at 0 a small model repeats itself


def is_written(run_dir: Any) -> bool:
    """Whether the run has its summary."""
    return (files.path(run_dir) / "summary.md").exists()


class Told(NamedTuple):
    """The options that a summary speaks of."""

    name: str
    folder: str
    heldout: Sequence[str]  # paths of token files, with their texts beside them as .txt
    tokenizer: str | None
    seq_len: int
    lr: float


def write(
    run: Told, model: Any, params: Any, scores: Mapping[str, float], seconds: float, saved: Any
) -> None:
    """Say what came out of a run: on the screen, in `summary.md`, and its curves in `summary.png`.

    Args:
      run: what it was.
      model: the Transformer.
      params: after the last step.
      scores: held-out metrics by OLMo-core's names, all rows scored.
      seconds: since the run was started (or resumed).
      saved: the folder of the last checkpoint.
    """
    folder = files.path(run.folder)
    plot.draw([folder], folder / "summary.png", x="steps")
    lines = [f"{run.name}: done; this command took {seconds / 60:.1f} minutes", ""]
    for path in run.heldout:
        lines += _held_out_lines(pathlib.Path(path), scores)
    if run.tokenizer is not None:
        lines += _continuation(run, model, params)
    here = os.path.relpath(sys.executable)  # a newcomer has not activated the environment
    python = "python" if here.startswith("..") else here
    # The same options again, but for those that are of this run alone.
    own = ("--config.name=", "--config.dir=", "--config.optim.lr=")
    again = [a for a in sys.argv if a.startswith("--config") and not a.startswith(own)]
    options = shlex.join(again or ["--config=FILE"])
    lines += [
        f"curves:      {folder / 'summary.png'}",
        f"checkpoint:  {saved}",
        "",
        "next:",
        f"  {python} -m olmo_jax.plot {run.folder} --x=steps",
        f"  {python} -m olmo_jax.train {options} --config.name={run.name}-slower"
        f" --config.optim.lr={run.lr / 2:g}",
        f'  {python} -c "import olmo_jax; model, params = olmo_jax.load({run.folder!r})"',
    ]
    text = "\n".join(lines)
    with files.whole(folder / "summary.md") as file:
        file.write(f"```\n{text}\n```\n".encode(errors="replace"))
    print(f"\n{text}", flush=True)


def _held_out_lines(path: pathlib.Path, scores: Mapping[str, float]) -> list[str]:
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


def _continuation(run: Told, model: Any, params: Any) -> list[str]:
    """A held-out prompt and what the model makes of it, as indented lines."""
    text = pathlib.Path(run.heldout[0]).with_suffix(".txt") if run.heldout else None
    if text is None or not text.exists() or jax.process_count() > 1:
        return []
    if sampling.looks_ahead(model):
        return ["no continuation of a prompt: experts that choose their tokens look ahead", ""]
    tokenizer = Tokenizer(str(run.tokenizer))
    prompt = _prompt(text.read_bytes().decode())
    ids = tokenizer.encode(prompt)
    new = sampling.sample(model, params, ids, N_NEW, temperature=TEMPERATURE, context=run.seq_len)
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
