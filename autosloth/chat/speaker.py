"""A GGUF file as one that answers: prompts by the tokenizer and the chat template of the training, tokens by llama.cpp, text as it comes."""

from __future__ import annotations

import codecs
import os
import re
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import ModelError, VerifyError
from ..export import llama_cpp
from ..models import render_chat
from ..output import say
from ..proof import opened
from ..run import Run, known_hash, read_json

CONTEXT = 4096  # tokens of a conversation with its answer, at most; a model that was made for fewer has fewer
ROOM = 1 / 4  # of them, kept for the answer
MARK = "\U0010fffd"  # for private use: around the number of a text that would be read as a control token

Said = Callable[[str], None]


@dataclass(frozen=True)
class Sampling:
    """temperature 0 takes the likeliest token; 1 samples from the model itself, with nothing cut off. The same seed gives the same answers."""

    temperature: float = 0.0
    seed: int = 0


def chat_file(run: Run) -> Path:
    """The first GGUF of a run that is a whole model; says so where it is not proven. Raises VerifyError where there is none, or it failed its proof."""
    made = [file for file in run.facts.get("export", {}).get("gguf", []) if file["type"] != "ADAPTER"]
    if not made:
        raise VerifyError(
            f"{run.folder} has no GGUF of a whole model to talk to.",
            f"`autosloth export {shlex.quote(str(run.folder))}` makes it, if `quantizations` in its settings names a type such as q8_0.",
        )
    path, proof = run.path(made[0]["path"]), run.facts.get("verify", {})
    if not path.is_file() or path.stat().st_size != made[0]["bytes"]:
        wrong = "is missing" if not path.is_file() else "is not the file that was made: its size is another"
        raise VerifyError(f"{path} {wrong}.", f"{run.command('gguf')} makes it again.")
    failed = run.failure("verify") is not None or proof.get("passed") is False
    if failed and not run.settings.publish_unverified:
        raise VerifyError(
            f"{path.name} failed its proof: it does not answer like the model that was trained.",
            f"`autosloth show {shlex.quote(str(run.folder))}` tells why; {run.command('gguf')} makes it again, and {run.command('verify')} proves it.",
        )
    proven = next((each for each in proof.get("files", []) if each["file"] == path.name), {})
    if proven.get("sha256", same := known_hash(path)) != same:
        raise VerifyError(
            f"{path} is not the file that was proven: its content has changed since.",
            f"{run.command('gguf')} makes it again, and {run.command('verify')} proves it.",
        )
    if failed or run.mark("verify") is None or proof.get("passed") is None:
        say(f"chat: {path.name} is NOT proven to answer like the model that was trained; {run.command('verify')} tells")
    return path


def context_of(head: dict[str, str]) -> int:
    """How many tokens a conversation with a model may have, by the metadata of its file."""
    return min(CONTEXT, int(head.get(f"{head['general.architecture']}.context_length", CONTEXT)))


def tokenizer_of_run(run: Run) -> Any:
    """The tokenizer of the training, with its chat template. Raises ModelError."""
    from transformers import AutoTokenizer

    if not run.path("adapter", "tokenizer_config.json").is_file():
        raise ModelError(
            f"{run.path('adapter')} has no tokenizer, by whose chat template prompts are made.",
            f"{run.command('train')} makes it again.",
        )
    return AutoTokenizer.from_pretrained(run.path("adapter"), trust_remote_code=False)


@dataclass
class Speaker:
    """One file with the tokenizer that makes its prompts; loaded when it is first asked. ends: the ids that end an answer, beside those that the file knows."""

    file: Path
    tokenizer: Any
    ends: set[int]
    open_files: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def of(cls, run: Run, file: Path) -> Speaker:
        """One of a run's files, or of its base, with the run's tokenizer. Raises ModelError."""
        tokenizer = tokenizer_of_run(run)
        known = read_json(run.path("reference", "rows.json")).get("ends", [])
        return cls(file, tokenizer, {tokenizer.eos_token_id, *known} - {None})

    @cached_property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        with opened(self.file, vocab_only=True) as head:
            return context_of(head.metadata)

    @cached_property
    def model(self) -> Any:
        """The file as llama-cpp-python loads it, on a GPU where that was built for one. Raises VerifyError."""
        layers = -1 if llama_cpp().llama_supports_gpu_offload() else 0
        options = {"n_ctx": self.context, "n_threads": os.cpu_count(), "n_gpu_layers": layers}
        return self.open_files.enter_context(opened(self.file, **options))

    def close(self) -> None:
        """Give its memory back."""
        self.open_files.close()
        self.__dict__.pop("model", None)

    @cached_property
    def control(self) -> dict[str, int]:
        """The tokens that are no text: those of the template, and those that end an answer. By what they are written as."""
        added = {
            token.content: number for number, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        return added | {self.tokenizer.convert_ids_to_tokens(end): end for end in self.ends}

    def prompt(self, messages: list[dict[str, Any]]) -> list[int]:
        """The ids that the answer to these messages goes on from, as in the training; but what a person types is text even where it is written as a control token.

        Raises ModelError where the chat template refuses such a chat.
        """
        held: list[str] = []

        def hold(found: re.Match) -> str:
            held.append(found[0])
            return f"{MARK}{len(held) - 1}{MARK}"

        written = "|".join(map(re.escape, sorted([*self.control, MARK], key=len, reverse=True)))
        turns = [{**turn, "content": re.sub(written, hold, turn["content"])} for turn in messages]
        pieces = re.split(f"{MARK}(\\d+){MARK}", render_chat(self.tokenizer, turns, answer_next=True))
        ids: list[int] = []
        for place, piece in enumerate(pieces):
            ids += self.as_text(held[int(piece)]) if place % 2 else self.ids(piece)
        return ids

    def ids(self, text: str, **options: Any) -> list[int]:
        """The ids of a text with nothing around it."""
        return self.tokenizer(text, add_special_tokens=False, **options).input_ids if text else []

    def as_text(self, written: str) -> list[int]:
        """The ids of a text that is written as a control token and is to be none."""
        ids = self.ids(written, split_special_tokens=True)
        if set(ids) & set(self.control.values()):  # a token that ends answers and is not marked as special
            ids = [token for letter in written for token in self.ids(letter)]
        return ids

    def answer(
        self, prompt: list[int], sampling: Sampling, tell: Said, stopped: Callable[[], bool]
    ) -> tuple[str, str | None]:
        """(answer, what cut it short if something did). `tell` hears each piece of text; one character comes whole, of however many tokens it is made."""
        library = llama_cpp()
        vocabulary = library.llama_model_get_vocab(self.model.model)
        whole = {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "repeat_penalty": 1.0}
        decoder, pieces, cut = codecs.getincrementaldecoder("utf-8")("replace"), [], None

        def add(data: bytes, last: bool = False) -> None:
            if text := decoder.decode(data, last):
                pieces.append(text)
                tell(text)

        self.model.set_seed(sampling.seed)
        for made, token in enumerate(self.model.generate(prompt, temp=sampling.temperature, **whole), start=1):
            if token in self.ends or library.llama_vocab_is_eog(vocabulary, token):
                break
            add(self.model.detokenize([token], prev_tokens=prompt))
            if stopped():
                cut = "stopped"
                break
            if len(prompt) + made >= self.context:
                cut = f"the context of {self.context} tokens is full"
                break
        add(b"", last=True)
        return "".join(pieces), cut
