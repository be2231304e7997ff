"""The publish folder is filled, its model card last. It is uploaded to the Hugging Face Hub, and read back."""

from .folder import write_card
from .hub import publish, refuse_foreign_token, refuse_unverified

__all__ = [
    "publish",
    "refuse_foreign_token",
    "refuse_unverified",
    "write_card",
]
