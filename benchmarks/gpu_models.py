"""Models of random weights in true shapes, and rows of true lengths, made on the spot for `gpu.py`: nothing is downloaded.

A model is written block by block, in NF4 as bitsandbytes stores it or in 16 bit, so that a 7B takes seconds and never stands whole in memory.
"""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Of the public models' config.json. `embeddings` are 128,256 in Llama 3 and tied in its small ones.
SHAPES = {
    "tiny": dict(model_type="llama", hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=2048),
    "small": dict(model_type="llama", hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, vocab_size=2048),
    "tinyllama-1.1b": dict(model_type="llama", hidden_size=2048, intermediate_size=5632, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4, vocab_size=32000),
    "llama-3.2-1b": dict(model_type="llama", hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True),
    "llama-3.2-3b": dict(model_type="llama", hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8, head_dim=128, vocab_size=128256, tie_word_embeddings=True),
    "mistral-7b": dict(model_type="mistral", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=32000, sliding_window=4096),
    "llama-3.1-8b": dict(model_type="llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, vocab_size=128256),
}  # fmt: skip
TOKENS_A_WORD = 1.4  # of the demo's tokenizer in its own stories
UNK, BOS, EOS, PAD = range(4)  # of the demo's tokenizer
SPECIAL = 4  # so many; from there on a token is a number of a model that counts
ANSWER = 60  # tokens, the median of Alpaca's answers


def make_model(folder: Path, shape: str, four_bit: bool, head: str = "random", dtype: str = "bfloat16") -> Path:
    """A model in the transformers format, with the demo's tokenizer; made once.

    head: `random`; `counting`, in which each token is followed by the next lower one (see `generate.py`); `ending`, which
    says anything and ends after each token with a probability of 1 in 87, so that half of its answers are shorter than ANSWER.
    """
    import torch
    from safetensors.torch import save_file

    if (folder / "model.safetensors.index.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = write_config(folder, shape, four_bit, dtype)
    torch.manual_seed(0)
    placed, total = {}, 0
    for number, tensors in enumerate(parts(config, four_bit, head, getattr(torch, dtype))):
        name = f"model-{number:05}.safetensors"
        save_file({key: tensor.contiguous().cpu() for key, tensor in tensors.items()}, folder / name, {"format": "pt"})
        placed |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    write_tokenizer(folder)
    index = {"metadata": {"total_size": total}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_config(folder: Path, shape: str, four_bit: bool, dtype: str) -> Any:
    """config.json and generation_config.json of a shape; returns the transformers config."""
    from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig

    values = {"tie_word_embeddings": False, **SHAPES[shape]}
    length = 2048 if shape in ("tiny", "small") else 32768
    config = AutoConfig.for_model(**values, max_position_embeddings=length, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, dtype=dtype)  # fmt: skip
    config.architectures = ["MistralForCausalLM" if values["model_type"] == "mistral" else "LlamaForCausalLM"]
    if four_bit:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)  # fmt: skip
        config.quantization_config = quantization.to_dict()
    config.save_pretrained(folder)
    GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD).save_pretrained(folder)
    return config


def parts(config: Any, four_bit: bool, head: str, dtype: Any) -> Iterator[dict[str, Any]]:
    """The tensors of a model by name, the embeddings with the head first, then block by block."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def normal(rows: int, columns: int, std: float = 0.02) -> Any:
        return torch.empty(rows, columns, dtype=dtype, device=device).normal_(std=std)

    hidden, vocabulary = config.hidden_size, config.vocab_size
    embeddings = normal(vocabulary, hidden, 0.02 if head == "random" else 1.0)
    first = {"model.embed_tokens.weight": embeddings, "model.norm.weight": torch.ones(hidden, dtype=dtype)}
    if not config.tie_word_embeddings:
        first["lm_head.weight"] = normal(vocabulary, hidden) if head == "random" else talking_head(head, embeddings)
    yield first
    quiet = (
        1.0 if head == "random" else 0.01
    )  # of a head that is to talk, layers cost what they cost and change next to nothing
    size = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys, inner = (
        size * config.num_attention_heads,
        size * config.num_key_value_heads,
        config.intermediate_size,
    )
    linear = {"self_attn.q_proj": (queries, hidden), "self_attn.k_proj": (keys, hidden), "self_attn.v_proj": (keys, hidden), "self_attn.o_proj": (hidden, queries)}  # fmt: skip
    linear |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    for number in range(config.num_hidden_layers):
        block = {f"{norm}.weight": torch.ones(hidden, dtype=dtype) for norm in ("input_layernorm", "post_attention_layernorm")}  # fmt: skip
        for name, (rows, columns) in linear.items():
            weight = normal(rows, columns, 0.02 * (quiet if name.endswith(("o_proj", "down_proj")) else 1.0))
            block |= in_nf4(f"{name}.weight", weight) if four_bit else {f"{name}.weight": weight}
        yield {f"model.layers.{number}.{name}": tensor for name, tensor in block.items()}


def in_nf4(name: str, weight: Any) -> dict[str, Any]:
    """A linear layer's weight as bitsandbytes stores it in safetensors: NF4 with twice quantised scales."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    return {name: packed} | {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}


def talking_head(kind: str, embeddings: Any) -> Any:
    """The output layer (vocabulary, hidden) of a model that counts down, or of one that ends at random; see `make_model`."""
    import torch

    vocabulary, hidden = embeddings.shape
    weight = torch.empty_like(embeddings).normal_(
        std=1e-3
    )  # Unsloth takes rows of zeros for tokens that were never trained
    if kind == "counting":
        follower = torch.arange(vocabulary, device=embeddings.device) - 1
        follower[SPECIAL] = EOS
        weight[follower[SPECIAL:]] = embeddings[SPECIAL:]
        return weight
    # A constant first coordinate survives the layers; after the last norm, whose output has the length sqrt(hidden), it is `there`.
    embeddings[:, 0] = math.sqrt(hidden)
    there = math.sqrt(hidden / 2)
    weight[EOS, 0] = math.log(vocabulary / 86) / there
    weight[[UNK, BOS, PAD], 0] = -20 / there
    return weight


def write_tokenizer(folder: Path) -> None:
    """The demo's tokenizer, made once for all models beside each other; the embeddings are as many as the shape has, its tokens are the first of them."""
    from autosloth.demo.forest import TOKENIZER, _save_tokenizer, _train_sentencepiece, documents

    made = folder.parent / "tokenizer"
    if not (made / "tokenizer.json").is_file():
        made.mkdir(exist_ok=True)
        _train_sentencepiece(documents(TOKENIZER["documents"], TOKENIZER["general_share"]), made)
        _save_tokenizer(made)
    shutil.copytree(made, folder, dirs_exist_ok=True)


class Words:
    """A stream of words from the demo's stories, asked for by number of tokens."""

    def __init__(self, seed: int):
        from autosloth.demo.forest import documents

        self.random, self.words = random.Random(seed), " ".join(documents(4000, 0.5)).split()

    def text(self, tokens: float) -> str:
        """About so many tokens."""
        count = max(1, round(tokens / TOKENS_A_WORD))
        start = self.random.randrange(len(self.words) - count) if count < len(self.words) else 0
        return " ".join(self.words[start : start + count])

    def about(self, median: float, spread: float, most: float = 4000) -> str:
        """A length of a log-normal distribution: half of them under the median, a long tail."""
        return self.text(min(most, self.random.lognormvariate(0, spread) * median))


def write_instructions(path: Path, rows: int, answer: float = ANSWER, spread: float = 0.9) -> None:
    """Rows as long as Alpaca's: questions of about 20 tokens, a third of them with an input of 25, answers with a long tail."""
    words = Words(0)
    made = [
        {
            "instruction": f"{words.about(20, 0.5)} ({n})?",
            "input": words.about(25, 0.8) if n % 3 == 0 else "",
            "output": words.about(answer, spread, max(4000, 2 * answer)),
        }
        for n in range(rows)
    ]
    path.write_text(json.dumps(made))


def write_pairs(path: Path, rows: int, prompt: float = 90, answer: float = 260) -> None:
    """Pairs as long as UltraFeedback's: prompts of about 90 tokens with a long tail, answers of about 260."""
    words = Words(1)
    made = [
        {
            "instruction": f"{words.about(prompt, 1.0, 700)} ({n})?",
            "chosen": words.about(answer, 0.7, 1500),
            "rejected": words.about(answer, 0.7, 1500),
        }
        for n in range(rows)
    ]
    path.write_text(json.dumps(made))
