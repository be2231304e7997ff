"""The publish folder is filled, its model card last. It is uploaded to the Hugging Face Hub, and read back."""

from .folder import write_card
from .hub import publish, publish_adapter, refuse_unverified
from .repositories import refuse_foreign_token

__all__ = [
    "publish",
    "publish_adapter",
    "refuse_foreign_token",
    "refuse_unverified",
    "write_card",
]
