import gzip
import io
import json
import pathlib
import unicodedata

import numpy as np
import pytest
import sentencepiece

from olmo_jax.data.tokenizer import Tokenizer

TEXTS = [
    "def f(x):\n    return x + 1\n",
    "naïve café — 日本語 🙂\r\n\ttabs and  double  spaces ",
    "a",
    "",
    "text that names <|endoftext|> and </s> and <unk>, all as words",
    "\x00\x7f control bytes",
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train_bpe(TEXTS * 3, 320)


@pytest.fixture(scope="module")
def bpe_file(bpe, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    bpe.save(path)
    return path


def sentencepiece_file(path: pathlib.Path, **options) -> pathlib.Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat", "def f(x): return x + 1"] * 20),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


def edited(source: pathlib.Path, to: pathlib.Path, **changes) -> Tokenizer:
    """The tokenizer of `source` with top-level entries of the JSON replaced."""
    to.write_text(json.dumps(json.loads(source.read_text()) | changes))
    return Tokenizer(to)


def test_byte_level_bpe_gives_every_text_back(bpe):
    assert [bpe.decode(ids) for ids in bpe.encode_batch(TEXTS)] == TEXTS
    assert bpe.encode_batch(TEXTS) == [bpe.encode(text) for text in TEXTS]


def test_byte_lengths_of_a_byte_level_bpe_sum_to_the_bytes_of_the_text(bpe):
    lengths = bpe.byte_lengths()
    assert lengths.shape == (bpe.vocab_size,)
    assert lengths[bpe.eos_id] == 0
    for text in TEXTS:
        assert lengths[bpe.encode(text)].sum() == len(text.encode())


def test_saved_tokenizer_is_the_same_after_loading(bpe, bpe_file):
    again = Tokenizer(bpe_file)
    assert (again.vocab_size, again.eos_id) == (bpe.vocab_size, bpe.eos_id) == (320, 0)
    assert again.encode_batch(TEXTS) == bpe.encode_batch(TEXTS)
    np.testing.assert_array_equal(again.byte_lengths(), bpe.byte_lengths())


def test_training_twice_gives_the_same_file(bpe, bpe_file, tmp_path):
    Tokenizer.train_bpe(iter(TEXTS * 3), 320).save(tmp_path / "b.json")
    assert (tmp_path / "b.json").read_bytes() == bpe_file.read_bytes()


def test_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match=r"vocab_size=256.*257"):
        Tokenizer.train_bpe(TEXTS, 256)


def test_a_file_that_adds_bos_and_eos_encodes_as_one_that_does_not(bpe, bpe_file, tmp_path):
    eos = {"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing",
        "single": [eos, {"Sequence": {"id": "A", "type_id": 0}}, eos],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {
            "<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}
        },
    }
    adds = edited(bpe_file, tmp_path / "adds.json", post_processor=template)
    assert adds._backend._tokenizer.encode("a").ids[0] == 0  # the file does what it should
    assert adds.encode_batch(TEXTS) == bpe.encode_batch(TEXTS)


def test_the_eos_name_inside_a_text_is_text(bpe, bpe_file, tmp_path):
    assert bpe.eos_id not in bpe.encode("<|endoftext|>")
    # Also where the file declares its EOS as an ordinary added token.
    added = json.loads(bpe_file.read_text())["added_tokens"]
    ordinary = edited(
        bpe_file, tmp_path / "o.json", added_tokens=[a | {"special": False} for a in added]
    )
    assert ordinary.encode_batch(TEXTS) == bpe.encode_batch(TEXTS)
    assert ordinary.byte_lengths()[ordinary.eos_id] == 0


def test_truncation_and_padding_left_in_the_file_are_ignored(bpe, bpe_file, tmp_path):
    careless = edited(
        bpe_file,
        tmp_path / "t.json",
        truncation={
            "max_length": 3,
            "strategy": "LongestFirst",
            "stride": 0,
            "direction": "Right",
        },
        padding={
            "strategy": {"Fixed": 50},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<|endoftext|>",
        },
    )
    assert careless.encode_batch(TEXTS) == bpe.encode_batch(TEXTS)


def test_special_ids_decode_to_nothing(bpe):
    assert bpe.decode([bpe.eos_id, *bpe.encode("a b"), bpe.eos_id]) == "a b"
    assert bpe.special() == {bpe.eos_id: "<|endoftext|>"}


def test_sentencepiece_with_byte_fallback_is_exact(tmp_path):
    path = sentencepiece_file(
        tmp_path / "exact.model",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
    )
    tokenizer = Tokenizer(path)
    lengths = tokenizer.byte_lengths()
    texts = [text.replace("\x00", "") for text in TEXTS]
    assert tokenizer.eos_id == 2
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert lengths[ids].sum() == len(text.encode())
        assert tokenizer.eos_id not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert lengths[:3].tolist() == [0, 0, 0]  # <unk>, <s>, </s>
    tokenizer.save(tmp_path / "copy.model")
    assert Tokenizer(tmp_path / "copy.model").encode(texts[0]) == tokenizer.encode(texts[0])


def test_sentencepiece_with_its_defaults_adds_no_bos_and_counts_the_dummy_space(tmp_path):
    tokenizer = Tokenizer(sentencepiece_file(tmp_path / "default.model"))
    ids = tokenizer.encode("the cat sat")
    assert tokenizer.decode([*ids, tokenizer.eos_id]) == "the cat sat"
    assert tokenizer.special() == {1: "<s>", tokenizer.eos_id: "</s>"}
    assert tokenizer.byte_lengths()[ids].sum() == len(" the cat sat")


def test_files_that_are_no_tokenizer_are_named(tmp_path, bpe_file):
    with pytest.raises(FileNotFoundError, match=r"config.data.tokenizer: .*nowhere.json"):
        Tokenizer(tmp_path / "nowhere.json")
    for name in ("bad.json", "bad.model"):
        (tmp_path / name).write_text("{}")
        with pytest.raises(ValueError, match=f"config.data.tokenizer: cannot read .*{name}"):
            Tokenizer(tmp_path / name)
    with pytest.raises(ValueError, match="no token '<stop>'"):
        Tokenizer(bpe_file, eos="<stop>")
    with pytest.raises(ValueError, match="no token '<stop>'"):
        Tokenizer(sentencepiece_file(tmp_path / "s.model"), eos="<stop>")


@pytest.mark.parametrize(
    ("name", "vocab_size", "eos_id"),
    [
        ("allenai_dolma2", 100278, 100257),
        ("allenai_gpt-neox-olmo-dolma-v1_5", 50280, 50279),
        ("allenai_eleuther-ai-gpt-neox-20b-pii-special", 50280, 0),
    ],
)
def test_official_tokenizers(shared, name, vocab_size, eos_id):
    tokenizer = Tokenizer(shared / f"data/tokenizers/{name}.json")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (vocab_size, eos_id)
    with gzip.open(shared / "data/text/c4-sample.01.json.gz", "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    texts = [unicodedata.normalize("NFC", text) for text in [*texts, *TEXTS]]
    lengths = tokenizer.byte_lengths()
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert lengths[ids].sum() == len(text.encode())
        assert eos_id not in ids
