"""The base model is found, judged by its size, and loaded with its adapter; only `engine.py` imports unsloth.

Prompts are rendered and answers generated here, in one way for every other part.
"""

from .adapter import adapter_config, adapter_folder, starting_adapter
from .base import (
    TOKENIZER_FILES,
    export_base,
    export_headers,
    growth,
    identity,
    is_quantized,
    model_files,
    model_source,
    refuse_without_gpu,
    shard_sizes,
    sixteen_bit_model,
    small_files,
    stored_as,
    weights_gb,
)
from .counts import Counts
from .decoding import Decoding, end_tokens
from .engine import (
    answering,
    choose_precision,
    compute_blocks_again,
    context_length,
    embedding_rows,
    end_ids,
    load_model,
    load_tokenizer,
    planned_layers,
    save_tokenizer,
    text_class,
    tokens_without_embedding,
)
from .generate import answer, checked
from .memory import MARGIN, Part, Shape, at_once_in_words, check_memory, expected, one_at_once
from .origin import GGUF_TAGS, HUB, card_data, on_hub, origin_of
from .residual import save_adapter, save_start, take_start
from .targets import layer_counts, layers_line
from .template import (
    CHAT_TEMPLATES,
    TEMPLATE,
    check_template,
    chosen_template,
    encode_prompt,
    held_date,
    opening,
    own_template,
    render_chat,
)
from .vllm import refuse_without_vllm

__all__ = [
    "CHAT_TEMPLATES",
    "GGUF_TAGS",
    "HUB",
    "MARGIN",
    "TEMPLATE",
    "TOKENIZER_FILES",
    "Counts",
    "Decoding",
    "Part",
    "Shape",
    "adapter_config",
    "adapter_folder",
    "answer",
    "answering",
    "at_once_in_words",
    "card_data",
    "check_memory",
    "check_template",
    "checked",
    "choose_precision",
    "chosen_template",
    "compute_blocks_again",
    "context_length",
    "embedding_rows",
    "encode_prompt",
    "end_ids",
    "end_tokens",
    "expected",
    "export_base",
    "export_headers",
    "growth",
    "held_date",
    "identity",
    "is_quantized",
    "layer_counts",
    "layers_line",
    "load_model",
    "load_tokenizer",
    "model_files",
    "model_source",
    "on_hub",
    "one_at_once",
    "opening",
    "origin_of",
    "own_template",
    "planned_layers",
    "refuse_without_gpu",
    "refuse_without_vllm",
    "render_chat",
    "save_adapter",
    "save_start",
    "save_tokenizer",
    "shard_sizes",
    "sixteen_bit_model",
    "small_files",
    "starting_adapter",
    "stored_as",
    "take_start",
    "text_class",
    "tokens_without_embedding",
    "weights_gb",
]
