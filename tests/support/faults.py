"""What may go wrong at the Hub, in one table: faults by operation, and whether each is survived.

    with Misbehaving(home) as hub:
        for fault in FAULTS["upload"]:
            hub.survive("upload", fault)   # raises AssertionError with what was lost, doubled or not named

Survived is a fault after which the operation ends by itself with every byte in its place and nothing doubled. One that lasts, a token that is
revoked say, is survived when it is a named problem and, once its cause is gone, the same command completes the work.

The clients work in a process of their own in which nobody sleeps: what they would have waited is recorded instead.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Self

from autosloth.publish.kept import marked
from support.commands import quick_process
from support.hub_server import File, HubServer

TOKEN = "hf_write" + "Zq7x" * 8
HEADER = b'{"w": {"dtype": "U8", "shape": [300000], "data_offsets": [0, 300000]}}'
WEIGHTS = struct.pack("<Q", len(HEADER)) + HEADER + random.Random(5).randbytes(300_000)
PUBLISHED = {
    "README.md": marked({"tags": ["autosloth"]}, "# A model").encode(),
    "adapter_config.json": b"{}",
    "adapter_model.safetensors": WEIGHTS,
    "model-Q8_0.gguf": b"GGUF" + WEIGHTS[::-1],
}
RUN = {"settings.json": b"{}", "checkpoints/checkpoint-2/adapter_model.safetensors": WEIGHTS}
MODEL = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "model.safetensors": WEIGHTS}
ROWS = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(2000)]
DATASET = {"train.jsonl": "".join(json.dumps(row) + "\n" for row in ROWS).encode()}
# At most, until a fault that never ends is a named problem.
REQUESTS = 80
MINUTES = 5


class Fault(NamedTuple):
    """One thing that goes wrong: its name, how to plan it for a repository, and, of one that lasts, words of the message and how it is put right."""

    name: str
    plan: Callable[[Misbehaving, str], None]
    words: tuple[str, ...] = ()
    mend: Callable[[Misbehaving, str], None] = lambda hub, repo: None
    waits: int = 0  # seconds that must have been waited


def failing(method: str, path: str, *how: Any, **more: Any) -> Callable[[Misbehaving, str], None]:
    """The next requests with this method and path, in which ID is the repository, fail in a way of `HubServer.fail_next`."""
    return lambda hub, repo: hub.fail_next(method, path.replace("ID", repo), *how, **more)


def meanwhile(method: str, path: str, what: str, **more: Any) -> Callable[[Misbehaving, str], None]:
    """`forget`, the repository is deleted, `revoke`, the token is, or `overtake`, another machine commits to a run's copy, when such a request comes."""
    return lambda hub, repo: hub.meanwhile(method, path.replace("ID", repo), partial(getattr(hub, what), repo), **more)


# Of each part: the method and the path of its request.
PARTS_OF_AN_UPLOAD: dict[str, tuple] = {
    "creation": ("POST", "/api/repos/create"),
    "announcement": ("POST", "ID/preupload/"),
    "batch": ("POST", "ID.git/info/lfs/objects/batch"),
    "file": ("PUT", "ID.git/info/lfs/objects/"),
    "check of a file": ("POST", "ID.git/info/lfs/verify"),
    "front matter": ("POST", "/api/validate-yaml"),
    "commit": ("POST", "ID/commit/"),
    "reading back": ("GET", "/api/models/ID$"),
}
FILE = ("GET", "ID/resolve/.*(safetensors|jsonl)$")
PARTS_OF_A_DOWNLOAD: dict[str, tuple] = {"look-up": ("GET", "/api/[a-z]+/ID"), "file": FILE}
PARTS_OF_AN_ADDRESS: dict[str, tuple] = {"look-up": ("HEAD", "ID/resolve/"), "file": ("GET", "ID/resolve/")}
PARTS_OF_A_COPY = {name: PARTS_OF_AN_UPLOAD[name] for name in ("creation", "announcement", "file", "commit")}
STATUSES = (500, 502, 503, 504)
SLOW_DOWN = {"status": 429, "headers": {"Retry-After": "40"}}
LIMITED = {
    "status": 429,
    "headers": {"RateLimit": '"api";r=0;t=70', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'},
}


A_DAY = {"status": 429, "headers": {"Retry-After": "86400"}}


def passing(parts: dict[str, tuple], **more: Any) -> list[Fault]:
    """Of each part of an operation: every error of a server, connections that break in every way, requests that are too many."""
    found = []
    for part, (method, path) in parts.items():
        fails = partial(failing, method, path, **more)
        found += [Fault(f"{status} for the {part}", fails(status=status)) for status in STATUSES]
        found += [
            Fault(f"connection cut at the {part}", fails(status=None)),
            Fault(f"connection reset in the middle of the {part}", fails(how="reset")),
            Fault(f"the {part} stalls", fails(how="stalled")),
            Fault(f"429 for the {part}", fails(**SLOW_DOWN), waits=0 if method == "HEAD" else 40),
        ]
    return found


def lasting(part: str, method: str, path: str, refused: str = "may not be read") -> list[Fault]:
    """Of one part: a token revoked before it, a refusal, and errors without end; refused: words of the refusal."""
    return [
        Fault(
            f"token revoked before the {part}",
            meanwhile(method, path, "revoke"),
            ("the token is not valid",),
            Misbehaving.allow,
        ),
        Fault(f"403 for the {part}", failing(method, path, 403, times=-1), (refused,)),
        Fault(
            f"429 for the {part} that asks for a day",
            failing(method, path, times=-1, **A_DAY),
            ("asks to wait 86400 s",),
        ),
        Fault(f"503 for the {part} without end", failing(method, path, 503, times=-1), ("status 503",)),
        Fault(f"the connection is always reset at the {part}", failing(method, path, how="reset", times=-1), ("cut",)),
    ]


class Misbehaving(HubServer):
    """A Hub on loopback with a process of clients, in which operations are tried against faults."""

    def __init__(self, home: Path) -> None:
        super().__init__()
        self.home, self.numbers, self.stack = home, itertools.count(), ExitStack()

    def __enter__(self) -> Self:
        super().__enter__()
        self.allow("")
        given = self.env(self.home / "huggingface", TOKEN) | {
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
            "HF_HUB_ETAG_TIMEOUT": "1",
        }
        self.pool = self.stack.enter_context(quick_process(given))
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self.stack.close()

    def allow(self, repo: str) -> None:
        self.add_token(TOKEN, user="team")

    def revoke(self, repo: str) -> None:
        self.remove_token(TOKEN)

    def forget(self, repo: str) -> None:
        self.remove_repo("model", repo)
        self.remove_repo("dataset", repo)

    def overtake(self, repo: str) -> None:
        from autosloth.hub_copy import ABOUT

        about = ABOUT.format(name="a run", state="ab12").encode()
        self._repos["model", repo].commit("theirs", {"README.md": File.at("README.md", about)})

    def survive(self, operation: str, fault: Fault) -> None:
        """Try an operation against a fault. Raises AssertionError where it is not survived."""
        repo = f"team/{next(self.numbers)}-{operation}".replace(" ", "-")
        prepare, _, judge = OPERATIONS[operation]
        prepare(self, repo)
        self.requests.clear()
        fault.plan(self, repo)
        told, waited = self.pool.submit(told_of, operation, self.url, self.home, repo).result()
        assert len(self.requests) <= REQUESTS, f"{len(self.requests)} requests"
        assert sum(waited) <= MINUTES * 60, f"waited for {sum(waited)} s"
        if fault.words:
            assert isinstance(told, tuple), "it was no problem"
            assert all(word in told[0] for word in fault.words), told[0]
            assert all(TOKEN not in sentence for sentence in told)
            self.forget_faults()
            fault.mend(self, repo)
            told, waited = self.pool.submit(told_of, operation, self.url, self.home, repo).result()
        else:
            assert not any(planned.times for planned in self._faults), "the fault did not happen"
        assert not isinstance(told, tuple), told
        assert sum(waited) >= fault.waits, waited
        judge(self, repo, told)
        self.forget_faults()


# -------------------- in the clients' process

WAITED: list[float] = []


def be_quick() -> None:
    """Nobody sleeps, and what stalls is given up at once."""
    time.sleep = WAITED.append
    from huggingface_hub import file_download

    from autosloth import retries
    from autosloth.data import load

    retries.STALLED_S = load.STALLED_S = 1
    file_download._ETAG_RETRY_TIMEOUT = 1


def told_of(operation: str, *about: Any) -> tuple[Any, list[float]]:
    """What an operation gives, or the two sentences of its named problem; and what was waited."""
    from autosloth.errors import AutoSlothError

    WAITED.clear()
    try:
        result = OPERATIONS[operation][1](*about)
    except AutoSlothError as error:
        result = error.what, error.todo
    return result, list(WAITED)


def hashes(paths: list[Path]) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def publish_folder(url: str, home: Path, repo: str) -> str:
    from autosloth.hub_client import hub_api
    from autosloth.publish.upload import compare_with_hub, hub_errors, upload
    from autosloth.settings import SFTSettings

    folder = home / repo.replace("/", "-")
    folder.mkdir(exist_ok=True)
    for name, content in PUBLISHED.items():
        (folder / name).write_bytes(content)
    with hub_errors(repo):
        upload(folder, repo, SFTSettings(model="demo", dataset="demo"), home)
        return compare_with_hub(hub_api(), folder, repo)


def run_of(home: Path, repo: str) -> Any:
    """The settings of a run whose copy is this repository."""
    from autosloth.hub_copy import SUFFIX
    from autosloth.settings import SFTSettings

    name = repo.removeprefix("team/").removesuffix(SUFFIX)
    return SFTSettings(
        model="demo", dataset="demo", run_name=name, repo="team/x", storage=str(home), hub_checkpoints=True
    )


def keep_checkpoints(url: str, home: Path, repo: str) -> None:
    from autosloth.hub_copy import commit, copy_errors, take
    from autosloth.retries import ANEW, persistently

    settings = run_of(home, repo)
    for name, content in RUN.items():
        path = settings.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with copy_errors("written"):
        persistently(partial(commit, take(settings.folder), settings), also=ANEW)


def bring_checkpoints_back(url: str, home: Path, repo: str) -> dict[str, bytes]:
    from autosloth.hub_copy import bring_back

    settings = run_of(home, repo)
    bring_back(settings)
    return {name: (settings.folder / name).read_bytes() for name in RUN}


def fetch_base(url: str, home: Path, repo: str) -> dict[str, str]:
    from autosloth.models.base import identity, model_files, weights_gb
    from autosloth.settings import SFTSettings

    assert weights_gb(repo) > 0
    identity(SFTSettings(model=repo, dataset="demo"))
    return hashes(list(model_files(repo).iterdir()))


def fetch_shards(url: str, home: Path, repo: str) -> dict[str, str]:
    from autosloth.models.base import small_files
    from autosloth.weights.streamed import Shards, streamed_base

    with streamed_base(small_files(repo), repo, home, writes=1e12) as folder:
        shards = Shards(folder)
        for name in shards.sizes:
            shards.need(name)
        found = hashes(list(folder.iterdir()))
        for name in shards.sizes:
            shards.drop(name)
    return {name: found[name] for name in MODEL}


def load_to_train(url: str, home: Path, repo: str) -> str:
    """The model by Unsloth, with an adapter on it, and a hash of its weights."""
    from autosloth.models.engine import load_model
    from autosloth.settings import SFTSettings

    model = load_model(SFTSettings(model=repo, dataset="demo", load_in_4bit=False, max_length=64))
    weights = sorted((name, tensor) for name, tensor in model.state_dict().items() if "lora" not in name)
    return hashlib.sha256(b"".join(tensor.float().numpy().tobytes() for _, tensor in weights)).hexdigest()


def read_rows(url: str, home: Path, dataset: str) -> list[dict]:
    from autosloth.data.load import load_raw
    from autosloth.settings import SFTSettings

    return list(load_raw(SFTSettings(model="demo", dataset=dataset))[0])


def read_address(url: str, home: Path, repo: str) -> list[dict]:
    """By another name of the machine: what is at the Hub's own is no address for `datasets`."""
    host = url.replace("127.0.0.1", "localhost")
    return read_rows(url, home, f"{host}/datasets/{repo}/resolve/main/train.jsonl")


# -------------------- before and after


def nothing(hub: Misbehaving, repo: str) -> None:
    """A repository that does not exist yet."""


def add_copy(hub: Misbehaving, repo: str) -> None:
    from autosloth.hub_copy import ABOUT

    about = ABOUT.format(name="a run", state="ab12")
    hub.add_repo("model", repo, {**RUN, "README.md": about.encode()}, private=True)


def add_model(hub: Misbehaving, repo: str) -> None:
    hub.add_repo("model", repo, MODEL, private=True)


def add_base(hub: Misbehaving, repo: str) -> None:
    from autosloth.demo import demo_base

    hub.add_repo("model", repo, demo_base(), private=True)


def add_dataset(hub: Misbehaving, repo: str) -> None:
    hub.add_repo("dataset", repo, DATASET, private=True)


def add_file(hub: Misbehaving, repo: str) -> None:
    hub.add_repo("dataset", repo, DATASET)


def whole_upload(hub: Misbehaving, repo: str, commit: str) -> None:
    held = hub.files("model", repo)
    assert {name: held.get(name) for name in PUBLISHED} == PUBLISHED
    messages = [commit.message for commit in hub.commits("model", repo)]
    assert messages[:3] == ["initial commit", "AutoSloth: adapter and GGUF", "AutoSloth: card"], messages
    assert all(commit.paths for commit in hub.commits("model", repo)), "an empty commit"
    assert commit == hub.commits("model", repo)[-1].sha


def whole_copy(hub: Misbehaving, repo: str, _: None) -> None:
    held = hub.files("model", repo)
    assert {name: held.get(name) for name in RUN} == RUN
    assert [commit.message for commit in hub.commits("model", repo)] == [
        "initial commit",
        f"{len(RUN) + 1} files of a run",
    ]


def same_run(hub: Misbehaving, repo: str, found: dict[str, bytes]) -> None:
    assert found == RUN


def whole_model(hub: Misbehaving, repo: str, found: dict[str, str]) -> None:
    assert found == {name: hashlib.sha256(content).hexdigest() for name, content in MODEL.items()}


def same_weights(hub: Misbehaving, repo: str, found: str) -> None:
    """Those of every load before."""
    hub.weights = getattr(hub, "weights", found)
    assert found == hub.weights


def whole_rows(hub: Misbehaving, repo: str, found: list[dict]) -> None:
    assert found == ROWS


OPERATIONS = {
    "upload": (nothing, publish_folder, whole_upload),
    "checkpoints": (nothing, keep_checkpoints, whole_copy),
    "back from checkpoints": (add_copy, bring_checkpoints_back, same_run),
    "base": (add_model, fetch_base, whole_model),
    "shards": (add_model, fetch_shards, whole_model),
    "loading": (add_base, load_to_train, same_weights),
    "dataset": (add_dataset, read_rows, whole_rows),
    "address": (add_file, read_address, whole_rows),
}


# -------------------- the table

COMMIT, PUT = PARTS_OF_AN_UPLOAD["commit"], PARTS_OF_AN_UPLOAD["file"]


def of_an_upload() -> list[Fault]:
    """What may happen to an upload beside what passes."""
    found = []
    for number, commit in enumerate(("commit", "card's commit")):
        found += [
            Fault(f"the answer to the {commit} is lost", failing(*COMMIT, None, skip=number, how="after")),
            Fault(f"the {commit} is done and answered with 504", failing(*COMMIT, 504, skip=number, how="after")),
            Fault(f"409 for the {commit}", failing(*COMMIT, 409, skip=number)),
            Fault(f"412 for the {commit}", failing(*COMMIT, 412, skip=number)),
            Fault(f"repository deleted before the {commit}", meanwhile(*COMMIT, "forget", skip=number)),
        ]
    return [
        *found,
        Fault(
            "somebody else creates it first",
            lambda hub, repo: hub.meanwhile(
                "POST", "/api/repos/create", partial(hub.add_repo, "model", repo, {".gitattributes": b""})
            ),
        ),
        Fault("the answer to the creation is lost", failing("POST", "/api/repos/create", None, how="after")),
        Fault("repository deleted before a file", meanwhile(*PUT, "forget", skip=1)),
        Fault(
            "repository deleted before it is read back",
            meanwhile("GET", "/api/models/ID$", "forget", skip=1),
            ("does not exist",),
        ),
        Fault("the Hub's limit is reached at the commit", failing(*COMMIT, **LIMITED), waits=70),
        Fault(
            "a file is stored wrong",
            lambda hub, repo: hub.tamper("model", repo, "model-Q8_0.gguf", b"GGUF"),
            ("does not hold what was uploaded: model-Q8_0.gguf",),
        ),
        Fault(
            "the card is stored wrong",
            lambda hub, repo: hub.tamper(
                "model", repo, "README.md", PUBLISHED["README.md"].replace(b"model", b"modem")
            ),
            ("README.md",),
        ),
    ]


def spoiled() -> list[Fault]:
    """What may happen to a file from the Hub beside what passes."""
    return [
        Fault("a byte of a file arrives wrong", failing(*FILE, how="wrong")),
        Fault("a file arrives wrong without end", failing(*FILE, how="wrong", times=-1), ("spoiled",)),
        Fault("a file is reset three times", failing(*FILE, how="reset", times=3)),
        Fault("503 for what is asked of a file", failing("HEAD", "ID/resolve/", 503)),
    ]


def deleted(add: Callable[[Misbehaving, str], None]) -> list[Fault]:
    """The repository is, before its file is fetched; and put back."""
    return [Fault("repository deleted before the file", meanwhile(*FILE, "forget"), ("does not exist",), add)]


FAULTS: dict[str, list[Fault]] = {
    "upload": [
        *passing(PARTS_OF_AN_UPLOAD),
        *lasting("file", *PUT, "no permission"),
        *lasting("commit", *COMMIT, "no permission"),
        *of_an_upload(),
    ],
    "checkpoints": [
        *passing(PARTS_OF_A_COPY),
        *lasting("commit", *COMMIT, "no permission"),
        Fault("the answer to the commit is lost", failing(*COMMIT, None, how="after")),
        Fault("the commit is done and answered with 504", failing(*COMMIT, 504, how="after")),
        Fault("412 for the commit", failing(*COMMIT, 412)),
        Fault("repository deleted before the commit", meanwhile(*COMMIT, "forget")),
        Fault(
            "another machine commits first", meanwhile(*COMMIT, "overtake"), ("Another machine",), Misbehaving.forget
        ),
    ],
    "back from checkpoints": [*passing(PARTS_OF_A_DOWNLOAD), *lasting("file", *FILE, "no permission")],
    "base": [*passing(PARTS_OF_A_DOWNLOAD), *lasting("file", *FILE), *spoiled(), *deleted(add_model)],
    "shards": [  # of a shard the header is read first, by a request of its own
        *passing({"look-up": PARTS_OF_A_DOWNLOAD["look-up"], "header": FILE}),
        *passing({"shard": FILE}, skip=1),
        *lasting("file", *FILE),
        *spoiled(),
        *deleted(add_model),
        Fault("a byte of a shard arrives wrong", failing(*FILE, how="wrong", skip=1)),
    ],
    "loading": [*passing({"file": FILE}), *lasting("file", *FILE), *spoiled(), *deleted(add_base)],
    "dataset": [*passing(PARTS_OF_A_DOWNLOAD), *lasting("file", *FILE), *spoiled(), *deleted(add_dataset)],
    "address": [*passing(PARTS_OF_AN_ADDRESS), *lasting("file", *PARTS_OF_AN_ADDRESS["file"], "status 403")[1:]],
}
