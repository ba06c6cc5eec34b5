"""Exported tokenizers give our ids, whichever transformers reads them."""

import json
import pathlib

import ai2
import pytest
import tokenize_transformers
from test_hf import quiet

from olmo_jax.checkpoints.formats import hf_config, tokenizer_config
from olmo_jax.config.model import ModelConfig
from olmo_jax.data.tokenizer import Tokenizer

SCRIPT = pathlib.Path(tokenize_transformers.__file__)
TYPES = ["olmo", "olmo2", "olmo3", "olmoe", "flex_olmo"]
TEXTS = [
    "2023",
    "In 2023, 12345678 people",
    "a  b   c\t\td \n\n  e\n",
    " leading, trailing   ",
    "naïve café, 日本語 🙂 e\u0301",
    "I'M don't WE'LL a .b , c ! don 't",
    "def f(x):\n        return x  # ok\r\n",
    "!!! ... ,,,",
    "",
]
# Names of special tokens: one id to transformers, text to us, see `Tokenizer`.
NAMED = ["x<|endoftext|>y", "<|endoftext|>", "a<|padding|>b <|pad|><|im_start|>"]
EOS, PAD = 0, 300
CHAT = "{% for m in messages %}<|im_start|>{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def cl100k(tmp_path_factory) -> dict:
    """A small tokenizer.json that splits text as cl100k and dolma2 do, three digits at a time."""
    text = "In 2023, x = 20231234; don't DON'T  \n\n return the naïve café of def print\r\n"
    made = Tokenizer.train_bpe([text] * 9, PAD)
    assert made.vocab_size == PAD
    made.save(file := tmp_path_factory.mktemp("made") / "tokenizer.json")
    value = json.loads(file.read_text())
    rule = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": rule}, "behavior": "Removed", "invert": True}
    value["pre_tokenizer"]["use_regex"] = False
    value["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [split, value["pre_tokenizer"]],
    }
    token = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    value["added_tokens"] += [
        token | {"id": PAD, "content": "<|pad|>", "special": True},
        token | {"id": PAD + 1, "content": "<|im_start|>", "special": True},
    ]
    return value


def folder(
    path: pathlib.Path, tokenizer: dict | bytes, model_type: str = "olmo2", say=quiet, **config
) -> pathlib.Path:
    """A folder for transformers without weights."""
    path.mkdir()
    data = tokenizer if isinstance(tokenizer, bytes) else json.dumps(tokenizer).encode()
    (path / "tokenizer.json").write_bytes(data)
    ids = {"eos_token_id": EOS, "pad_token_id": None}
    options = ModelConfig(vocab_size=320, max_seq_len=128)
    fields = hf_config.write(options, ids, "float32") | {"model_type": model_type} | config
    (path / "config.json").write_text(json.dumps(fields))
    tokenizer_config.complete(path, say)
    return path


def same(found: dict, path: pathlib.Path, eos: int = EOS, pad: int = PAD) -> None:
    """What transformers says of a folder is what we do."""
    tokenizer = Tokenizer(path / "tokenizer.json")
    want = tokenizer.encode_batch(TEXTS + NAMED)
    assert found["ids"][: len(TEXTS)] == want[: len(TEXTS)], found["version"]
    assert found["as text"] == want, found["version"]
    assert found["ids"][len(TEXTS) + 1] == [eos]
    assert found["decoded"][: len(TEXTS)] == [tokenizer.decode(ids) for ids in want[: len(TEXTS)]]
    assert (found["eos_token_id"], found["pad_token_id"]) == (eos, pad)
    assert found["n_ids"] == tokenizer.vocab_size  # none was added
    assert found["batch"] == ["attention_mask", "input_ids"]  # what the models take
    assert found["bos_token_id"] is None
    assert found["model_max_length"] == 128


@pytest.mark.parametrize("model_type", TYPES)
def test_transformers_gives_our_ids(tmp_path, cl100k, model_type):
    path = folder(tmp_path / "hf", cl100k, model_type)
    (path / "chat_template.jinja").write_text(CHAT)
    found = tokenize_transformers.read(str(path), TEXTS + NAMED)
    same(found, path)
    assert found["chat"] == "<|im_start|>hi"


@pytest.mark.by_hand  # installs each version; 30 seconds and 300 MB of memory each
@pytest.mark.parametrize("version", ["4.57.6", "5.2.0", "5.8.0", "installed"])
def test_every_transformers_gives_our_ids(tmp_path, ai2_packages, cl100k, shared, version):
    packages = [] if version == "installed" else [ai2.transformers(version, ai2_packages)]
    paths, ends = [], []
    for model_type in TYPES:
        paths += [folder(tmp_path / f"small {model_type}", cl100k, model_type)]
        ends += [(EOS, PAD)]
    real = {
        "allenai_dolma2.json": (100_257, 100_277),
        "allenai_gpt-neox-olmo-dolma-v1_5.json": (50_279, 1),
        "allenai_eleuther-ai-gpt-neox-20b-pii-special.json": (0, 1),
    }
    for name, (eos, pad) in real.items():
        data = (shared / "data" / "tokenizers" / name).read_bytes()
        for model_type in ("olmo", "olmo2", "olmo3"):
            options = {"vocab_size": 100_278, "eos_token_id": eos}
            paths += [folder(tmp_path / f"{model_type} {name}", data, model_type, **options)]
            ends += [(eos, pad)]
    found = ai2.run(SCRIPT, packages, json.dumps(TEXTS + NAMED), *map(str, paths))
    for path, (eos, pad), one in zip(paths, ends, found, strict=True):
        assert version in (one["version"], "installed")
        same(one, path, eos, pad)


def written(path: pathlib.Path) -> dict:
    return json.loads((path / tokenizer_config.NAME).read_text())


def test_every_field_is_explicit(tmp_path, cl100k):
    assert written(folder(tmp_path / "hf", cl100k)) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "model_max_length": 128,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"pad_token_id": 301}, ("<|endoftext|>", "<|im_start|>", None)),
        ({"pad_token_id": 319}, ("<|endoftext|>", "<|pad|>", None)),  # no token of the tokenizer
        ({"vocab_size": 300}, ("<|endoftext|>", "<|endoftext|>", None)),  # <|pad|> has no row
        ({"eos_token_id": [301, 0]}, ("<|im_start|>", "<|pad|>", None)),
        ({"bos_token_id": 0}, ("<|endoftext|>", "<|pad|>", "<|endoftext|>")),
        ({"eos_token_id": []}, ("<|endoftext|>", "<|pad|>", None)),
        ({"eos_token_id": None}, ("<|endoftext|>", "<|pad|>", None)),
    ],
)
def test_tokens_are_those_of_the_config_inside_the_table(tmp_path, cl100k, config, tokens):
    found = written(folder(tmp_path / "hf", cl100k, **config))
    assert (found["eos_token"], found["pad_token"], found["bos_token"]) == tokens


def test_an_eos_that_is_an_ordinary_token_changes_no_ids_and_a_line_says_so(tmp_path, cl100k):
    lines = []
    path = folder(tmp_path / "hf", cl100k, say=lines.append, eos_token_id=5)
    assert written(path)["eos_token"] is None
    assert lines == [
        "tokenizer_config.json names no eos_token: id 5 is no special token of tokenizer.json"
    ]
    ids = tokenize_transformers.read(str(path), TEXTS)["ids"]
    assert ids == Tokenizer(path / "tokenizer.json").encode_batch(TEXTS)


def test_what_is_there_stays_and_what_cannot_be_read_is_said(tmp_path, cl100k):
    path = folder(tmp_path / "hf", cl100k)
    (path / tokenizer_config.NAME).write_text("{}")
    tokenizer_config.complete(path, quiet)
    assert written(path) == {}
    lines = []
    path = folder(tmp_path / "damaged", b"{}", say=lines.append)
    assert not (path / tokenizer_config.NAME).exists()
    (path / "tokenizer.json").rename(path / "tokenizer.model")
    tokenizer_config.complete(path, lines.append)
    assert not (path / tokenizer_config.NAME).exists()
    (first, second) = lines
    assert first.startswith(f"no tokenizer_config.json is written: cannot read {path}/tokenizer.js")
    assert second.startswith("tokenizer.model: some versions of transformers make other ids")
