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
    "an OpenAI or Anthropic key": rb"sk-(?=[A-Za-z_-]{0,200}[0-9])(?=[a-z0-9_-]{0,200}[A-Z])[A-Za-z0-9_-]{0,100}?[A-Za-z0-9]{20,}|sk-[0-9a-f]{32}(?![0-9A-Za-z]|\.[a-z]{2,4}\b)",  # not a file that is called by its MD5
    "a Stripe key": rb"[rs]k_live_[A-Za-z0-9]{20,}",
    "an AWS key": rb"A(?:KIA|SIA|BIA|CCA)[A-Z2-7]{16}(?![A-Za-z0-9])",
    "an Azure key": rb"AccountKey=(?!Eby8vdM02xNOcqFl)[A-Za-z0-9+/]{86}==|SharedAccessKey=[A-Za-z0-9+/]{43}=",  # the one left out is the emulator's, known to all
    "a GitHub token": rb"gh[opsur]_(?=[A-Za-z]*[0-9])(?=[a-z0-9]*[A-Z])[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,}",
    "a GitLab token": rb"glpat-[A-Za-z0-9_-]{20,}|gl(?:ptt|dt|rt|cbt|soat)-(?=[A-Za-z_-]*[0-9])(?=[a-z0-9_-]*[A-Z])[A-Za-z0-9_-]{20,}",
    "a Slack token": rb"xox[abeoprs]-[0-9]+-([A-Za-z0-9-]{10,})|xapp-[0-9]-[A-Z0-9]+-[0-9]+-([a-z0-9]{30,})",
    "the address of a Slack or Discord webhook": rb"hooks\.slack\.com\\?/services\\?/T[A-Z0-9]{8,12}\\?/B[A-Z0-9]{8,12}\\?/([A-Za-z0-9]{24})|discord(?:app)?\.com\\?/api\\?/webhooks\\?/[0-9]{17,20}\\?/([A-Za-z0-9_-]{60,})",
    "a Google key": rb"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])|ya29\.[A-Za-z0-9_-]{60,200}",
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
    "a Telegram bot's token": rb"(?:bot)?(?!12345)[0-9]{8,10}:AA[A-Za-z0-9_-]{33}(?![A-Za-z0-9_-])",  # its documentation counts from 1
    "a LangSmith key": rb"lsv2_(?:pt|sk)_[0-9a-f]{32}_[0-9a-f]{10}",
    "a Together key": rb"tgp_v1_[A-Za-z0-9_-]{40,}",
    "a Tavily key": rb"tvly-(?:dev-|prod-)?[A-Za-z0-9]{30,}",
    "a Notion token": rb"ntn_[A-Za-z0-9]{40,}",
    "a Vault token": rb"hvs\.(?=[A-Za-z_-]*[0-9])(?=[a-z0-9_-]*[A-Z])[A-Za-z0-9_-]{24,200}",
    "a Supabase token": rb"sbp_[0-9a-f]{40}(?![0-9A-Za-z])",
    "a Grafana token": rb"glsa_[A-Za-z0-9]{32}_[0-9a-f]{8}",
    "a Linear key": rb"lin_api_[A-Za-z0-9]{40}",
    "a Jina key": rb"jina_[0-9a-f]{32}[A-Za-z0-9_-]{28}",
    "a Kaggle key": rb"KGAT_[0-9a-f]{32}|username\\?\"\s*:\s*\\?\"[^\"\\]{1,60}\\?\"\s*,\s*\\?\"key\\?\"\s*:\s*\\?\"([0-9a-f]{32})\\?\"",
    "a Weights & Biases key": rb"wandb_v1_[A-Za-z0-9_]{60,}",
    "a JSON Web Token": rb"eyJ[A-Za-z0-9_-]{10,}\.(?!eyJzdWIiOiIxMjM0NTY3ODkwI|eyJpc3MiOiJqb2UiLA0K)eyJ[A-Za-z0-9_-]{10,}\.(?!SflKxwRJSMeKKF2QT4fw|CRXP1A7WOeoJeXxjNni4|EGIM96RAZx35lJzdJsyH)([A-Za-z0-9_-]{20,})",
    # The shortest key, an Ed25519 one, has 64 characters; one that is shortened for a text goes on with dots, or a remark in brackets.
    "a private key": rb"----[- ]BEGIN [A-Z0-9 ]*PRIVATE KEY(?: BLOCK)?[- ]----(?:(?:[\s>\"',|]|\\+[nrt])*[A-Z][A-Za-z-]{2,20}: [^\r\n\\]{1,100})*((?:(?:[\s>\"',|]|\\+[nrt])*[A-Za-z0-9+/]){60,}+)(?!(?:\s|\\+[nrt])*(?:\.\.|\xe2\x80\xa6|[<\[*]))",
}  # fmt: skip
# Those left out of JSON Web Tokens are known to all: jwt.io's by its payload (`"sub":"1234567890"`) and, of other payloads, its signature; those of RFC 7515 and RFC 7519
# by their payload (`"iss":"joe"`); the two of Supabase's local demo (its guide to self-hosting) by their signatures.
# What is known by the name that it is assigned to, which may end a longer one.
AWS_SECRET, ASSIGNED = "an AWS secret", "a key that is named so"
QUOTED = rb"[\\\"' ]*[=:][\\\"' ]*"
SHAPES[AWS_SECRET] = (
    rb"(?:aws_secret_access_key|AWS_SECRET_ACCESS_KEY|[Ss]ecretAccessKey)" + QUOTED + rb"([A-Za-z0-9+/]{40})(?![A-Za-z0-9+/=])"
    rb"|(?:aws_session_token|AWS_SESSION_TOKEN)" + QUOTED + rb"([A-Za-z0-9+/]{100,400})"
)  # fmt: skip
# Letters and digits alone, a digit before the last letter: what code has there is a call, a name of words, or ends in its digit; of random ones of 32 characters 0.4 % have none.
SHAPES[ASSIGNED] = rb"API_KEY" + QUOTED + rb"((?=[A-Za-z]*[0-9]+[A-Za-z])[A-Za-z0-9]{24,200}+)(?![\w(.\[-])"
# A password in an address: eight characters or more, a letter and a digit among them, and no word that stands for one, nor a word with a few digits behind it; at a host that
# others can reach and that is not kept for examples (RFC 2606), in a private network (RFC 1918) or this machine.
ADDRESS = "an address with a password"
IN_USER, IN_PASSWORD = rb"[^\s:/@\"'`<>\\]{0,64}", rb"[^\s:/@\"'`<>\\]"
SHAPES[ADDRESS] = (
    rb"[a-z][a-z0-9+]{1,20}:\\?/\\?/" + IN_USER + rb":(?=" + IN_PASSWORD + rb"{0,99}[0-9])(?=" + IN_PASSWORD + rb"{0,99}[A-Za-z])"
    rb"(?!" + IN_PASSWORD + rb"{0,99}(?i:pass|p4ss|pwd|secret|token|key|your|example|change|hunter|1234|xxx|[${*\[]))"
    rb"(?!(?:[A-Za-z]?[a-z]+|[A-Z]+)[0-9]{1,4}@)" + IN_PASSWORD + rb"{8,100}"
    rb"@(?!(?i:(?:[a-z0-9-]+\.)*(?:example\.[a-z]+|example|test|invalid|localhost|local)(?![a-z0-9.-])|127\.|10\.[0-9]|192\.168\.|169\.254\.|172\.(?:1[6-9]|2[0-9]|3[01])\.))[A-Za-z0-9-]+\.[A-Za-z0-9]"
)  # fmt: skip
PATTERNS = {kind: re.compile(shape) for kind, shape in SHAPES.items()}
# One search for how they begin, by a first letter each, which is how the regex engine skips (a class of letters in its place makes it nine times as slow); the few
# that it finds in a GB are looked at.
BEGINNINGS = re.compile(
    rb"h(?:f_|vs\.|ooks\.slack)|s(?:k-|k_live_|hp(?:at|ca|pa|ss)_|bp_|ecretAccessK)|A(?:[KSB]IA|CCA|Iza|ccountKey=|WS_SE(?:CRET|SSION_T)|PI_KEY)|aws_se(?:cret|ssion_t)|S(?:G\.|haredAccessKey=|ecretAccessK)"
    rb"|g(?:h[opsur]_|ithub_pat_|l(?:pat|ptt|dt|rt|cbt|soat)-|lsa_|sk_)|d(?:op_v1_|api[0-9a-f]|ckr_pat_|iscord)|eyJ|ya29\.|username\\?\"|-(?:---[- ]BEGIN [A-Z0-9 ]{0,20}PRIVATE|(?<=[aibrspxyXi]-)(?:"
    rb"(?<=xai-)|(?<=xox[abeoprs]-|tvly-|xapp-|pplx-)|(?<=pypi-)(?=A)|(?<=nvapi-)|(?<=GOCSPX-)))|_(?<=[8kmnpaT2b]_)(?:(?<=r8_)|(?<=rk_)(?=live)|(?<=npm_|ntn_)|(?<=tgp_)(?=v1)|(?<=lin_)(?=api)|(?<=jina_|KGAT_|lsv2_|pcsk_)|(?<=wandb_)(?=v1))"
    rb"|:(?=AA[A-Za-z0-9_-]{33}|\\?/\\?/" + IN_USER + rb":" + IN_PASSWORD + rb"{8,100}@)"
)
# What stands before a character that it is found by, as there is less of it than of first letters: the number of a Telegram bot, the scheme of an address, the name of a service.
LED_BY = {
    b":": re.compile(rb"(?:bot)?[0-9]{8,10}$"),
    b"://": re.compile(rb"[a-z][a-z0-9+]{1,20}$"),
    b"_": re.compile(rb"(?:r8|rk|npm|ntn|tgp|lin|jina|KGAT|lsv2|pcsk|wandb)$"),
    b"-": re.compile(rb"(?:xai|xox[abeoprs]|tvly|xapp|pplx|pypi|nvapi|GOCSPX)$"),
}
# What ends in a letter or digit and is no part of a word: as JSON, addresses and terminals write other characters.
ESCAPED = re.compile(rb"(\\u[0-9a-fA-F]{4}|\\[bfnrt]|%[0-9A-F]{2}|\x1b\[[0-9;]{0,4}m)$")
WINDOW = 1 << 24  # bytes between which other threads run
LONGEST = 1 << 12  # of what is matched
ENTROPY = 3.0  # bits a character: keys are drawn at random, placeholders such as `hf_xxxx` are not
# What is written by people: a word that stands for a key, six characters that follow each other, in the alphabet or on the keyboard, two words between dashes, or twelve small
# letters beside capitals. How many drawn at random hold that by chance: of 160 letters and digits (OpenAI's longest) 0.05 % a word, 0.001 % a row, 0.001 % two words between
# dashes, 0.25 % twelve small letters; of the 34 letters of a Hub token, which need hold no digit, 0.02 % a word and 0.3 % twelve small letters.
ROWS = ("01234567890", "abcdefghijklmnopqrstuvwxyz", "qwertyuiop")
WORDS = ["your", "here", "example", "placeholder", "dummy", "test", "pacific", *(row[at : at + 6] for row in ROWS for at in range(len(row) - 5))]  # fmt: skip
STANDS_FOR_ONE = re.compile("|".join(WORDS).encode(), re.IGNORECASE)
BETWEEN_DASHES = re.compile(rb"[-_][A-Za-z][a-z]{4,}[-_](?:[A-Za-z0-9]*[-_])*[A-Za-z][a-z]{4,}[-_]")
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


def refuse_secrets(folder: Path, run: Path) -> None:
    """Search every file before it is uploaded; run: the run folder that they are of. Raises HubError with the place of the first secret."""
    found = [(path, secret) for path in sorted(folder.rglob("*")) if path.is_file() for secret in secrets_in(path)]
    if not found:
        return
    path, secret = found[0]
    others = f", and {counted(len(found) - 1, 'other place')}" if len(found) > 1 else ""
    name = (
        path if folder.parent == run else f"{path.relative_to(folder).as_posix()} of the upload"
    )  # whose folder is gone by now
    card = f"{run / 'facts.json'}, run `autosloth card {run}`"
    raise HubError(
        f"{name} holds what looks like {secret.kind} (`{secret.begins}...`): {place_of(path, secret.at)}{others}; nothing was uploaded.",
        f"If it is a real one, revoke it where it is from. Take it out of {card if path.name == 'README.md' else name} and publish again; or take its row out of the dataset and train again.",
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
        by = b"://" if begins[0] == b":" and content[at + 1 : at + 2] != b"A" else begins[0]
        led = LED_BY[by].search(content[max(at - 21, 0) : at]) if by in LED_BY else None
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
    an alarm stops the upload, and there is no way around it but to take the text away. Not found for that are a password of letters alone, one that is a word with a few
    digits behind it (`Summer2024`), and any at a host in a private network (`192.168.1.64`) or without a dot.
    """
    before = content[max(at - 8, 0) : at]
    in_word = re.search(rb"[A-Za-z0-9_-]$", before) and not ESCAPED.search(before)
    part = content[at : at + LONGEST]
    for kind, pattern in PATTERNS.items():
        if match := pattern.match(part):
            drawn = match[match.lastindex or 0]  # without what names it
            if kind == ADDRESS:
                return kind if entropy(drawn) >= ENTROPY else None
            return kind if is_drawn(drawn) and (kind in (AWS_SECRET, ASSIGNED) or not in_word) else None
    return None


def is_drawn(word: bytes) -> bool:
    """Whether characters look drawn at random.

    >>> is_drawn(b"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"), is_drawn(b"hf_YourTokenFromTheSettingsPage"), is_drawn(b"sk-loading-Spinner-animation-1Q2")
    (True, False, False)
    """
    of_words = re.search(rb"[a-z]{12}", word) and re.search(rb"[A-Z]", word)
    return not (entropy(word) < ENTROPY or of_words or STANDS_FOR_ONE.search(word) or BETWEEN_DASHES.search(word))


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
