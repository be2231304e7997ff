"""What transformers 5 leaves out of a tokenizer's files is put back: without it llama.cpp's converter makes another tokenizer, and says nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

DESCRIBED = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")  # of an added token


def repair_tokenizer(folder: Path, tokenizer: Any) -> list[str]:
    """Complete the files of a tokenizer as far as they do not tell all; what was added, in words.

    added_tokens_decoder: without it added special tokens fall apart. tokenizer.model: without it every piece of a
    SentencePiece vocabulary gets the same score, and texts are cut elsewhere. add_prefix_space: without it llama.cpp
    puts a space before each text. eos_token, where config.json alone tells it. pad_token: or padding is guessed.
    """
    path, repaired = folder / "tokenizer_config.json", []
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("chat_template", None)  # it stands in chat_template.jinja
    if config.get("eos_token") is None:  # told by config.json alone
        config["eos_token"] = tokenizer.eos_token
    if "pad_token" not in config:
        config["pad_token"] = tokenizer.pad_token
    if not config.get("added_tokens_decoder"):
        config["added_tokens_decoder"] = {
            str(i): described(token) for i, token in tokenizer.added_tokens_decoder.items()
        }
        repaired.append(f"the properties of {len(config['added_tokens_decoder'])} added tokens")
    fast = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    if fast["model"].get("byte_fallback"):  # SentencePiece's, as opposed to byte-level BPE
        if "add_prefix_space" not in config and not puts_space_first(fast):
            config["add_prefix_space"] = False
            repaired.append("that no space is put before a text")
        if not (folder / "tokenizer.model").is_file() and fast["model"]["type"] == "BPE":
            (folder / "tokenizer.model").write_bytes(sentencepiece_model(fast, tokenizer))
            repaired.append("tokenizer.model, rebuilt from tokenizer.json")
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    return repaired


def described(token: Any) -> dict[str, Any]:
    """An added token as tokenizer_config.json holds it."""
    return {key: getattr(token, key) for key in DESCRIBED}


def puts_space_first(fast: dict[str, Any]) -> bool:
    """Whether a tokenizer.json puts a space before each text, as Llama 2's does."""
    normaliser, splitter = fast.get("normalizer") or {}, fast.get("pre_tokenizer") or {}
    steps = [*(normaliser.get("normalizers") or [normaliser]), *(splitter.get("pretokenizers") or [splitter])]
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def sentencepiece_model(fast: dict[str, Any], tokenizer: Any) -> bytes:
    """The tokenizer.model of a tokenizer.json that was made of one (format: sentencepiece_model.proto).

    SentencePiece joins the pair whose piece has the highest score, tokenizers the one that comes first in its list of
    merges: a piece's score is minus the place of its first merge.
    """
    from sentencepiece import sentencepiece_model_pb2 as format

    vocabulary, merges = fast["model"]["vocab"], fast["model"]["merges"]
    pairs = (merge if isinstance(merge, list) else merge.split(" ") for merge in merges)
    places: dict[str, int] = {}
    for place, pair in enumerate(pairs):
        places.setdefault("".join(pair), place)
    special = {token["content"] for token in fast["added_tokens"] if token["special"]}
    unknown, kinds = fast["model"].get("unk_token") or tokenizer.unk_token, format.ModelProto.SentencePiece
    model = format.ModelProto()
    for piece in sorted(vocabulary, key=vocabulary.get):
        kind = kinds.UNKNOWN if piece == unknown else kinds.CONTROL if piece in special else kinds.NORMAL
        kind = kinds.BYTE if re.fullmatch(r"<0x[0-9A-F]{2}>", piece) else kind
        model.pieces.add(piece=piece, score=-float(places.get(piece, len(merges))), type=kind)
    trainer, normaliser = model.trainer_spec, model.normalizer_spec
    trainer.model_type, trainer.byte_fallback, trainer.vocab_size = format.TrainerSpec.BPE, True, len(vocabulary)
    trainer.unk_id, trainer.unk_piece = vocabulary[unknown], unknown
    trainer.bos_id, trainer.eos_id, trainer.pad_id = (
        vocabulary.get(token, -1) for token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token)
    )
    normaliser.name, normaliser.add_dummy_prefix = "identity", puts_space_first(fast)
    normaliser.remove_extra_whitespaces, normaliser.escape_whitespaces = False, True
    return model.SerializeToString()
