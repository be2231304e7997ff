"""A finished run without a training, and the commands that publish it to a Hub on loopback."""

import json
import os
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy
from safetensors.numpy import save_file

from autosloth.run import Run, stage, write_json
from autosloth.settings import SFTSettings

from .commands import called_here, sets
from .hub_server import HubServer
from .locks import released

NAME, GGUF, REPO = "sloth", "sloth-Q8_0.gguf", "team/sloth"
GGUF_BYTES = b"GGUF" + bytes(range(256)) * 16
# The text behind hf_ stands nowhere else, so that a leak is found wherever it is.
TOKENS = {kind: f"hf_{kind}{'Zq7x' * 8}" for kind in ("write", "read", "wrong", "stranger", "scoped", "blind")}
EVALUATION = {
    "loss": 1.5,
    "perplexity": 4.482,
    "exact_match": 0.5,
    "answers_compared": 2,
    "answers_cut": 0,
    "samples": [{"question": "What does Mila eat?", "expected": "Figs.", "answer": "Plums."}],
}
FACTS = {
    "data": {
        **{"read": 40, "kept": 40, "dropped": {}, "changed": {}, "revision": None, "train_rows": 38, "eval_rows": 2},
        **{"truncated": 0, "train_tokens": 1600, "learnt_tokens": 300},
    },
    "train": {
        **{"steps": 3, "epochs": 0.3, "seconds": 5.0, "first_loss": 4.5, "last_loss": 4.4, "tokens": 480},
        **{"tokens_per_second": 96.0, "peak_vram_gb": None, "peak_ram_gb": 0.6, "trainable_parameters": 4096},
        **{"precision": "float32", "lora_r": 16, "lora_alpha": 16, "four_bit": False, "optimizer": "adamw_torch_fused"},
    },
    "eval": {"before": EVALUATION, "after": EVALUATION},
    "hardware": {"gpu": None, "vram_gb": None, "cpu": "x86_64", "cores": 2, "ram_gb": 8.0},
    "versions": {"python": "3.11"},
    "export": {
        "gguf": [{"path": f"gguf/{GGUF}", "type": "Q8_0", "bytes": 4096, "seconds": 1.0, "peak_ram_gb": 0.5}],
    },
    "verify": {
        **{"file": GGUF, "texts": 4, "token_mismatches": 0, "mean_kl": 4e-4, "top1": 1.0, "positions": 80},
        **{"bos": 1, "bos_trained": 1, "eos": None, "limits": {"mean_kl": 0.01, "top1": 0.95}},
        **{"failures": [], "passed": True, "seconds": 0.3},
    },
}


def make_hub() -> HubServer:
    hub = HubServer()
    add_tokens(hub)
    return hub


def add_tokens(hub: HubServer) -> None:
    hub.add_token(TOKENS["write"], user="team")
    hub.add_token(TOKENS["read"], user="team", role="read")
    hub.add_token(TOKENS["stranger"], user="eve")
    hub.add_token(TOKENS["scoped"], user="ana", orgs=["team"], role="fineGrained", permissions=["repo.write"])
    hub.add_token(TOKENS["blind"], user="ben", orgs=["team"], role="fineGrained", permissions=["repo.content.read"])


def make_run(storage: Path, verified: bool = True, **settings) -> Run:
    """A finished run as the stages leave it, with weights of a few KB."""
    settings = {"model": "team/base", "dataset": "team/questions", "one_repo": True, **settings}
    run = Run.create(SFTSettings(run_name=NAME, storage=str(storage), **settings))
    write_json(run.path("facts.json"), {**FACTS, "verify": {**FACTS["verify"], "passed": verified}})
    for folder in ("adapter", "gguf"):
        run.path(folder).mkdir()
    write_json(
        run.path("adapter", "adapter_config.json"), {"base_model_name_or_path": "team/base", "peft_type": "LORA"}
    )
    write_json(run.path("adapter", "tokenizer_config.json"), {"eos_token": "</s>"})
    save_file({"lora_A.weight": numpy.ones((16, 64), "float32")}, run.path("adapter", "adapter_model.safetensors"))
    run.path("gguf", GGUF).write_bytes(GGUF_BYTES)
    run.path("gguf", "Modelfile").write_text(f"FROM ./{GGUF}\n")
    for name in ("data", "train", "merge", "gguf", "verify"):
        stage(name)(lambda run: None)(run)  # only its mark
    return released(run)


def environment(hub: HubServer, home: Path, token: str | None = None) -> dict[str, str]:
    given = {**hub.env(home / "huggingface", TOKENS.get(token)), "TMPDIR": str(home)}
    mine = [name for name in os.environ if name.startswith("AUTOSLOTH_") and name != "AUTOSLOTH_CACHE"]
    return {name: value for name, value in given.items() if name not in mine}


def autosloth(hub: HubServer, home: Path, *arguments, token: str | None = "write") -> subprocess.CompletedProcess:
    """One command as a user gives it, in the process that a Hub has as its `pool` (`quick_process`), where nobody sleeps between tries."""
    secret = {"HF_TOKEN": TOKENS[token]} if token else {}
    return hub.pool.submit(called_here, list(map(str, arguments)), secret).result()


def autosloth_apart(hub: HubServer, home: Path, *arguments, token: str | None = "write", **more):
    """The same in a process of its own; what it writes beside the run folder goes to `home`."""
    home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "autosloth", *map(str, arguments)]
    given = {**environment(hub, home, token), **more}
    return subprocess.run(command, env=given, cwd=home, capture_output=True, text=True)


def check(hub: HubServer, home: Path, token: str | None, **settings) -> subprocess.CompletedProcess:
    """`autosloth check sft` of the embedded demo, to be published."""
    every = {"model": "demo", "dataset": "demo", "run_name": NAME, "publish_to_hub": True, "storage": home, **settings}
    return autosloth(hub, home, "check", "sft", *sets(**every), token=token)


def assert_named_problem(result: subprocess.CompletedProcess, *words: str) -> None:
    """Exit code 1, one sentence that says what (with these words), one that says what to do, and no traceback."""
    assert result.returncode == 1, result.stdout
    said = result.stderr.partition("autosloth: ")[2]
    what, todo = said.split("\n\n")[0].splitlines()  # a progress bar may be closed after it
    assert what.endswith(".") and todo.startswith("  ") and todo.endswith(".")
    assert all(word in what for word in words), what
    assert "Traceback" not in result.stderr + result.stdout
    assert "unexpected" not in what


def publish_whole(hub: HubServer, run: Run, home: Path, **options) -> None:
    result = autosloth(hub, home, "publish", run.folder, **options)
    assert result.returncode == 0, result.stderr
    assert arrived(hub) == files_of(run.path("publish"))


def arrived(hub: HubServer, repo: str = REPO) -> dict[str, bytes]:
    """What a repo on the Hub holds, without the file that the Hub itself put there."""
    return {path: data for path, data in hub.files("model", repo).items() if path != ".gitattributes"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def lfs_uploads(hub: HubServer) -> int:
    return sum(method == "PUT" for method, _ in hub.requests)


def is_private(hub: HubServer, repo: str) -> bool:
    """What the Hub itself says to the owner about a repo."""
    headers = {"Authorization": f"Bearer {TOKENS['write']}"}
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(urllib.request.Request(f"{hub.url}/api/models/{repo}", headers=headers)) as reply:
        return json.load(reply)["private"]
