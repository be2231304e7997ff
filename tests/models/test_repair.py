"""What transformers 5 drops from a tokenizer's files is put back as it was, and said."""

import json

import pytest
import sentencepiece
from support.tiny_models import CORPUS, byte_level, describe_added_tokens, fast_sentencepiece, tiny_tokenizer

from autosloth.models.repair import repair_tokenizer
from autosloth.proof.tokens import STRINGS


@pytest.mark.parametrize("kind", ["spm", "spm-prefix", "llama-2"])
def test_a_rebuilt_sentencepiece_model_cuts_every_text_as_the_lost_one(tmp_path, kind, real_data):
    if kind == "llama-2":
        lost, prefix = real_data("llama2-tokenizer.model"), True
    else:
        tiny_tokenizer(kind, tmp_path / "author")
        lost, prefix = tmp_path / "author" / "tokenizer.model", kind == "spm-prefix"
    tokenizer = fast_sentencepiece(lost, prefix)
    tokenizer.save_pretrained(tmp_path / "saved")
    said = repair_tokenizer(tmp_path / "saved", tokenizer)
    assert "tokenizer.model, rebuilt from tokenizer.json" in said and "the properties of 3 added tokens" in said
    config = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert config["added_tokens_decoder"]["1"]["content"] == "<s>" and config["added_tokens_decoder"]["1"]["special"]
    assert ("that no space is put before a text" in said) == (not prefix) == (config.get("add_prefix_space") is False)
    before = sentencepiece.SentencePieceProcessor(model_file=str(lost))
    after = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "saved" / "tokenizer.model"))
    assert [after.encode(text) for text in STRINGS + CORPUS] == [before.encode(text) for text in STRINGS + CORPUS]


def test_whole_files_are_left_as_they_are(tmp_path):
    tokenizer = tiny_tokenizer("spm", tmp_path)
    model = (tmp_path / "tokenizer.model").read_bytes()
    assert repair_tokenizer(tmp_path, tokenizer) == [] and (tmp_path / "tokenizer.model").read_bytes() == model


def test_a_byte_level_tokenizer_gets_no_sentencepiece_model(tmp_path):
    tokenizer = byte_level("qwen2")
    tokenizer.save_pretrained(tmp_path)
    describe_added_tokens(tokenizer, tmp_path, "qwen2")
    assert repair_tokenizer(tmp_path, tokenizer) == [] and not (tmp_path / "tokenizer.model").exists()
