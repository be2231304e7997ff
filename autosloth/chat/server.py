"""`autosloth serve`: the line that starts llama-cpp-python's OpenAI-compatible server on a run's GGUF, such that it answers as `chat` does."""

from __future__ import annotations

import importlib.util
import shlex
import sys
from pathlib import Path
from typing import Any

from ..export import llama_cpp
from ..models import opening
from ..output import say
from ..proof import opened
from ..run import Run
from .speaker import Speaker, chat_file, context_of

# What llama_cpp.server imports, by the names under which pip knows it.
NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "sse_starlette": "sse-starlette"}
NEEDED |= {"starlette_context": "starlette-context", "pydantic_settings": "pydantic-settings"}
PROBE = [{"role": "user", "content": "Hello"}]


def serve(run: Run, port: int = 8000) -> None:
    """Print the line, and before it what the server lacks, or does otherwise than `chat`. Raises VerifyError, ModelError."""
    file, name = chat_file(run), run.settings.run_name
    with opened(file, vocab_only=True) as model:
        context, others = context_of(model.metadata), differences(Speaker.of(run, file), model)
    for other in others:
        say(f"serve: {other}")
    if lacking := [name for module, name in NEEDED.items() if importlib.util.find_spec(module) is None]:
        say(f"serve: the server needs this first: {shlex.join([sys.executable, '-m', 'pip', 'install', *lacking])}")
    say(
        f"serve: at http://127.0.0.1:{port}/v1 and from this machine alone, the model {name}; at temperature 0 it answers as `autosloth chat` does"
    )
    say(server_line(file, name, context, port))


def server_line(file: Path, name: str, context: int, port: int) -> str:
    """The line for a shell. HOST and PORT are variables, since those in the environment overrule the server's options.

    `chat_template.default` is the file's own template; without a word the server takes one of its own that resembles it.
    """
    options = {"model": file.resolve(), "model_alias": name, "chat_format": "chat_template.default", "n_ctx": context}
    if llama_cpp().llama_supports_gpu_offload():
        options["n_gpu_layers"] = -1
    words = [str(word) for option, value in options.items() for word in (f"--{option}", value)]
    return f"HOST=127.0.0.1 PORT={port} {shlex.join([sys.executable, '-m', 'llama_cpp.server', *words])}"


def differences(speaker: Speaker, model: Any) -> list[str]:
    """What the server does with this file otherwise than `chat`: a BOS token that the template does not write, ends that the file does not know."""
    found, tokenizer = [], speaker.tokenizer
    asked = tokenizer.apply_chat_template(PROBE, tokenize=False, add_generation_prompt=True)
    if not asked.startswith(opening(tokenizer)):
        found.append(
            f"its prompts lack the {opening(tokenizer)} that this model was trained to begin with, so its answers may be others"
        )
    vocabulary = llama_cpp().llama_model_get_vocab(model.model)
    if strange := [end for end in sorted(speaker.ends) if not llama_cpp().llama_vocab_is_eog(vocabulary, end)]:
        texts = ", ".join(map(repr, tokenizer.convert_ids_to_tokens(strange)))
        found.append(f"it does not end an answer at {texts}: send that as `stop`")
    return found
