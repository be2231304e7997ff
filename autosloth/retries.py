"""What fails for the moment is tried again: a Hub that is down or busy, a connection that is cut or stalls, a file that arrives spoiled.

The Hub's client (huggingface_hub 1.33) repeats the parts of an upload before its commit, and goes on with a file whose connection closes. It
does not repeat a commit, the making of a repository, a look-up, nor a file where the server errs or resets the connection; for most answers
it would wait for ever (`default_client_factory`), and of a file it compares the size only (`http_get`).
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from .output import say

WAITS_S = (1, 5, 25)  # before each further try of a whole step
LONGEST_S = 300  # that a server may ask to wait; the Hub counts requests by five minutes
STALLED_S = 60  # without a byte of an answer, or room for one of a request
PASSING = (408, 425, 429, 500, 502, 503, 504)
# That pass too when all of an upload is sent anew: the repository was deleted meanwhile, or somebody else commits at the same time.
ANEW = (404, 409, 412)
REFUSED = {401: "the token is not valid", 403: "the token has no permission", 404: "it does not exist"}  # by the Hub
BLOB = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
# A file that came short (http_get), and whatever hf_xet 1.8 gives up after tries of its own: errors of no kind that tells.
OF_TRANSFER = re.compile(r"^Consistency check failed|CAS Client Error")
Result = TypeVar("Result")

# Servers that answered this process: what was there may come back, what never was is told at once.
_heard: set[str] = set()


class SpoiledError(OSError):
    """A file has arrived with other bytes than those that its hash is of."""


def persistently(call: Callable[[], Result], also: tuple[int, ...] = ()) -> Result:
    """The result of a call that may be repeated, and is where the Hub or the way to it failed for the moment. Raises what it raised last.

    also: statuses beside PASSING that may pass.
    """
    mend_client()
    for wait in (*WAITS_S, None):
        try:
            return call()
        except Exception as error:
            cause = cause_of(error)
            if wait is None or not is_passing(cause, also) or (wait := max(wait, asked_to_wait(cause))) > LONGEST_S:
                raise
            reason = in_words(cause)
        say(f"hub: {reason}; trying again in {wait} s")
        time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def downloaded(call: Callable[[], Result]) -> Result:
    """The same for a call that fills the Hub's cache; what arrives spoiled is fetched again."""

    def once() -> Result:
        with as_hashed():
            return call()

    return persistently(once)


@functools.cache
def mend_client() -> None:
    """Have the Hub's client give up a request that nothing is heard of: most of its own calls set no limit, or set that there is none.

    And a server that asks to wait for longer than LONGEST_S, which it would do; and what it reads as JSON before it looks at the status
    (_validate_yaml), where a gateway's error is a page.
    """
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def limit(request: Any) -> None:
        limits = request.extensions["timeout"]
        request.extensions["timeout"] = {kind: seconds or STALLED_S for kind, seconds in limits.items()}

    def refuse(response: Any) -> None:
        too_long = asked_to_wait(response) > LONGEST_S
        if response.status_code in PASSING and (too_long or response.url.path.endswith("/api/validate-yaml")):
            response.raise_for_status()

    def hear(response: Any) -> None:
        _heard.add(response.url.host)

    def client() -> Any:
        made = default_client_factory()
        hooks = made.event_hooks
        made.event_hooks = {"request": [*hooks["request"], limit], "response": [hear, *hooks["response"], refuse]}
        return made

    set_client_factory(client)


def cause_of(error: BaseException | None) -> BaseException | None:
    """The error of the client, the server or the network that an error came from, or None."""
    import aiohttp
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    telling = (httpx.HTTPError, aiohttp.ClientError, TimeoutError, SpoiledError, OfflineModeIsEnabled)
    while error and not isinstance(error, telling) and not OF_TRANSFER.search(str(error)):
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return error


def is_passing(cause: BaseException | None, also: tuple[int, ...] = ()) -> bool:
    """Whether an error that `cause_of` found may be gone at the next try."""
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    if status := status_of(cause):
        return status in PASSING + also
    if isinstance(cause, httpx.ConnectError):
        return cause.request.url.host in _heard
    lasting = (OfflineModeIsEnabled, httpx.ProxyError, httpx.UnsupportedProtocol, httpx.LocalProtocolError)
    return cause is not None and not isinstance(cause, lasting)


def status_of(cause: BaseException | None) -> int | None:
    """The status of an answer that was an error; hf_xet tells it in its text alone."""
    if isinstance(cause, RuntimeError) and (told := re.search(r"HTTP status \w+ error \((\d{3})", str(cause))):
        return int(told[1])
    return getattr(getattr(cause, "response", None), "status_code", None) or getattr(cause, "status", None)


def asked_to_wait(cause: Any) -> int:
    """Seconds that the server asks to wait, by an error or an answer of it: by Retry-After, or as the Hub does where its limit is reached (RateLimit, a draft of the IETF)."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(getattr(cause, "response", cause), "headers", None) or {}
    limit = parse_ratelimit_headers(headers)
    told = headers.get("Retry-After", "")
    return int(told) if told.isdigit() else limit.reset_in_seconds if limit and not limit.remaining else 0


def in_words(cause: BaseException) -> str:
    """What happened, for a message; nothing of a request, which holds a token."""
    import httpx
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if status := status_of(cause):
        told = asked_to_wait(cause)
        wants = f", and asks to wait {told} s" if told else ""
        return f"the server answered with status {status}" + wants
    if isinstance(cause, (TimeoutError, httpx.TimeoutException)):
        return "the connection stalled"
    if isinstance(cause, httpx.ConnectError) or "Connector" in type(cause).__name__:
        return "there is no connection"
    if isinstance(cause, SpoiledError):
        return str(cause)
    if isinstance(cause, RuntimeError):  # of hf_xet
        return "the Hub's storage did not answer"
    return f"the connection was cut ({type(cause).__name__})"


@contextlib.contextmanager
def as_hashed() -> Iterator[None]:
    """What the Hub's cache gains meanwhile has the hash that it is stored by. Raises SpoiledError, and deletes what has not."""
    before = blobs()
    try:
        yield
    finally:
        if spoiled := [blob for blob in sorted(blobs() - before) if not has_its_hash(blob)]:
            for blob in spoiled:
                blob.unlink(missing_ok=True)
            raise SpoiledError(f"{len(spoiled)} of the files arrived spoiled")


def blobs() -> set[Path]:
    """The whole files in the Hub's cache; each is named by its hash (huggingface.co/docs/huggingface_hub/guides/manage-cache)."""
    from huggingface_hub import constants

    found = Path(constants.HF_HUB_CACHE).glob("*--*/blobs/*")
    return {path for path in found if BLOB.fullmatch(path.name)}


def has_its_hash(blob: Path) -> bool:
    """Whether a file is the one that it is named for: SHA-256 for a large file, git's SHA-1 for another. One that is gone is not judged."""
    try:
        with open(blob, "rb") as file:
            if len(blob.name) == 64:
                return hashlib.file_digest(file, "sha256").hexdigest() == blob.name
            content = file.read()
    except FileNotFoundError:
        return True
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == blob.name
