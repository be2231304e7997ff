"""A run's proven GGUF is talked to: in the terminal, in the notebook, by an OpenAI-compatible server.

It answers by llama.cpp behind the prompts of the training; nothing of what is said is recorded.
"""

from .panel import open_chat
from .server import serve
from .speaker import Sampling
from .terminal import chat

__all__ = ["Sampling", "chat", "open_chat", "serve"]
