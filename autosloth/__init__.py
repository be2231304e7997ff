"""AutoSloth: fine-tune a language model, prove its GGUF, publish both."""

__version__ = "0.1.0"
