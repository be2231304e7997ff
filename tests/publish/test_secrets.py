"""What is published holds no secret: every file is searched before anything is sent."""

import random
import string
import struct
from pathlib import Path

import pytest
from support.tiny_models import PRE_TOKENIZERS, vocabulary

from autosloth.errors import HubError
from autosloth.publish.secrets import WINDOW, refuse_secrets, secrets_in

LETTERS = string.ascii_letters + string.digits


def drawn(length: int, of: str = LETTERS, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(of, k=length))


KEYS = {
    "a Hugging Face token": "hf_" + drawn(34, string.ascii_letters),
    "an OpenAI or Anthropic key": "sk-proj-" + drawn(60, LETTERS + "_-") + drawn(20) + "7",
    "a Stripe key": "sk_live_" + drawn(24),
    "an AWS key": "AKIA" + drawn(16, string.ascii_uppercase + "234567"),
    "a GitHub token": "ghp_" + drawn(36),
    "a GitLab token": "glpat-" + drawn(20),
    "a Slack token": "xoxb-123456789012-" + drawn(24),
    "a Google key": "AIza" + drawn(35, LETTERS + "_-"),
    "a Groq key": "gsk_" + drawn(52),
    "an npm token": "npm_" + drawn(36),
    "a PyPI token": "pypi-AgEIcHlwaS5vcmc" + drawn(120, LETTERS + "_-"),
    "a SendGrid key": f"SG.{drawn(22)}.{drawn(43, seed=1)}",
    "a Replicate token": "r8_" + drawn(37),
    "an NVIDIA key": "nvapi-" + drawn(64),
    "an xAI key": "xai-" + drawn(80),
    "a Google client's secret": "GOCSPX-" + drawn(28),
    "a DigitalOcean token": "dop_v1_" + drawn(64, "0123456789abcdef"),
    "a private key": "-----BEGIN RSA PRIVATE KEY-----\n" + drawn(64) + "\n",
}
OTHERS = {
    "DeepSeek's": "sk-" + drawn(32, "0123456789abcdef"),
    "OpenAI's older": "sk-" + drawn(48),
    "Anthropic's": "sk-ant-api03-" + drawn(93, LETTERS + "_-") + "AA",
    "GitHub's fine-grained": "github_pat_" + drawn(22) + "_" + drawn(59),
    "AWS's for a session": "ASIA" + drawn(16, string.ascii_uppercase + "234567"),
    "Slack's of a user": "xoxp-1234567890-" + drawn(20),
}
HARMLESS = [
    "sk-learn-contrib-2024-some-long-name-abcdefghijklmnopqrstuvw",
    "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",
    "ghs_abcdefghijklmnopqrstuvwxyzabcdefghij0",
    "sk-learn-tutorial-for-beginners-2024-edition",
    "task-1234567890abcdefghij1234567890",
    "hf_hub_download(repo_id, filename)",
    "hf_" + "x" * 34,
    "AKIAIOSFODNN7EXAMPLE",
    "ghp_" + "0" * 36,
    "-----BEGIN PRIVATE KEY-----\n...\n-----END PRIVATE KEY-----",
    "-----BEGIN CERTIFICATE-----\n" + drawn(64),
    "https://example.com/risk-" + drawn(30),
    drawn(500),
]
CARD = """---
license: mit
---
# A model

    question  What is it?
    expected  Nothing.
    before    Who knows?
    after     Who
              knows?

    question  Which key?
    expected  That one.
    before    None
    after     The key is
              {}, I think.
"""


def found(folder: Path, text: str | bytes) -> list[str]:
    (folder / "file").write_bytes(text if isinstance(text, bytes) else text.encode())
    return [secret.kind for secret in secrets_in(folder / "file")]


@pytest.mark.parametrize(
    "around",
    ["{}", "the key is `{}`, look", '{{"text": "say\\n{}\\n"}}', "KEY={}\n", "q=%3D{}", "\\u003d{}", "\x1b[0m{}"],
)
@pytest.mark.parametrize("kind", KEYS)
def test_a_key_is_found_and_named(tmp_path, kind, around):
    assert found(tmp_path, around.format(KEYS[kind])) == [kind]


@pytest.mark.parametrize("key", OTHERS.values(), ids=OTHERS)
def test_other_forms_of_a_key_are_found(tmp_path, key):
    assert len(found(tmp_path, f"it is {key}.")) == 1


@pytest.mark.parametrize("text", HARMLESS, ids=range(len(HARMLESS)))
def test_what_is_no_key_is_not_found(tmp_path, text):
    assert found(tmp_path, text) == []


def test_an_empty_file_holds_no_secret(tmp_path):
    assert found(tmp_path, b"") == []


@pytest.mark.parametrize("at", [0, WINDOW - 10, WINDOW, WINDOW + 5])
def test_a_key_in_weights_is_found_once_wherever_it_lies(tmp_path, at):
    weights = bytearray(WINDOW + 5000)
    key = KEYS["a GitHub token"].encode()
    weights[at : at + len(key)] = key
    assert found(tmp_path, bytes(weights)) == ["a GitHub token"]


def test_random_bytes_hold_no_secret(tmp_path):
    assert found(tmp_path, random.Random(1).randbytes(20_000_000)) == []


def test_a_secret_in_use_is_found_whatever_it_looks_like(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_plain")
    monkeypatch.setenv("MY_SERVICE_SECRET", "correct horse battery")
    monkeypatch.setenv("SIGNING_KEY", "/home/someone/key.pem")
    assert found(tmp_path, "a correct horse battery; hf_plain, /home/someone/key.pem") == [
        "the secret in use as MY_SERVICE_SECRET"
    ]


def test_the_token_in_use_is_named_once(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", KEYS["a Hugging Face token"])
    assert found(tmp_path, KEYS["a Hugging Face token"]) == ["the secret in use as HF_TOKEN"]


def test_a_sample_of_the_card_is_named_by_its_place_and_not_repeated(tmp_path):
    key = KEYS["an OpenAI or Anthropic key"]
    (tmp_path / "README.md").write_text(CARD.format(key))
    with pytest.raises(HubError) as error:
        refuse_secrets(tmp_path)
    assert "README.md holds what looks like an OpenAI or Anthropic key (`sk-...`)" in error.value.what
    assert "line 16, column 15, in `after` of sample 2; nothing was uploaded" in error.value.what
    assert key[3:12] not in str(error.value)


def test_further_places_are_counted(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(KEYS["a GitHub token"])
    with pytest.raises(HubError, match=r"a\.txt .* line 1, column 1, and 1 other place; nothing"):
        refuse_secrets(tmp_path)


def test_in_weights_the_byte_is_named(tmp_path):
    header = b'{"__metadata__":{"note":"' + KEYS["an AWS key"].encode() + b'"}}'
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(HubError, match=r"model\.safetensors holds what looks like an AWS key .* byte 33; nothing"):
        refuse_secrets(tmp_path)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_real_vocabulary_holds_no_secret(name):
    read = vocabulary(name)
    assert secrets_in(read) == secrets_in(read.with_name(f"ggml-vocab-{name}.gguf")) == []


def test_a_real_sentencepiece_vocabulary_holds_no_secret(real_data):
    assert secrets_in(real_data("llama2-tokenizer.model")) == []
