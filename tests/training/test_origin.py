"""A run starts from a checkpoint of whatever kind, without a conversion by hand."""

import json
import pathlib

import hf
import numpy as np
import pytest
import runs

from olmo_jax.checkpoints import conversion
from olmo_jax.checkpoints.formats import folders
from olmo_jax.config.text import to_dict
from olmo_jax.records import jsonl

pytestmark = pytest.mark.slow  # short runs


@pytest.fixture(scope="module")
def place(tmp_path_factory, compiled) -> tuple[pathlib.Path, list[str], pathlib.Path]:
    """A folder, options of a run of an Olmo 3 in it, and the same model of Hugging Face."""
    base = tmp_path_factory.mktemp("origin")
    model, config, _ = hf.random_model("olmo3")
    model.save_pretrained(base / "hf")
    (base / "hf" / "tokenizer.json").write_text("{}")
    (base / "config.py").write_text(
        "from olmo_jax import config\n\n\ndef get_config():\n    c = config.default()\n"
        f"    c.model.update({to_dict(config)})\n    c.optim.schedule.warmup = 0\n"
        "    c.data.eos_id = 2\n    c.data.document_mask = 'none'\n    return c\n"
    )
    rows = 24
    options = [f"--config={base / 'config.py'}", f"data.seq_len={rows}",
               f"data.global_batch_size={8 * rows}", "train.duration=2", "mesh.fsdp=4",
               "mesh.data=2", f"data.paths={runs.write_tokens(base / 'tokens.npy')}",
               "data.dtype=uint16", "log.tensorboard=false",
               f"compute.compilation_cache={compiled}"]  # fmt: skip
    tokens = np.fromfile(base / "tokens.npy", np.uint16) % config.vocab_size
    tokens.tofile(base / "tokens.npy")
    return base, options, base / "hf"


def test_a_folder_of_hugging_face_is_trained_on_as_after_a_conversion(place, tmp_path):
    _, options, folder = place
    conversion.to_jax(str(folder), str(tmp_path / "ours"), say=lambda line: None)
    fresh = "checkpoint.load_optimizer=false"
    losses, params = [], []
    for name, source in (("direct", folder), ("converted", tmp_path / "ours")):
        result = runs.run(*options, fresh, f"dir={tmp_path / name}",
                          f"checkpoint.load_path={source}")  # fmt: skip
        assert result.code == 0, result.err
        assert f"starting from {source}" in result.out
        losses.append({k: v["train/CE loss"] for k, v in jsonl.read(tmp_path / name).items()
                       if "train/CE loss" in v})  # fmt: skip
        params.append(runs.arrays(tmp_path / name / "checkpoints" / "step2"))
        meta = json.loads((tmp_path / name / "checkpoints" / "step2" / "meta.json").read_text())
        assert meta["token_ids"]["eos_token_id"] is not None or name == "direct"
        kept = tmp_path / name / "checkpoints" / "step2" / "tokenizer.json"
        assert kept.read_text() == "{}"
    assert len(losses[0]) == 2
    assert losses[0] == losses[1]
    assert params[0] == params[1]

    again = runs.run(*options, fresh, f"dir={tmp_path / 'direct'}",
                     f"checkpoint.load_path={folder}", "train.duration=3")  # fmt: skip
    assert again.code == 0, again.err
    assert "resuming after step 2" in again.out


def test_a_vocabulary_that_the_run_pads_is_padded(place, tmp_path):
    _, options, folder = place
    vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    padded = [f"model.padded_vocab_size={vocab_size + 8}", "checkpoint.load_optimizer=false"]
    found = []
    for name, more in (("plain", padded[1:]), ("padded", padded)):
        result = runs.run(*options, *more, f"dir={tmp_path / name}", "train.duration=1",
                          f"checkpoint.load_path={folder}")  # fmt: skip
        assert result.code == 0, result.err
        found.append(jsonl.read(tmp_path / name)[1]["train/CE loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            [],
            "config.checkpoint.load_path: {0}: a Hugging Face folder has no optimizer state;"
            " config.checkpoint.load_optimizer=False starts with a new optimizer state",
        ),
        (
            ["checkpoint.load_optimizer=false", "checkpoint.load_position=true"],
            "config.checkpoint.load_path: {0}: a Hugging Face folder has no optimizer state;"
            " config.checkpoint.load_position=False",
        ),
        (
            ["checkpoint.load_optimizer=false", "model.rope_theta=1234.0"],
            "config.model.rope_theta=1234.0, but the checkpoint was trained with 500000.0; set them"
            " as they were, or name them in config.checkpoint.allow_changes",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_written(place, tmp_path, options, line):
    _, common, folder = place
    result = runs.run(*common, f"dir={tmp_path / 'run'}", f"checkpoint.load_path={folder}",
                      *options)  # fmt: skip
    assert result.code == 1
    assert result.errors == [line.format(folder)]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_name_that_is_neither_here_nor_on_the_hub_is_said_with_its_option(
    place, tmp_path, monkeypatch
):
    monkeypatch.setattr(folders, "FIRST_WAIT", 0.001)
    _, options, _ = place
    for name in ("https://localhost:1/model", "no-organisation-here/model"):
        result = runs.run(*options, f"dir={tmp_path / 'run'}", f"checkpoint.load_path={name}",
                          "checkpoint.load_optimizer=false")  # fmt: skip
        (line,) = result.errors
        assert line.startswith(f"config.checkpoint.load_path: {name}"), line
