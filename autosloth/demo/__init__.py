"""The embedded tiny base, which knows a forest of sloths, and its toy task for each road.

Both are made on this machine, offline, once.
"""

from .forest import demo_base, sft_rows
from .manners import demo_adapter, dpo_rows

__all__ = [
    "demo_adapter",
    "demo_base",
    "dpo_rows",
    "sft_rows",
]
