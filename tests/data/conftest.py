"""The tokenizers of the tests of chats and of pairs."""

import pytest
from support.chats import MARKS, SETTINGS

from autosloth.models.engine import load_tokenizer


@pytest.fixture(scope="module", params=["SentencePiece", "byte-level"])
def tokenizer(request, engine, base):
    """The demo's tokenizer, and one of bytes, each with the special tokens of TEMPLATES."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    if request.param == "SentencePiece":
        made = load_tokenizer(SETTINGS)
    else:
        pieces = Tokenizer(models.BPE())
        pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
        pieces.train_from_iterator(["assistant\nUno. user\nTwo? assistant\nDos."] * 50, trainer)
        made = PreTrainedTokenizerFast(tokenizer_object=pieces, bos_token="<s>", eos_token="</s>")
    made.add_special_tokens({"additional_special_tokens": MARKS})
    return made
