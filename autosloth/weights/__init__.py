"""A model's weights as files, whole on the disk or fetched shard by shard.

What a LoRA adapter does to each of them is computed here, row by row.
"""

from .files import INDEX, read_header, shard_names
from .lora import PLAIN, WRAPPERS, Adapter, unusual_entries, without_numbers
from .mapping import parts_of, refuse_incomplete, tied_weights
from .stored import GROWTH, Packed, Plain, model_headers, packing, refuse_untold, whole_blocks, without_packing
from .streamed import SPARE_GB, TOLD, Shards, cache_folder, headers_only, same_disk, shard_by_shard, streamed_base

__all__ = [
    "GROWTH",
    "INDEX",
    "PLAIN",
    "SPARE_GB",
    "TOLD",
    "WRAPPERS",
    "Adapter",
    "Packed",
    "Plain",
    "Shards",
    "cache_folder",
    "headers_only",
    "model_headers",
    "packing",
    "parts_of",
    "read_header",
    "refuse_incomplete",
    "refuse_untold",
    "same_disk",
    "shard_by_shard",
    "shard_names",
    "streamed_base",
    "tied_weights",
    "unusual_entries",
    "whole_blocks",
    "without_numbers",
    "without_packing",
]
