"""What answers cost: `python benchmarks/generate.py`, part of `make bench`.

AutoSloth's batches without padding, beside `model.generate` one by one, and beside `model.generate` in batches of the same size, in the
order of the data, padded on the left. All three give the same answers, greedily: the model is a Llama of random weights whose
last layer is set so that each token is followed by the next lower number and 0 by the end token; so a prompt that ends with
the number n is answered in n + 1 tokens, whatever the layers in between cost. Prompts and answers have log-normal lengths
with a long tail, as in Alpaca. One process, the sides in turn. Writes benchmarks/results/generate.json.
"""

from __future__ import annotations

import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS, ONE_BY_ONE, BATCH, CAP, ROUNDS = 256, 12, 32, 256, 2
SHAPES = {  # on a CPU, so that minutes suffice; on a GPU, a model of the size that people train
    "cpu": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
    "cuda": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip


PAD, BOS, EOS, ZERO = range(4)  # tokens; ZERO + n is the number n


def counting_model(folder: Path) -> tuple[Any, Any]:
    """A Llama that counts down, and its tokenizer, loaded as AutoSloth loads them."""
    from autosloth.model import load_model, load_tokenizer, start_engine
    from autosloth.settings import SFTSettings

    start_engine()
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    device = "cuda" if torch.cuda.is_available() else "cpu"
    vocabulary = 2048 if device == "cpu" else 32000
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=2048, tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, **SHAPES[device])  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight.normal_()
        for layer in model.model.layers:  # they cost what they cost, and change next to nothing
            layer.self_attn.o_proj.weight.mul_(0.01)
            layer.mlp.down_proj.weight.mul_(0.01)
        follower = torch.arange(vocabulary) - 1
        follower[ZERO] = EOS
        model.lm_head.weight.zero_()
        model.lm_head.weight[follower[ZERO:]] = embeddings[ZERO:]
    dtype = torch.float16 if device == "cuda" else torch.float32
    model.to(dtype).save_pretrained(folder)
    words = {"<pad>": PAD, "<s>": BOS, "</s>": EOS} | {str(token - ZERO): token for token in range(ZERO, vocabulary)}
    backend = Tokenizer(WordLevel(words, unk_token="<pad>"))
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    settings = SFTSettings(model=str(folder), load_in_4bit=False, max_length=2048)
    return load_model(settings), load_tokenizer(settings)


def prompts() -> list[list[int]]:
    """Prompts in the order of a dataset, each ending with the number that its answer counts down from."""
    rng, made = random.Random(0), []
    for _ in range(ROWS):
        answered = min(CAP, max(2, round(rng.lognormvariate(0, 0.9) * 60)))
        asked = min(400, max(4, round(rng.lognormvariate(0, 0.6) * 50)))
        made.append([1, *(rng.randrange(300, 2000) for _ in range(asked - 2)), ZERO + answered - 2])
    return made


def expected(prompt: list[int]) -> list[int]:
    """The right answer to a prompt."""
    return [*range(prompt[-1] - 1, ZERO - 1, -1), EOS]


def autosloth(model: Any, tokenizer: Any, asked: list[list[int]]) -> list[list[int]]:
    """The engine."""
    from autosloth.generate import Decoding, answer

    return answer(model, tokenizer, asked, Decoding(CAP, batch_size=BATCH))


def padded(model: Any, tokenizer: Any, asked: list[list[int]], size: int = BATCH) -> list[list[int]]:
    """`model.generate` in batches in the order of the data, padded on the left."""
    import torch

    from autosloth.generate import up_to_end
    from autosloth.model import answering

    answers = []
    with answering(model):
        for start in range(0, len(asked), size):
            rows = asked[start : start + size]
            longest = max(map(len, rows))
            ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=model.device)
            mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
            out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=CAP, do_sample=False, temperature=None, top_p=None, top_k=None, eos_token_id=2, pad_token_id=0)  # fmt: skip
            answers += [up_to_end(row, [2]) for row in out[:, longest:].tolist()]
    return answers


def one_by_one(model: Any, tokenizer: Any, asked: list[list[int]]) -> list[list[int]]:
    """`model.generate` for one prompt after the other."""
    return padded(model, tokenizer, asked, size=1)


SIDES = {"autosloth": (autosloth, ROWS), "left-padded batches": (padded, ROWS), "one by one": (one_by_one, ONE_BY_ONE)}


def main() -> None:
    from tempfile import TemporaryDirectory

    from autosloth.hardware import hardware, versions

    asked = prompts()
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    with TemporaryDirectory() as folder:
        model, tokenizer = counting_model(Path(folder))
        for side, _ in SIDES.values():
            side(model, tokenizer, asked[:BATCH])  # what is compiled, is compiled now
        for _ in range(ROUNDS):
            for name, (side, rows) in SIDES.items():
                started = time.perf_counter()
                answers = side(model, tokenizer, asked[:rows])
                seconds = time.perf_counter() - started
                if answers != [expected(prompt) for prompt in asked[:rows]]:
                    sys.exit(f"{name} gave other answers than the model's.")
                speeds[name].append(sum(map(len, answers)) / seconds)
    middle = {name: statistics.median(values) for name, values in speeds.items()}
    print(
        f"{ROWS} prompts (one by one: {ONE_BY_ONE}), batches of {BATCH}, {ROUNDS} rounds in turn; tokens per second, medians"
    )
    for name, values in speeds.items():
        print(f"  {name:20} {middle[name]:8.0f}   ({min(values):.0f} to {max(values):.0f}); autosloth is {middle['autosloth'] / middle[name]:.2f} times as fast")  # fmt: skip
    result = {"prompts": ROWS, "one_by_one": ONE_BY_ONE, "batch": BATCH, "rounds": ROUNDS, "tokens_per_second": speeds}
    result |= {"hardware": hardware(), "versions": versions()}
    (HERE / "results" / "generate.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
