"""A Hugging Face Hub on loopback, for tests: the real clients upload to it and load from it, and nothing leaves the machine.

    with HubServer() as hub:
        hub.add_repo("dataset", "team/questions", {"train.jsonl": b'{"q": "1 + 1"}'})
        hub.add_token("hf_write", user="team")
        subprocess.run([...], env=hub.env(home, token="hf_write"))
        assert hub.files("model", "team/out")["README.md"] == ...

Everything is in memory. Tried with huggingface_hub 1.33.0, datasets 4.8.5 and transformers 5.17.0, without Xet. Played are the
revisions `main` and commit hashes; no pull requests, branches, tags, listings of all repos or dataset viewer. An endpoint that
is not played answers 404 and says so in its message. It misbehaves when asked to: see `HubServer.fail_next` and `meanwhile`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Self
from urllib.parse import parse_qs, unquote, urlsplit


class HubServer:
    """The Hub as a test sees it: seed it, give its `env` to a subprocess, then ask what arrived.

    `url` is its address, `requests` every (method, path) that it answered, in order, and `outside` every address beyond it that a
    subprocess with its `env` tried to reach.
    """

    def __init__(self) -> None:
        self.requests: list[tuple[str, str]] = []
        self.outside: list[str] = []
        self._repos: dict[tuple[str, str], Repo] = {}
        self._tokens: dict[str, Token] = {}
        self._faults: list[Fault] = []
        self._tampered: dict[tuple[str, str, str], bytes] = {}
        self._lock, self._closed = threading.RLock(), threading.Event()
        self._listener = Listener(("127.0.0.1", 0), Handler)
        self._listener.hub = self
        self._address = f"127.0.0.1:{self._listener.server_port}"
        self.url = f"http://{self._address}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._closed.set()
        self._listener.shutdown()
        self._listener.server_close()

    def add_repo(
        self,
        kind: str,
        repo_id: str,
        files: Mapping[str, bytes] | Path,
        private: bool = False,
        gated: bool = False,
        readers: Iterable[str] = (),
    ) -> None:
        """Add a `model` or `dataset` repo with these files, or those of a folder, in one commit.

        A private or gated repo can be read by its owner and by the users in `readers`.
        """
        if isinstance(files, Path):
            found = sorted(path for path in files.rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in found}
        repo = Repo(kind, repo_id, private, gated, set(readers))
        repo.commit("initial commit", {path: File.at(path, data) for path, data in files.items()})
        repo.objects |= {file.sha256: file.data for file in repo.commits[0].files.values() if file.lfs}
        self._repos[kind, repo_id] = repo

    def add_token(
        self, token: str, user: str, role: str = "write", orgs: Iterable[str] = (), permissions: Iterable[str] = ()
    ) -> None:
        """Let `token` in as `user`, a member of `orgs`. A fineGrained one writes only with the permission `repo.write`."""
        self._tokens[token] = Token(user, role, tuple(orgs), tuple(permissions))

    def files(self, kind: str, repo_id: str) -> dict[str, bytes]:
        """The files of a repo as they stand, by path. A repo made by a client holds `.gitattributes` too."""
        with self._lock:  # else a repository may be seen half made
            return {path: file.data for path, file in self._repos[kind, repo_id].commits[-1].files.items()}

    def commits(self, kind: str, repo_id: str) -> list[Commit]:
        """The commits of a repo, oldest first, the initial one included; see `Commit.message` and `Commit.paths`."""
        with self._lock:
            return list(self._repos[kind, repo_id].commits)

    def repos(self) -> list[tuple[str, str]]:
        """The (kind, id) of every repo."""
        with self._lock:
            return list(self._repos)

    def tamper(self, kind: str, repo_id: str, path: str, data: bytes) -> None:
        """Store `data` in place of what the next commit brings for `path`, once; the repo may not exist yet."""
        self._tampered[kind, repo_id, path] = data

    def remove_repo(self, kind: str, repo_id: str) -> None:
        """Delete a repo, as its owner may at any time on the site; one that is not there is no error."""
        self._repos.pop((kind, repo_id), None)

    def remove_token(self, token: str) -> None:
        """Revoke a token: every later request with it is refused with 401."""
        self._tokens.pop(token, None)

    def fail_next(
        self,
        method: str,
        pattern: str,
        status: int | None = 500,
        skip: int = 0,
        times: int = 1,
        how: str = "refused",
        headers: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Let the next requests fail whose path has a match for `pattern`; without a status the connection is cut.

        how: `refused`, nothing is done; `after`, it is done and the answer fails; `reset` and `stalled`, half of the content passes (of a
        GET the answer's, else the request's), then the connection is reset, or nothing more comes; `wrong`, a byte of the answer is another.
        The third upload of an LFS file, say: `fail_next("PUT", "/lfs/objects/", skip=2)`.
        """
        self._faults.append(Fault(method, pattern, skip, times, how, status, dict(headers)))

    def meanwhile(self, method: str, pattern: str, happens: Callable[[], None], skip: int = 0) -> None:
        """Call this, `remove_repo` say, once when such a request has come and is not yet answered."""
        self._faults.append(Fault(method, pattern, skip, 1, "meanwhile", happens=happens))

    def forget_faults(self) -> None:
        """Behave again, whatever was planned and has not happened."""
        self._faults.clear()
        self._tampered.clear()

    def env(self, home: Path, token: str | None = None, allow_outside: bool = False) -> dict[str, str]:
        """The environment of a subprocess that takes this server for the Hub and keeps its caches in `home`.

        Nothing of the developer's own Hub settings passes, least of all a token. This server is also the proxy for every other
        address and refuses them; a subprocess that needs, say, a package index gets the usual network with `allow_outside`.
        """
        mine = ("HF_", "HUGGING", "TRANSFORMERS_")
        env = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
        if not allow_outside:
            env = {name: value for name, value in env.items() if not name.lower().endswith("_proxy")}
            env |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), self.url)
        env |= dict.fromkeys(("no_proxy", "NO_PROXY"), "127.0.0.1,localhost")
        env |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        env |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
        return env | ({"HF_TOKEN": token} if token else {})

    def _strike(self, method: str, target: str) -> Fault | None:
        """The fault that befalls a request that has come; it is counted."""
        with self._lock:
            return next((fault for fault in self._faults if fault.strikes(method, urlsplit(target).path)), None)

    def _answer(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes, fault: Fault | None
    ) -> Reply | None:
        """The reply to one request, or None where the connection is to be cut."""
        address = urlsplit(target)
        if method == "CONNECT" or not (address.netloc or self._address).endswith(self._address):
            self.outside.append(target)
            return Refusal(403, f"Outside the test: {target}").reply
        with self._lock:
            self.requests.append((method, address.path))
            how = fault.how if fault else ""
            if how == "refused":
                return fault.reply
            if how == "meanwhile":
                fault.happens()
            try:
                endpoint, groups = find_endpoint(method, address.path)
                reply = endpoint(Call(self, parse_qs(address.query), headers, body, groups))
            except Refusal as refusal:
                return refusal.reply
            return fault.reply if how == "after" else with_wrong_byte(reply) if how == "wrong" else reply

    def _tamper_with(self, repo: Repo, changes: dict[str, File | None]) -> None:
        for path, file in changes.items():
            if file and (repo.kind, repo.id, path) in self._tampered:
                changes[path] = File(self._tampered.pop((repo.kind, repo.id, path)), file.lfs)


# -------------------- what the Hub stores

LFS_SUFFIXES = {".arrow", ".bin", ".gguf", ".gz", ".model", ".npz", ".parquet", ".pt", ".pth", ".safetensors", ".zip"}
LFS_SIZE = 10_000_000
GITATTRIBUTES = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES)).encode()


def belongs_in_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether a file is kept in LFS: by its suffix, its size, or because it is not text."""
    return size > 0 and (PurePosixPath(path).suffix in LFS_SUFFIXES or size > LFS_SIZE or b"\0" in sample)


@dataclass(frozen=True)
class File:
    """The content of one file, with the hashes that the Hub reports for it."""

    data: bytes
    lfs: bool

    @classmethod
    def at(cls, path: str, data: bytes) -> File:
        return cls(data, belongs_in_lfs(path, len(data), data[:512]))

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        return text.encode()

    @cached_property
    def blob_id(self) -> str:
        """The git hash of the file, or of its pointer when the file itself is in LFS."""
        content = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Commit:
    """One commit: its message, the paths that it wrote or deleted, and all files as they stood after it."""

    sha: str
    message: str
    paths: tuple[str, ...]
    files: dict[str, File]
    date: str


@dataclass
class Repo:
    """A model or dataset repo. `objects` are its uploaded LFS files by SHA-256, whether a commit names them yet or not."""

    kind: str
    id: str
    private: bool = False
    gated: bool = False
    readers: set[str] = field(default_factory=set)
    commits: list[Commit] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)

    @property
    def page(self) -> str:
        """Its path on the site: `team/tiny` for a model, `datasets/team/questions` for a dataset."""
        return f"datasets/{self.id}" if self.kind == "dataset" else self.id

    def commit(self, message: str, changes: Mapping[str, File | None]) -> Commit:
        """Add a commit; a path whose change is None is deleted."""
        files = dict(self.commits[-1].files) if self.commits else {}
        for path, file in changes.items():
            if file is None:
                files.pop(path, None)
            else:
                files[path] = file
        tree = "".join(f"{path} {file.blob_id}\n" for path, file in sorted(files.items()))
        sha = hashlib.sha1(f"{self.page} {len(self.commits)} {message}\n{tree}".encode()).hexdigest()
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits.append(Commit(sha, message, tuple(changes), files, date))
        return self.commits[-1]

    def at(self, revision: str) -> Commit | None:
        if revision in ("main", "refs/heads/main"):
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.sha == revision), None)


@dataclass(frozen=True)
class Token:
    """An access token. The role is read, write or fineGrained; only the last one looks at `permissions`."""

    user: str
    role: str
    orgs: tuple[str, ...]
    permissions: tuple[str, ...]

    def owns(self, namespace: str) -> bool:
        return namespace == self.user or namespace in self.orgs

    def may_write(self, namespace: str) -> bool:
        allowed = self.role == "write" or (self.role == "fineGrained" and "repo.write" in self.permissions)
        return self.owns(namespace) and allowed

    def may_read(self, repo: Repo) -> bool:
        return self.owns(repo.id.split("/")[0]) or self.user in repo.readers


# -------------------- requests, replies


@dataclass
class Reply:
    status: int
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


class Refusal(Exception):
    """An error reply. The clients choose the exception that they raise by the status and `code` (X-Error-Code)."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str):
        super().__init__(message)
        self.reply = reply_json({"error": message}, status)
        self.reply.headers["X-Error-Message"] = message
        if code:
            self.reply.headers["X-Error-Code"] = code
        self.reply.headers.update({name.replace("_", "-"): value for name, value in headers.items()})


def reply_json(content: object, status: int = 200) -> Reply:
    return Reply(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


@dataclass
class Call:
    """One request, with what the endpoints ask about it: who is calling, which repo, which revision."""

    hub: HubServer
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    groups: dict[str, str] = field(default_factory=dict)

    def json(self) -> dict:
        return json.loads(self.body)

    def token(self) -> Token | None:
        """The caller's token, None without one; a wrong one is refused everywhere, as the real Hub does."""
        header = self.headers.get("Authorization")
        if not header:
            return None
        token = self.hub._tokens.get(header.removeprefix("Bearer "))
        if token is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token

    @property
    def repo_key(self) -> tuple[str, str]:
        return "dataset" if self.groups["kind"].startswith("dataset") else "model", self.groups["id"]

    def repo(self) -> Repo:
        """The repo named in the address, if it exists and the caller may know of it."""
        token, repo = self.token(), self.hub._repos.get(self.repo_key)
        if repo and (not repo.private or (token and token.may_read(repo))):
            return repo
        if token:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        # The real Hub sends no code here: its clients turn a 401 from an https address into RepositoryNotFoundError.
        raise Refusal(401, "Invalid username or password.", "RepoNotFound")

    def readable_repo(self) -> Repo:
        """The same for reading files, which a gated repo allows to those let in."""
        repo, token = self.repo(), self.token()
        if not repo.gated or (token and token.may_read(repo)):
            return repo
        message = f"Access to {repo.kind} {repo.id} is restricted and you are not in the authorized list."
        raise Refusal(403 if token else 401, message, "GatedRepo")

    def writable_repo(self) -> Repo:
        repo, token = self.repo(), self.token()
        if token is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if not token.may_write(repo.id.split("/")[0]):
            raise Refusal(403, f"You don't have write access to {repo.kind} {repo.id}")
        return repo

    def revision(self, repo: Repo) -> Commit:
        revision = self.groups.get("revision") or "main"
        commit = repo.at(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit


def is_true(fields: dict[str, list[str]], name: str) -> bool:
    return fields.get(name, [""])[0].lower() in ("true", "1")


ROUTES: list[tuple[str, re.Pattern, Callable[[Call], Reply]]] = []
API = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
PAGE = r"/(?P<kind>(?:datasets/)?)(?P<id>[^/]+/[^/]+?)"
REVISION = r"/(?P<revision>[^/]+)"


def route(method: str, pattern: str) -> Callable:
    """Serve the requests whose whole path matches `pattern` with the decorated function."""

    def register(endpoint: Callable[[Call], Reply]) -> Callable[[Call], Reply]:
        ROUTES.append((method, re.compile(pattern), endpoint))
        return endpoint

    return register


def find_endpoint(method: str, path: str) -> tuple[Callable[[Call], Reply], dict[str, str]]:
    for route_method, pattern, endpoint in ROUTES:
        match = pattern.fullmatch(path)
        if match and route_method == ("GET" if method == "HEAD" else method):
            return endpoint, {name: unquote(value or "") for name, value in match.groupdict().items()}
    raise Refusal(404, f"Not played by this server: {method} {path}")


# -------------------- tokens, rights


@route("GET", "/api/whoami-v2")
def whoami(call: Call) -> Reply:
    """`HfApi.whoami`: the user behind a token and what the token allows."""
    token = call.token()
    if token is None:
        raise Refusal(401, "Invalid username or password.")
    access = {"displayName": "test", "role": token.role}
    if token.role == "fineGrained":
        owners = [("user", token.user)] + [("org", org) for org in token.orgs]
        scoped = [{"entity": {"type": t, "name": n}, "permissions": list(token.permissions)} for t, n in owners]
        access["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": scoped}
    orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in token.orgs]
    auth = {"type": "access_token", "accessToken": access}
    return reply_json({"type": "user", "name": token.user, "fullname": token.user, "orgs": orgs, "auth": auth})


@route("GET", API + "/auth-check")
def check_read(call: Call) -> Reply:
    """`HfApi.auth_check`."""
    call.readable_repo()
    return reply_json({})


@route("GET", API + "/auth-check/write")
def check_write(call: Call) -> Reply:
    """`HfApi.auth_check(write=True)`."""
    call.writable_repo()
    return reply_json({})


# -------------------- reading back


def describe_file(file: File, sha_name: str) -> dict:
    """The size and, for an LFS file, its `lfs` record, in which two endpoints name the SHA-256 differently."""
    info: dict = {"size": len(file.data)}
    if file.lfs:
        info["lfs"] = {sha_name: file.sha256, "size": len(file.data), "pointerSize": len(file.pointer)}
    return info


@route("GET", API + rf"(?:/revision{REVISION})?")
def repo_info(call: Call) -> Reply:
    """`HfApi.model_info`, `dataset_info`, `repo_info`, `repo_exists`; with `?blobs=true` hashes too."""
    repo = call.repo()
    commit = call.revision(repo)
    siblings = []
    for path, file in sorted(commit.files.items()):
        blob = {"blobId": file.blob_id, **describe_file(file, "sha256")} if is_true(call.query, "blobs") else {}
        siblings.append({"rfilename": path, **blob})
    info = {"id": repo.id, "author": repo.id.split("/")[0], "sha": commit.sha, "siblings": siblings, "tags": []}
    info |= {"private": repo.private, "gated": "manual" if repo.gated else False, "disabled": False}
    info |= {"createdAt": repo.commits[0].date, "lastModified": commit.date, "downloads": 0, "likes": 0}
    return reply_json(info)


@route("GET", API + "/commits" + REVISION)
def list_commits(call: Call) -> Reply:
    """`HfApi.list_repo_commits`, newest first."""
    repo = call.repo()
    history = repo.commits[: repo.commits.index(call.revision(repo)) + 1]
    common = {"message": "", "authors": []}
    return reply_json([{"id": c.sha, "title": c.message, "date": c.date, **common} for c in reversed(history)])


def list_entries(repo: Repo, commit: Commit, expand: bool) -> dict[str, dict]:
    """All files and folders of a commit, as `tree` and `paths-info` report them; `expand` adds who wrote them last."""
    entries: dict[str, dict] = {}
    for path, file in commit.files.items():
        for folder in map(str, PurePosixPath(path).parents[:-1]):
            tree_id = hashlib.sha1(f"{commit.sha} {folder}".encode()).hexdigest()
            entries[folder] = {"type": "directory", "path": folder, "oid": tree_id, "size": 0}
        entries[path] = {"type": "file", "path": path, "oid": file.blob_id, **describe_file(file, "oid")}
    if expand:
        for path, entry in entries.items():
            entry["lastCommit"] = last_commit(repo.commits[: repo.commits.index(commit) + 1], path)
    return dict(sorted(entries.items()))


def last_commit(history: list[Commit], path: str) -> dict[str, str]:
    """The last commit that touched a file, or anything in a folder."""
    touched = [c for c in history if any(p == path or p.startswith(f"{path}/") for p in c.paths)]
    return {"id": touched[-1].sha, "title": touched[-1].message, "date": touched[-1].date}


@route("GET", API + "/tree" + REVISION + "(?:/(?P<folder>.+))?")
def list_tree(call: Call) -> Reply:
    """`HfApi.list_repo_tree`, `list_repo_files`, `snapshot_download`, and `HfFileSystem` for datasets' file patterns."""
    repo = call.repo()
    commit = call.revision(repo)
    folder = PurePosixPath(call.groups["folder"])
    recursive, expand = is_true(call.query, "recursive"), is_true(call.query, "expand")
    entries = []
    for path, entry in list_entries(repo, commit, expand).items():
        parents = PurePosixPath(path).parents
        if folder in parents if recursive else folder == parents[0]:
            entries.append(entry)
    if call.groups["folder"] and not entries:
        raise Refusal(404, f"{folder} does not exist on {call.groups['revision']}", "EntryNotFound")
    return reply_json(entries)


@route("POST", API + "/paths-info" + REVISION)
def paths_info(call: Call) -> Reply:
    """`HfApi.get_paths_info`: of the paths asked for (as a form), those that exist."""
    repo = call.repo()
    form = parse_qs(call.body.decode())
    entries = list_entries(repo, call.revision(repo), is_true(form, "expand"))
    return reply_json([entries[path] for path in form["paths"] if path in entries])


@route("GET", PAGE + "/resolve" + REVISION + "/(?P<path>.+)")
def resolve_file(call: Call) -> Reply:
    """GET and HEAD of one file: `hf_hub_download`, `from_pretrained`, `load_dataset`, `HfFileSystem`. Honours Range."""
    repo = call.readable_repo()
    commit = call.revision(repo)
    file = commit.files.get(call.groups["path"])
    if file is None:
        raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.sha)
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(len(file.data))}
    return reply_range(file.data, call.headers.get("Range"), headers)


def reply_range(data: bytes, wanted: str | None, headers: dict[str, str]) -> Reply:
    """The whole of `data`, or the part that a header like `bytes=0-99`, `bytes=100-` or `bytes=-10` wants."""
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted or "")
    if not match or match.groups() == ("", ""):
        return Reply(200, data, headers)
    first, last = match.groups()
    start = int(first) if first else max(len(data) - int(last), 0)
    stop = min(int(last) + 1, len(data)) if first and last else len(data)
    if start >= stop:
        return Reply(416, b"", {"Content-Range": f"bytes */{len(data)}"})
    return Reply(206, data[start:stop], {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})


# -------------------- uploading


@route("POST", "/api/repos/create")
def create_repo(call: Call) -> Reply:
    """`HfApi.create_repo`. As on the real Hub the new repo holds a first commit with `.gitattributes`."""
    token, wanted = call.token(), call.json()
    if token is None:
        raise Refusal(401, "Invalid username or password.")
    kind, namespace = wanted.get("type") or "model", wanted.get("organization") or token.user
    repo_id = f"{namespace}/{wanted['name']}"
    if not token.may_write(namespace):
        raise Refusal(403, f'You don\'t have the rights to create a {kind} under the namespace "{namespace}"')
    repo = call.hub._repos.get((kind, repo_id))
    if repo:
        message = f"You already created this {kind} repo"
        return reply_json({"error": message, "url": f"{call.hub.url}/{repo.page}"}, 409)
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    repo = call.hub._repos[kind, repo_id] = Repo(kind, repo_id, private)
    repo.commit("initial commit", {".gitattributes": File.at(".gitattributes", GITATTRIBUTES)})
    return reply_json({"url": f"{call.hub.url}/{repo.page}", "name": repo_id})


@route("DELETE", "/api/repos/delete")
def delete_repo(call: Call) -> Reply:
    """`HfApi.delete_repo`."""
    wanted = call.json()
    owner = wanted.get("organization") or (call.token() or Token("", "read", (), ())).user
    call.groups |= {"kind": wanted.get("type") or "model", "id": f"{owner}/{wanted['name']}"}
    repo = call.writable_repo()
    del call.hub._repos[repo.kind, repo.id]
    return reply_json({})


@route("PUT", API + "/settings")
def change_settings(call: Call) -> Reply:
    """`HfApi.update_repo_settings`: the visibility and whether it is gated."""
    repo, wanted = call.writable_repo(), call.json()
    if "visibility" in wanted or "private" in wanted:
        repo.private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    if "gated" in wanted:
        repo.gated = bool(wanted["gated"])
    return reply_json({"private": repo.private, "gated": repo.gated})


@route("POST", API + "/super-squash" + REVISION)
def squash_commits(call: Call) -> Reply:
    """`HfApi.super_squash_history`: one commit in place of all, with the same files; LFS files that it does not name are gone."""
    repo = call.writable_repo()
    head = call.revision(repo)
    repo.commits.clear()
    repo.commit(call.json()["message"], head.files)
    repo.objects = {file.sha256: file.data for file in head.files.values() if file.lfs}
    return reply_json({})


@route("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Reply:
    """Asked about README.md before a commit. Every front matter is taken for valid."""
    return reply_json({"errors": [], "warnings": []})


@route("POST", API + "/preupload" + REVISION)
def preupload(call: Call) -> Reply:
    """First step of every commit: which files go through LFS, and the hashes of those that are there already."""
    repo = call.writable_repo()
    present = call.revision(repo).files
    answers = []
    for file in call.json()["files"]:
        path, sample = file["path"], base64.b64decode(file["sample"])
        mode = "lfs" if belongs_in_lfs(path, file["size"], sample) else "regular"
        oid = {"oid": present[path].etag} if path in present else {}
        answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **oid})
    return reply_json({"files": answers})


@route("POST", PAGE + r"\.git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> Reply:
    """Second step, LFS files only: where to PUT each; one that the repo has already needs no upload."""
    repo = call.writable_repo()
    base = f"{call.hub.url}/{repo.page}.git/info/lfs"
    answers = []
    for wanted in call.json()["objects"]:
        answer = {"oid": wanted["oid"], "size": wanted["size"]}
        if wanted["oid"] not in repo.objects:
            upload, verify = {"href": f"{base}/objects/{wanted['oid']}"}, {"href": f"{base}/verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        answers.append(answer)
    return reply_json({"transfer": "basic", "objects": answers})


@route("PUT", PAGE + r"\.git/info/lfs/objects/(?P<oid>[0-9a-f]{64})")
def lfs_put(call: Call) -> Reply:
    """Third step: the file itself. The clients send no token here (the real address is a signed one)."""
    if hashlib.sha256(call.body).hexdigest() != call.groups["oid"]:
        raise Refusal(400, "The content does not have the SHA-256 that was announced")
    call.hub._repos[call.repo_key].objects[call.groups["oid"]] = call.body
    return Reply(200)


@route("POST", PAGE + r"\.git/info/lfs/verify")
def lfs_verify(call: Call) -> Reply:
    """Fourth step: whether the file arrived whole."""
    wanted = call.json()
    data = call.writable_repo().objects.get(wanted["oid"])
    if data is None or len(data) != wanted["size"]:
        raise Refusal(422, f"LFS object {wanted['oid']} did not arrive whole")
    return reply_json({})


@route("POST", API + "/commit" + REVISION)
def commit_changes(call: Call) -> Reply:
    """Last step of `HfApi.upload_folder`, `upload_file`, `create_commit`, `delete_file`: lines of JSON, header first."""
    repo = call.writable_repo()
    if "create_pr" in call.query or call.groups["revision"] != "main":
        raise Refusal(400, "Only commits to main are played by this server")
    header, *operations = [json.loads(line) for line in call.body.splitlines()]
    if header["value"].get("parentCommit", repo.commits[-1].sha) != repo.commits[-1].sha:
        raise Refusal(412, "A commit has happened since. Please refresh and try again.")
    changes: dict[str, File | None] = {}
    for operation in operations:
        changes |= read_operation(repo, operation["key"], operation["value"])
    call.hub._tamper_with(repo, changes)
    commit = repo.commit(header["value"]["summary"], changes)
    url = f"{call.hub.url}/{repo.page}/commit/{commit.sha}"
    return reply_json({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})


def read_operation(repo: Repo, key: str, value: dict) -> dict[str, File | None]:
    """What one line of a commit changes."""
    path = value["path"]
    if key == "file":
        return {path: File(base64.b64decode(value["content"]), lfs=False)}
    if key == "lfsFile":
        if value["oid"] not in repo.objects:
            raise Refusal(400, f"LFS object {value['oid']} of {path} was never uploaded")
        return {path: File(repo.objects[value["oid"]], lfs=True)}
    if key == "deletedFile":
        return {path: None}
    if key == "deletedFolder":
        return {name: None for name in repo.commits[-1].files if name.startswith(path.rstrip("/") + "/")}
    raise Refusal(400, f"Operation {key} is not played by this server")


# -------------------- the server


@dataclass
class Fault:
    """A planned fault: of the requests that match, `skip` pass, then `times` meet it."""

    method: str
    pattern: str
    skip: int
    times: int
    how: str
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    happens: Callable[[], None] = lambda: None

    @property
    def reply(self) -> Reply | None:
        """An error of the Hub is JSON, one of the gateway before it a page."""
        if not self.status:
            return None
        page = self.status > 500 or self.status == 429
        made = Reply(self.status, b"<html>Sorry</html>", {"Content-Type": "text/html"}) if page else reply_json({"error": "Sorry"}, self.status)  # fmt: skip
        made.headers |= self.headers
        return made

    def strikes(self, method: str, path: str) -> bool:
        if self.times == 0 or method != self.method or not re.search(self.pattern, path):
            return False
        if self.skip:
            self.skip -= 1
            return False
        self.times -= 1
        return True


def with_wrong_byte(reply: Reply) -> Reply:
    """The same length, and another byte in the middle."""
    middle = len(reply.body) // 2
    body = reply.body[:middle] + bytes([reply.body[middle] ^ 1]) + reply.body[middle + 1 :]
    return Reply(reply.status, body, reply.headers)


class Handler(BaseHTTPRequestHandler):
    """The HTTP side: reads one request whole, has the hub answer it, writes the reply."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    server: Listener

    def answer(self) -> None:
        hub = self.server.hub
        fault = hub._strike(self.command, self.path)
        how = fault.how if fault else ""
        if how in ("reset", "stalled") and self.command != "GET":
            hub.requests.append((self.command, urlsplit(self.path).path))
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            return self.leave(how)
        reply = hub._answer(self.command, self.path, self.headers, self._read_body(), fault)
        if reply is None:
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in {**reply.headers, "Content-Length": str(len(reply.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if how in ("reset", "stalled"):
            self.wfile.write(reply.body[: len(reply.body) // 2])
            self.wfile.flush()
            return self.leave(how)
        if self.command != "HEAD":
            self.wfile.write(reply.body)

    def leave(self, how: str) -> None:
        """Say no more: reset the connection, or keep it without a word until the server ends."""
        self.close_connection = True
        if how == "stalled":
            self.server.hub._closed.wait()
        elif how == "reset":  # closed with nothing lingering, TCP sends a RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            os.close(self.connection.detach())

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_CONNECT = answer

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, format: str, *args: object) -> None:
        """Silent; `HubServer.requests` is the log."""


class Listener(ThreadingHTTPServer):
    hub: HubServer

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
