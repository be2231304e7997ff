"""How much GPU memory a training will need, part by part, estimated beforehand from the model's config.json and the settings.

Of most dense families the config.json tells all; of others the parts that are sure are counted in the model (counts.py), and told as the least that it takes.
The parts follow what Unsloth 2026.10, PEFT and bitsandbytes keep; `python benchmarks/gpu.py memory-7b memory-others` holds their sum against what a GPU
measures. What it measured on an H200 (benchmarks/results/gpu.json) corrected them: the loss and the block that is computed again do not stand beside each other.
"""

from __future__ import annotations

import contextlib
import json
import math
from functools import partial
from typing import Any, NamedTuple

from ..distributed import processes
from ..errors import ModelError
from ..hardware import GB, first_gpu
from ..hub_client import is_offline
from ..output import say
from ..settings import Settings
from ..values import AUTO, is_hub_id
from ..weights import without_numbers
from .adapter import adapter_config, starting_adapter
from .base import model_source, small_files
from .counts import Counts, counts_of, is_kept
from .engine import start_engine
from .targets import ALL

# Families whose blocks hold the seven linear layers of Llama's: what they take was measured.
DENSE = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gemma3_text", "granite")
# 4 bits, an 8-bit scale a block of 64, a 32-bit scale of 256 scales (arXiv 2305.14314, section 3).
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)
EIGHT_BIT = 2 * (1 + 4 / 256)  # two 8-bit moments and a 32-bit scale for 256 of each (bitsandbytes 0.50)
STATE_BYTES = {
    "adamw_8bit": EIGHT_BIT,
    "paged_adamw_8bit": EIGHT_BIT,
    "adamw_torch_fused": 8,
    "rmsprop": 4,
    "lion": 4,
    "sgd": 0,
}
STATE_BYTES["adafactor"] = 1  # a number for each row and column: of a matrix of rank 4 and above no more
ADAPTER_BYTES = 4  # Unsloth trains the adapter in 32 bits
# Unsloth's cross-entropy goes in chunks of tokens, sized as if a logit took 16 bytes (unsloth_zoo 2026.10, fused_losses/cross_entropy_loss.py).
CHUNKED_AS = 16
CHUNK_GB = 4 * 2**30 / GB  # the most that a chunk may take by that; half of what is free where that is less
LOGIT_BYTES = 4  # what it takes compiled: logits and gradients in 16 bit; an H200 measured at most 3.3
PAIR_CHUNK_GB = 0.27  # a tile of the fused head that scores pairs (256 MiB)
CUDA_GB = 0.9  # what torch does not count, on an H200: the driver's context, cuBLAS's workspace, the compiled kernels
MARGIN = 1.15  # what the estimate may be wrong by


class Part(NamedTuple):
    """What takes memory, how much of it, and why so much."""

    name: str
    gb: float
    reason: str


class Shape(NamedTuple):
    """The sizes of a decoder that memory depends on."""

    hidden: int
    inner: int  # of the MLP
    layers: int
    queries: int  # heads times their size
    keys: int
    vocabulary: int
    tied: bool
    skipped: tuple[str, ...]  # layers that a quantised repository keeps in 16 bit
    beside: int = 0  # weights that are not of the text, such as those of a vision tower

    def linear_layers(self) -> dict[str, tuple[int, int]]:
        """(inputs, outputs) of each of the seven linear layers of a block, by its name in it."""
        attention = {"q_proj": (self.hidden, self.queries), "k_proj": (self.hidden, self.keys)}
        attention |= {"v_proj": (self.hidden, self.keys), "o_proj": (self.queries, self.hidden)}
        mlp = {"gate_proj": (self.hidden, self.inner), "up_proj": (self.hidden, self.inner)}
        mlp |= {"down_proj": (self.inner, self.hidden)}
        return {f"self_attn.{name}": size for name, size in attention.items()} | {f"mlp.{name}": size for name, size in mlp.items()}  # fmt: skip

    def adapter(self, asked: str | list[str]) -> int:
        """Numbers in a LoRA adapter of rank 1."""
        return self.layers * sum(sum(size) for name, size in self.linear_layers().items() if is_asked(name, asked))

    def embeddings(self) -> int:
        """Numbers of those of the inputs and, where they are others, of the outputs."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    def numbers(self) -> int:
        """All its weights, but for norms and biases."""
        return self.layers * sum(math.prod(size) for size in self.linear_layers().values()) + self.embeddings()


def shape_of(config: dict[str, Any]) -> Shape | None:
    """The shape that a config.json tells of; None for a family whose parts are not known here."""
    skipped = skipped_of(config)
    outer, config = config, {**config, **(config.get("text_config") or {})}
    if config.get("model_type") not in DENSE:
        return None
    heads = config["num_attention_heads"]
    size = config.get("head_dim") or config["hidden_size"] // heads
    tied = outer.get("tie_word_embeddings", config["model_type"].startswith("gemma"))  # transformers' defaults
    keys = size * (config.get("num_key_value_heads") or heads)
    sizes = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    return Shape(*sizes, size * heads, keys, config["vocab_size"], tied, skipped)


def skipped_of(config: dict[str, Any]) -> tuple[str, ...]:
    """The layers that a quantised repository keeps in 16 bit, by its config.json."""
    return tuple((config.get("quantization_config") or {}).get("llm_int8_skip_modules") or ())


def packed_otherwise(config: dict[str, Any]) -> bool:
    """Whether a repository is quantised in another form than bitsandbytes', of which it is not known here what a GPU holds."""
    return (config.get("quantization_config") or {}).get("quant_method", "bitsandbytes") != "bitsandbytes"


def estimate(settings: Settings, shape: Shape, gpu_gb: float, rank: int) -> list[Part]:
    """The parts of the peak of GPU memory, in GB, when rows as long as `max_length` are trained.

    gpu_gb: the GPU's memory, by which the loss chooses its chunks; rank: of the LoRA adapter.
    """
    numbers = shape.adapter(settings.target_modules) * rank + whole(
        settings, shape.vocabulary * shape.hidden, shape.tied
    )
    lasting = [weights(settings, shape), *adapter(settings, numbers), Part("CUDA", CUDA_GB, "context and kernels")]
    free = max(0.0, gpu_gb - sum(part.gb for part in lasting))
    passing = [activations(settings, shape), loss(settings, shape, free)]  # they take turns
    if settings.road == "spin":  # and so do answers and training
        passing.append(answers(settings, shape))
    return [*lasting, max(passing, key=lambda part: part.gb)]


def least(settings: Settings, counts: Counts, rank: int) -> list[Part]:
    """The parts of the peak, in GB, that are sure in a model of any family: what the loss, kernels and unpacked experts take is not among them."""
    wide = bytes_of(settings)
    packed = counts.narrow * (NF4_BYTES if settings.load_in_4bit else wide)
    how = "linear layers and experts in NF4, all else" if settings.load_in_4bit else "all"
    block = tokens_at_once(settings) * counts.block * wide
    return [
        Part("weights", (packed + wide * counts.wide) / GB, f"{how} in {8 * wide} bit"),
        *adapter(settings, counts.adapter * rank + whole(settings, counts.table, counts.tied)),
        Part("CUDA", CUDA_GB, "context and kernels"),
        Part("activations", block / GB, f"what the layers of one block make of {tokens_at_once(settings):,} tokens"),
    ]


def bytes_of(settings: Settings) -> int:
    """Bytes of a number as it is computed with."""
    return 4 if settings.precision == "float32" else 2


def weights(settings: Settings, shape: Shape) -> Part:
    """The base: linear layers of the text in NF4 where asked for, the rest as it is computed with."""
    wide = bytes_of(settings)
    total, kept = 0.0, 0
    for layer in range(shape.layers):
        for name, (inputs, outputs) in shape.linear_layers().items():
            narrow = settings.load_in_4bit and not is_kept(f"model.layers.{layer}.{name}", shape.skipped)
            total += inputs * outputs * (NF4_BYTES if narrow else wide)
            kept += settings.load_in_4bit and not narrow
    how = "NF4" if settings.load_in_4bit else f"{8 * wide} bit"
    exception = f", but {kept} of them in {8 * wide} bit" if kept else ""
    return Part("weights", (total + wide * (shape.embeddings() + shape.beside)) / GB, f"linear layers in {how}{exception}; embeddings in {8 * wide} bit")  # fmt: skip


def adapter(settings: Settings, numbers: int) -> list[Part]:
    """The LoRA adapter of so many numbers, and what its training keeps beside it; DPO's reference is a second, frozen one."""
    copies = 1 if settings.road == "sft" else 2
    each = ADAPTER_BYTES + STATE_BYTES[settings.optimizer]
    twice = ", and a frozen one for the reference" if copies == 2 else ""
    return [
        Part("adapter", numbers * ADAPTER_BYTES * copies / GB, f"{numbers / 1e6:.0f} million numbers in 32 bit{twice}"),
        Part("optimizer", numbers * each / GB, f"gradients in 32 bit and the states of {settings.optimizer}"),
    ]


def whole(settings: Settings, table: int, tied: bool) -> int:
    """Numbers of the embeddings and the head, so many each, that `modules_to_save` trains whole; where they are one weight they stay one."""
    asked = len(settings.modules_to_save)
    return table * (min(asked, 1) if tied else asked)


def is_asked(name: str, asked: str | list[str]) -> bool:
    """Whether `target_modules` names a layer of a block.

    >>> [is_asked("mlp.up_proj", asked) for asked in ("all-linear", "attention", ["up_proj"])]
    [True, False, True]
    """
    if isinstance(asked, list):
        return name.rpartition(".")[2] in asked
    return asked == ALL or name.startswith("self_attn.")


def tokens_at_once(settings: Settings) -> int:
    """Tokens in a forward pass, when every row is as long as `max_length`; a pair is two rows; with `batch_size: auto` of one row or pair."""
    rows = 1 if settings.is_batch_free and processes() == 1 else settings.rows_at_once
    return rows * settings.max_length * (1 if settings.road == "sft" else 2)


def activations(settings: Settings, shape: Shape) -> Part:
    """What a backward pass holds at once: one block is computed again, the inputs of the others wait in the machine's memory.

    A block keeps its input, both norms, the attention's result and their gradients, queries, keys and values, and three tensors of the
    MLP; the stack, the two blocks' inputs on their way, its last hidden states and their gradient; 4-bit weights are
    unpacked one layer at a time, the next into a second buffer.
    """
    wide = bytes_of(settings)
    block = 8 * shape.hidden + 2 * (shape.queries + 2 * shape.keys) + 3 * shape.inner
    numbers = tokens_at_once(settings) * (block + 4 * shape.hidden)
    unpacked = 2 * shape.hidden * shape.inner if settings.load_in_4bit else 0
    told = f"one block of {tokens_at_once(settings):,} tokens, with gradient checkpointing"
    return Part("activations", wide * (numbers + unpacked) / GB, told)


def loss(settings: Settings, shape: Shape, free_gb: float) -> Part:
    """The logits and what the loss makes of them, in chunks of tokens."""
    if settings.road != "sft":
        return Part("loss", PAIR_CHUNK_GB, "logits in tiles")
    logits = tokens_at_once(settings) * shape.vocabulary
    whole, most = logits * CHUNKED_AS / GB, min(CHUNK_GB, free_gb / 2)
    how = "logits in one piece" if whole <= most else "logits in chunks"
    return Part("loss", min(whole, most) * LOGIT_BYTES / CHUNKED_AS, how)


def answers(settings: Settings, shape: Shape) -> Part:
    """The keys and values of the answers that self-play generates at once."""
    length = settings.max_length + settings.max_new_tokens
    numbers = settings.generation_batch * length * 2 * shape.layers * shape.keys
    return Part("answers", 2 * numbers / GB, f"keys and values of {settings.generation_batch} answers")


def expected(settings: Settings, shape: Shape | None, counts: Counts | None, gpu_gb: float, rank: int) -> list[Part]:
    """The parts of the peak, in GB: by the shape, or where only the counts are known the least that they take."""
    return estimate(settings, shape, gpu_gb, rank) if shape else least(settings, counts, rank)


def one_at_once(settings: Settings) -> Settings:
    """The settings with which the fewest rows go through the model at once."""
    return settings.model_copy(update={"batch_size": 1, **({"generation_batch": 1} if settings.road == "spin" else {})})


def at_once_in_words(settings: Settings) -> str:
    """What an estimate is of: the rows of a batch, or a single one where a trial chooses how many go at once."""
    return "rows" if not settings.is_batch_free else "one row" if settings.road == "sft" else "one pair"


def check_memory(settings: Settings) -> None:
    """Say how much of the GPU's memory the training will take, where that is known. Raises ModelError where it is clearly too much."""
    gpu = first_gpu()
    shape = known_shape(settings) if gpu else None
    counts = known_counts(settings) if gpu and shape is None else None
    if gpu is None or (shape is None and counts is None):
        return
    parts_of = partial(expected, shape=shape, counts=counts, gpu_gb=gpu.memory_gb, rank=adapter_rank(settings))
    parts = parts_of(settings)
    total = sum(part.gb for part in parts)
    told, how = ", ".join(f"{part.name} {part.gb:.1f}" for part in parts), "about" if shape else "at least"
    say(
        f"memory: {how} {total:.1f} of {gpu.memory_gb:.1f} GB VRAM expected for {at_once_in_words(settings)} as long as max_length ({told})"
    )
    if counts and counts.active:
        say(f"memory: {counts.active / 1e9:.1f} of {(counts.narrow + counts.wide) / 1e9:.1f} billion weights work on each token, and all are held")  # fmt: skip
    lowest = sum(part.gb for part in parts_of(one_at_once(settings)))
    if lowest > MARGIN * gpu.memory_gb:
        raise ModelError(*too_much(settings, gpu.name, gpu.memory_gb, f"{how} {lowest:.0f}", parts))
    if total > gpu.memory_gb:
        say(f"memory: {how_to_fit(settings, parts)}")


def adapter_rank(settings: Settings) -> int:
    """The rank of the adapter that is trained."""
    start = starting_adapter(settings)
    return adapter_config(start)["r"] if start else settings.lora_r


def how_to_fit(settings: Settings, parts: list[Part]) -> str:
    """What to do where the longest rows would not fit."""
    if parts[-1].name == "answers":
        return "should prompts and answers be that long, lower `generation_batch`: it changes nothing but the speed"
    if settings.batch_size in (AUTO, 1):
        return "should rows be that long, the first minutes of the training will tell whether they fit; a lower `max_length` would"
    return "should rows be that long, halve `batch_size` and double `gradient_accumulation`: the result is the same"


def too_much(settings: Settings, name: str, memory_gb: float, needs: str, parts: list[Part]) -> tuple[str, str]:
    """What is wrong where even one row at a time does not fit, and what to do about it."""
    what = f"{settings.model} needs {needs} GB VRAM even with `batch_size: 1`, and {name} has {memory_gb:.0f}."
    lasting = sum(part.gb for part in parts if part.name in ("weights", "adapter", "optimizer", "CUDA"))
    if lasting < memory_gb:
        return what, "Lower `max_length`."
    return what, "Choose a smaller model." if settings.load_in_4bit else "Set `load_in_4bit: true`, or choose a smaller model."  # fmt: skip


def known_config(settings: Settings) -> dict[str, Any] | None:
    """The model's config.json; None where it cannot be had, which `check_model` tells of."""
    if settings.model == "demo" or (is_offline() and is_hub_id(settings.model)):
        return None
    with contextlib.suppress(ModelError):
        config = small_files(model_source(settings), settings.revision) / "config.json"
        return json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
    return None


def known_shape(settings: Settings) -> Shape | None:
    """The shape of the model; None where its config.json cannot be had or does not tell it."""
    config = known_config(settings)
    shape = shape_of(config) if config else None
    if shape is None or "vision_config" not in config:
        return shape
    counts = known_counts(settings)
    return shape._replace(beside=max(0, counts.narrow + counts.wide - shape.numbers())) if counts else None


def known_counts(settings: Settings) -> Counts | None:
    """The counts of the model, of any family that transformers knows; None where they cannot be had, which `check` tells of elsewhere."""
    config = known_config(settings)
    if config is None or packed_otherwise(config):
        return None
    with contextlib.suppress(ModelError):
        start_engine()
        model = without_numbers(small_files(model_source(settings), settings.revision))
        return counts_of(model, settings.target_modules, skipped_of(config))
    return None
