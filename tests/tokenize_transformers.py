"""Reads tokenizers as AutoTokenizer of an older transformers does.

Run by the tests with that package installed: `tokenize_transformers.py TEXTS FOLDER ...`, where
TEXTS is a list in JSON. Prints as JSON what `read` gives for each folder.
"""

import json
import sys
from typing import Any

import transformers


def read(folder: str, texts: list[str]) -> dict[str, Any]:
    """The ids of each text, and what the tokenizer says of itself."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "model_max_length")
    return {
        "version": transformers.__version__,
        "ids": [tokenizer(text).input_ids for text in texts],
        "as text": [tokenizer(text, split_special_tokens=True).input_ids for text in texts],
        "batch": sorted(tokenizer(texts, padding=True)),
        "decoded": [tokenizer.decode(tokenizer(text).input_ids) for text in texts],
        "n_ids": len(tokenizer),
        "chat": chat(tokenizer),
        **{name: getattr(tokenizer, name) for name in names},
    }


def chat(tokenizer: Any) -> str | None:
    """A turn in the tokenizer's template, if it has one."""
    if not tokenizer.chat_template:
        return None
    turn = [{"role": "user", "content": "hi"}]
    return tokenizer.apply_chat_template(turn, tokenize=False)


if __name__ == "__main__":
    print(json.dumps([read(folder, json.loads(sys.argv[1])) for folder in sys.argv[2:]]))
