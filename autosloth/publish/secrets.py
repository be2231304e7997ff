"""Nothing secret is published: every file is searched for the tokens in use, and for what looks like a key of a well-known service.

A key may come from a row of the dataset, by way of a sample in the card, or of what a tokenizer or a template was made of.
"""

from __future__ import annotations

import collections
import math
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import HubError
from ..output import counted

# What their makers, and the rules of gitleaks and detect-secrets, say that they look like; each begins with letters of its own.
SHAPES = {
    "a Hugging Face token": rb"hf_(?=[A-Z0-9]*[a-z])(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{30,}|hf_(?:oauth|jwt)_[A-Za-z0-9._-]{30,}",
    "an OpenAI or Anthropic key": rb"sk-(?=[A-Za-z_-]*[0-9])(?=[a-z0-9_-]*[A-Z])[A-Za-z0-9_-]{0,100}?[A-Za-z0-9]{20,}|sk-[0-9a-f]{32}(?![0-9A-Za-z])",
    "a Stripe key": rb"[rs]k_live_[A-Za-z0-9]{20,}",
    "an AWS key": rb"A(?:KIA|SIA|BIA|CCA)[A-Z2-7]{16}(?![A-Za-z0-9])",
    "a GitHub token": rb"gh[opsur]_(?=[A-Za-z]*[0-9])(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,}",
    "a GitLab token": rb"glpat-[A-Za-z0-9_-]{20,}",
    "a Slack token": rb"xox[abeoprs]-[0-9]+-[A-Za-z0-9-]{10,}",
    "a Google key": rb"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])",
    "a Groq key": rb"gsk_[A-Za-z0-9]{50,}",
    "an npm token": rb"npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])",
    "a PyPI token": rb"pypi-AgEIcHlwaS5vcmc[A-Za-z0-9_-]{50,}",
    "a SendGrid key": rb"SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}",
    "a Replicate token": rb"r8_[A-Za-z0-9]{37}(?![A-Za-z0-9])",
    "an NVIDIA key": rb"nvapi-[A-Za-z0-9_-]{60,}",
    "an xAI key": rb"xai-[A-Za-z0-9]{60,}",
    "a Google client's secret": rb"GOCSPX-[A-Za-z0-9_-]{28}",
    "a DigitalOcean token": rb"dop_v1_[0-9a-f]{64}",
    "a private key": rb"-----BEGIN [A-Z ]*PRIVATE KEY(?: BLOCK)?-----(?:\s|\\[nr])*[A-Za-z0-9+/]{30,}",
}
PATTERNS = {kind: re.compile(shape) for kind, shape in SHAPES.items()}
# One search for how they begin, each with a letter of its own by which the regex engine skips; the few that it finds in a GB are looked at.
BEGINNINGS = re.compile(
    rb"hf_|sk-|rk_live_|sk_live_|A[KSB]IA|ACCA|gh[opsur]_|github_pat_|glpat-|xox[abeoprs]-|AIza|gsk_|npm_|pypi-A|SG\.|r8_|nvapi-|xai-|GOCSPX-|dop_v1_|-----BEGIN [A-Z ]{0,20}PRIVATE"
)
# What ends in a letter or digit and is no part of a word: as JSON, addresses and terminals write other characters.
ESCAPED = re.compile(rb"(\\u[0-9a-fA-F]{4}|\\[bfnrt]|%[0-9A-F]{2}|\x1b\[[0-9;]{0,4}m)$")
WINDOW = 1 << 24  # bytes between which other threads run
LONGEST = 1 << 12  # of what is matched
ENTROPY = 3.0  # bits a character: keys are drawn at random, placeholders such as `hf_xxxx` are not
IN_USE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")
SHORTEST = 16  # of a secret in use
FIELD = re.compile(rb"^    (question|expected|before|after) ", re.MULTILINE)  # of a sample in the card


class Found(NamedTuple):
    """A secret in a file: its kind in words, the byte that it begins at, and its first characters; never the whole."""

    kind: str
    at: int
    begins: str


def refuse_secrets(folder: Path) -> None:
    """Search every file before it is uploaded. Raises HubError with the place of the first secret."""
    found = [(path, secret) for path in sorted(folder.rglob("*")) if path.is_file() for secret in secrets_in(path)]
    if not found:
        return
    path, secret = found[0]
    others = f", and {counted(len(found) - 1, 'other place')}" if len(found) > 1 else ""
    card = f"{path.parent.parent / 'facts.json'}, run `autosloth card {path.parent.parent}`"
    raise HubError(
        f"{path} holds what looks like {secret.kind} (`{secret.begins}...`): {place_of(path, secret.at)}{others}; nothing was uploaded.",
        f"If it is a real one, revoke it where it is from. Take it out of {card if path.name == 'README.md' else path} and publish again; or take its row out of the dataset and train again.",
    )


def secrets_in(path: Path) -> list[Found]:
    """The secrets of one file, whatever is in it, in their order."""
    if not path.stat().st_size:
        return []
    found = {}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for start in range(0, len(content), WINDOW):
            for begins in BEGINNINGS.finditer(content, start, start + WINDOW + LONGEST):
                if kind := kind_at(content, begins.start()):
                    found[begins.start()] = Found(kind, begins.start(), begins[0][:10].decode())
        for value, name in in_use().items():
            for at in places(content, value):
                found[at] = Found(f"the secret in use as {name}", at, value[:3].decode(errors="replace"))
    return [found[at] for at in sorted(found)]


def in_use() -> dict[bytes, str]:
    """The secrets of this process by value, with the names that they go by: the Hub's token, and what the environment calls a token, key or secret."""
    from huggingface_hub import get_token

    named = {name: value.strip() for name, value in os.environ.items() if IN_USE.search(name.upper())}
    named = {"HF_TOKEN": get_token() or "", **named}
    return {
        value.encode(): name for name, value in named.items() if len(value) >= SHORTEST and not value.startswith("/")
    }


def places(content: mmap.mmap, value: bytes) -> Iterator[int]:
    """Where a value stands."""
    at = content.find(value)
    while at >= 0:
        yield at
        at = content.find(value, at + 1)


def kind_at(content: mmap.mmap, at: int) -> str | None:
    """What the bytes at a place look like, if they look like a secret: drawn at random, and not the end of a longer word."""
    before = content[max(at - 8, 0) : at]
    if re.search(rb"[A-Za-z0-9_-]$", before) and not ESCAPED.search(before):
        return None
    part = content[at : at + LONGEST]
    for kind, pattern in PATTERNS.items():
        if match := pattern.match(part):
            drawn = entropy(match[0]) >= ENTROPY and not match[0].endswith(b"EXAMPLE")  # as AWS's own pages have it
            return kind if drawn else None
    return None


def entropy(word: bytes) -> float:
    """Bits a character, by how often each one is there (Shannon).

    >>> entropy(b"aabb"), entropy(b"abcd")
    (1.0, 2.0)
    """
    shares = [count / len(word) for count in collections.Counter(word).values()]
    return -sum(share * math.log2(share) for share in shares)


def place_of(path: Path, at: int) -> str:
    """Where in a file a byte stands: by line and column in a text, in the card also by the sample."""
    with open(path, "rb") as file:
        before = file.read(min(at, WINDOW))
    if b"\0" in before or at > WINDOW:
        return f"byte {at}"
    line = before.rpartition(b"\n")[2]
    number, column = before.count(b"\n") + 1, len(line.decode(errors="replace")) + 1
    place = f"line {number}, column {column}"
    fields = FIELD.findall(before)
    if path.name != "README.md" or not fields or not line.startswith(b"    "):
        return place
    return f"{place}, in `{fields[-1].decode()}` of sample {fields.count(b'question')}"
