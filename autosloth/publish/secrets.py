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
    "an OpenRouter key": rb"sk-or-v1-[0-9a-f]{64}",
    "an OpenAI or Anthropic key": rb"sk-(?=[A-Za-z_-]*[0-9])(?=[a-z0-9_-]*[A-Z])[A-Za-z0-9_-]{0,100}?[A-Za-z0-9]{20,}|sk-[0-9a-f]{32}(?![0-9A-Za-z])",
    "a Stripe key": rb"[rs]k_live_[A-Za-z0-9]{20,}",
    "an AWS key": rb"A(?:KIA|SIA|BIA|CCA)[A-Z2-7]{16}(?![A-Za-z0-9])|(?:aws_secret_access_key|AWS_SECRET_ACCESS_KEY)[\\\"' ]*[=:][\\\"' ]*[A-Za-z0-9+/]{40}(?![A-Za-z0-9+/=])",
    "an Azure key": rb"AccountKey=(?!Eby8vdM02xNOcqFl)[A-Za-z0-9+/]{86}==|SharedAccessKey=[A-Za-z0-9+/]{43}=",  # the one left out is the emulator's, known to all
    "a GitHub token": rb"gh[opsur]_(?=[A-Za-z]*[0-9])(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,}",
    "a GitLab token": rb"glpat-[A-Za-z0-9_-]{20,}|gl(?:ptt|dt|rt|cbt|soat)-(?=[A-Za-z_-]*[0-9])(?=[a-z0-9_-]*[A-Z])[A-Za-z0-9_-]{20,}",
    "a Slack token": rb"xox[abeoprs]-[0-9]+-[A-Za-z0-9-]{10,}|xapp-[0-9]-[A-Z0-9]+-[0-9]+-[a-z0-9]{30,}",
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
    "a Databricks token": rb"dapi[0-9a-f]{32}(?![0-9A-Za-z])",
    "a Docker token": rb"dckr_pat_[A-Za-z0-9_-]{27}",
    "a Perplexity key": rb"pplx-(?=[A-Za-z]*[0-9])[A-Za-z0-9]{40,}",
    "a Pinecone key": rb"pcsk_[A-Za-z0-9]{5,8}_[A-Za-z0-9]{50,}",
    "a Shopify token": rb"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}",
    "a Telegram bot's token": rb"(?:bot)?(?!12345)[0-9]{8,10}:A[A-Za-z0-9_-]{34}(?![A-Za-z0-9_-])",  # its documentation counts from 1
    "a JSON Web Token": rb"eyJ[A-Za-z0-9_-]{10,}\.(?!eyJzdWIiOiIxMjM0NTY3ODkwI)eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{20,}",  # the one left out is jwt.io's
    "a private key": rb"----[- ]BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?[- ]----(?:(?:\s|\\[nr])*[A-Z][A-Za-z-]{2,20}: [^\r\n\\]{1,100})*(?:\s|\\[nr])*[A-Za-z0-9+/]{30,}",
}  # fmt: skip
# A password in an address: eight characters or more, a letter and a digit among them, and no word that stands for one; at a host that others can reach and that is not kept
# for examples (RFC 2606).
ADDRESS = "an address with a password"
SHAPES[ADDRESS] = (
    rb"[a-z][a-z0-9+]{1,20}:\\?/\\?/[^\s:/@\"'`<>\\]{0,64}:"
    rb"(?=[^@]*[0-9])(?=[^@]*[A-Za-z])(?![^@]*(?i:pass|pwd|secret|token|key|your|example|change|hunter|1234|xxx|[${<*\[]))[^\s:/@\"'`<>\\]{8,100}"
    rb"@(?!(?i:(?:[a-z0-9-]+\.)*(?:example\.[a-z]+|example|test|invalid|localhost|local)(?![a-z0-9.-])|127\.))[A-Za-z0-9-]+\.[A-Za-z0-9]"
)
PATTERNS = {kind: re.compile(shape) for kind, shape in SHAPES.items()}
# One search for how they begin, by a first letter each, which is how the regex engine skips (a class of letters in its place makes it nine times as slow); the few
# that it finds in a GB are looked at.
BEGINNINGS = re.compile(
    rb"hf_|s(?:k-|k_live_|hp(?:at|ca|pa|ss)_)|r(?:8_|k_live_)|A(?:[KSB]IA|CCA|Iza|ccountKey=|WS_SECRET)|aws_secret|S(?:G\.|haredAccessKey=)|g(?:h[opsur]_|ithub_pat_|l(?:pat|ptt|dt|rt|cbt|soat)-|sk_)"
    rb"|x(?:ox[abeoprs]-|app-|ai-)|n(?:pm_|vapi-)|p(?:ypi-A|plx-|csk_)|GOCSPX-|d(?:op_v1_|api[0-9a-f]|ckr_pat_)|eyJ|:(?=A[A-Za-z0-9_-]{34}|\\?/\\?/)|----[- ]BEGIN [A-Z0-9 ]{0,20}PRIVATE"
)
# What stands before a colon: the number of a Telegram bot, the scheme of an address.
NUMBER, SCHEME = re.compile(rb"(?:bot)?[0-9]{8,10}$"), re.compile(rb"[a-z][a-z0-9+]{1,20}$")
# What ends in a letter or digit and is no part of a word: as JSON, addresses and terminals write other characters.
ESCAPED = re.compile(rb"(\\u[0-9a-fA-F]{4}|\\[bfnrt]|%[0-9A-F]{2}|\x1b\[[0-9;]{0,4}m)$")
WINDOW = 1 << 24  # bytes between which other threads run
LONGEST = 1 << 12  # of what is matched
ENTROPY = 3.0  # bits a character: keys are drawn at random, placeholders such as `hf_xxxx` are not
IN_USE = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD)$")
SHORTEST = 16  # of a secret in use
FIELD = re.compile(rb"^    (question|expected|before|after) ", re.MULTILINE)  # of a sample in the card
# How NumPy calls the two orders of bytes of UTF-16, and how a file of each may begin.
UTF_16 = {"<u2": b"\xff\xfe", ">u2": b"\xfe\xff"}
SAMPLED = 4099  # every so many bytes: an odd number, so that both bytes of a character come


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
    """The secrets of one file, whatever is in it, in UTF-8 or UTF-16, in their order."""
    if not path.stat().st_size:
        return []
    found = {}
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for start in range(0, len(content), WINDOW):
            stop = start + WINDOW + LONGEST
            found |= {each.at: each for each in keys_in(content, start, stop)}
            for order in UTF_16 if may_be_utf_16(content, start, stop) else ():
                keys = keys_in(in_ascii(content[start:stop], order))
                found |= {start + 2 * each.at: each._replace(at=start + 2 * each.at) for each in keys}
        for value, name in in_use().items():
            for at in (*places(content, value.encode()), *places(content, value.encode("utf-16-le")[:-1])):
                found[at] = Found(f"the secret in use as {name}", at, value[:3])
    return [found[at] for at in sorted(found)]


def keys_in(content: mmap.mmap | bytes, start: int = 0, stop: int | None = None) -> Iterator[Found]:
    """What looks like a key, of those that begin between two places."""
    for begins in BEGINNINGS.finditer(content, start, len(content) if stop is None else stop):
        at = begins.start()
        if begins[0] == b":":
            led = (NUMBER if content[at + 1 : at + 2] == b"A" else SCHEME).search(content[max(at - 21, 0) : at])
            at -= len(led[0]) if led else 0
        if kind := kind_at(content, at):
            yield Found(kind, at, content[at : min(begins.end(), at + 10)].decode())


def may_be_utf_16(content: mmap.mmap, start: int, stop: int) -> bool:
    """Whether a window may hold text in UTF-16: the first one of each file; others where the file begins with its mark, or an eighth of the bytes are 0."""
    sample = content[start:stop:SAMPLED]
    return start == 0 or content[:2] in UTF_16.values() or 8 * sample.count(0) > len(sample)


def in_ascii(part: bytes, order: str) -> bytes:
    r"""A text in UTF-16 as ASCII, a byte for each two; `?` for what is none of it.

    >>> in_ascii("sloth: 中".encode("utf-16-be"), ">u2")
    b'sloth: ?'
    """
    import numpy

    units = numpy.frombuffer(part[: len(part) // 2 * 2], order)
    return numpy.where(units < 128, units, ord("?")).astype("u1").tobytes()


def in_use() -> dict[str, str]:
    """The secrets of this process by value, with the names that they go by: the Hub's token, and what the environment calls a token, key or secret."""
    from huggingface_hub import get_token

    named = {name: value.strip() for name, value in os.environ.items() if IN_USE.search(name.upper())}
    named = {"HF_TOKEN": get_token() or "", **named}
    return {value: name for name, value in named.items() if len(value) >= SHORTEST and not value.startswith("/")}


def places(content: mmap.mmap, value: bytes) -> Iterator[int]:
    """Where a value stands."""
    at = content.find(value)
    while at >= 0:
        yield at
        at = content.find(value, at + 1)


def kind_at(content: mmap.mmap | bytes, at: int) -> str | None:
    """What the bytes at a place look like, if they look like a secret: drawn at random, and not the end of a longer word.

    Of addresses, which stand in prose as `https://user:password@example.com`, only those count whose password looks like one that is in use (`ADDRESS`):
    an alarm stops the upload, and there is no way around it but to take the text away. A password of letters alone is not found for that.
    """
    before = content[max(at - 8, 0) : at]
    in_word = re.search(rb"[A-Za-z0-9_-]$", before) and not ESCAPED.search(before)
    part = content[at : at + LONGEST]
    for kind, pattern in PATTERNS.items():
        if match := pattern.match(part):
            drawn = entropy(match[0]) >= ENTROPY and b"EXAMPLE" not in match[0]  # as AWS's own pages have it
            return kind if drawn and (kind == ADDRESS or not in_word) else None
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
