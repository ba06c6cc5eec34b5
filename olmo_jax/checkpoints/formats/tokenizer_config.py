"""The `tokenizer_config.json` without which a plain `tokenizer.json` is read in other ways.

AutoTokenizer goes by the model's type then: of transformers 5 it takes the class of GPT-NeoX or
GPT-2, which puts its own pre-tokenizer in the place of the file's (other ids for `2023`) and a pad
token of its own behind the table, or a class that knows no EOS.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any

from olmo_jax.data.tokenizer import Tokenizer

NAME = "tokenizer_config.json"
PAD_NAMES = ("<|pad|>", "<|padding|>", "<pad>", "[PAD]")  # of Ai2's and other tokenizers


def complete(folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """Write the file if a folder that is written for transformers has a tokenizer, but not this.

    Args:
      folder: with config.json; what is said of its tokenizer already stays as it is.
      say: told what transformers cannot be told.
    """
    if (folder / NAME).exists():
        return
    if (folder / "tokenizer.json").exists():
        try:
            tokenizer = Tokenizer(folder / "tokenizer.json")
        except ValueError as error:
            say(f"no {NAME} is written: {str(error).removeprefix('config.data.tokenizer: ')}")
            return
        config = json.loads((folder / "config.json").read_bytes())
        text = json.dumps(_fields(tokenizer, config, say), indent=2, ensure_ascii=False)
        (folder / NAME).write_bytes(f"{text}\n".encode())
    elif (folder / "tokenizer.model").exists():
        say("tokenizer.model: some versions of transformers make other ids with it than"
            " sentencepiece")  # fmt: skip


def _fields(
    tokenizer: Tokenizer, config: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """What transformers 4.57 to 5.24 need to hear to give the tokenizer's own ids.

    The pad token is one of the table: the EOS, if the tokenizer has none for padding. An EOS that
    is an ordinary token is not named: as a special one it would change the ids of texts.
    """
    known = {i: token for i, token in tokenizer.special().items() if i < config["vocab_size"]}
    eos = config["eos_token_id"]
    eos = next(iter(eos), None) if isinstance(eos, list) else eos
    eos = tokenizer.eos_id if eos is None else eos
    if eos is not None and eos not in known:
        say(f"{NAME} names no eos_token: id {eos} is no special token of tokenizer.json")
    for_padding = [i for name in PAD_NAMES for i, token in known.items() if token == name]
    pad = next((i for i in (config["pad_token_id"], *for_padding, eos) if i in known), None)
    ids = {"bos_token": config["bos_token_id"], "eos_token": eos, "pad_token": pad}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{key: known.get(i) for key, i in ids.items()},
        "model_max_length": config["max_position_embeddings"],
        "model_input_names": ["input_ids", "attention_mask"],  # OLMo takes no token_type_ids
        "clean_up_tokenization_spaces": False,
    }
