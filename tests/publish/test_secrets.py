"""What is published holds no secret: every file is searched before anything is sent."""

import base64
import random
import string
import struct
import time
from pathlib import Path

import pytest
from support.tiny_models import PRE_TOKENIZERS, vocabulary

from autosloth.errors import HubError
from autosloth.publish.secrets import ADDRESS, ASSIGNED, AWS_SECRET, LONGEST, WINDOW, refuse_secrets, secrets_in

LETTERS = string.ascii_letters + string.digits
BASE64, HEX = LETTERS + "+/", "0123456789abcdef"


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
    "an OpenRouter key": "sk-or-v1-" + drawn(64, "0123456789abcdef"),
    "an Azure key": f"AccountKey={drawn(86, BASE64)}==",
    "a Databricks token": "dapi" + drawn(32, "0123456789abcdef"),
    "a Docker token": "dckr_pat_" + drawn(27),
    "a Perplexity key": "pplx-" + drawn(48),
    "a Pinecone key": f"pcsk_{drawn(6)}_{drawn(63, seed=1)}",
    "a Shopify token": "shpat_" + drawn(32, "0123456789abcdef"),
    "a Telegram bot's token": "7104659823:AAH" + drawn(32, LETTERS + "_-"),
    "a JSON Web Token": f"eyJ{drawn(33)}.eyJ{drawn(90, seed=1)}.{drawn(43, LETTERS + '_-', seed=2)}",
    "a private key": f"-----BEGIN RSA PRIVATE KEY-----\n{drawn(64)}\n{drawn(64, seed=1)}\n",
    "the address of a Slack or Discord webhook": f"hooks.slack.com/services/T0A1B2C3D/B0A1B2C3D/{drawn(24)}",
    "a LangSmith key": f"lsv2_pt_{drawn(32, HEX)}_{drawn(10, HEX)}",
    "a Together key": "tgp_v1_" + drawn(43),
    "a Tavily key": "tvly-dev-" + drawn(32),
    "a Notion token": "ntn_" + drawn(46),
    "a Vault token": "hvs." + drawn(90),
    "a Supabase token": "sbp_" + drawn(40, HEX),
    "a Grafana token": f"glsa_{drawn(32)}_{drawn(8, HEX)}",
    "a Linear key": "lin_api_" + drawn(40),
    "a Jina key": f"jina_{drawn(32, HEX)}{drawn(28)}",
    "a Kaggle key": "KGAT_" + drawn(32, HEX),
    "a Weights & Biases key": "wandb_v1_" + drawn(77),
    AWS_SECRET: f'"SecretAccessKey": "{drawn(40, BASE64)}"',
    ASSIGNED: "WANDB_API_KEY=" + drawn(40, HEX),
    ADDRESS: "postgres://mila:5ummer-Rain24@db.company.com:5432/rows",
}
OTHERS = {
    "DeepSeek's": "sk-" + drawn(32, "0123456789abcdef"),
    "OpenAI's older": "sk-" + drawn(48),
    "Anthropic's": "sk-ant-api03-" + drawn(93, LETTERS + "_-") + "AA",
    "GitHub's fine-grained": "github_pat_" + drawn(22) + "_" + drawn(59),
    "AWS's for a session": "ASIA" + drawn(16, string.ascii_uppercase + "234567"),
    "Slack's of a user": "xoxp-1234567890-" + drawn(20),
    "Slack's of an app": "xapp-1-A0123456789-1234567890123-" + drawn(64, "0123456789abcdef"),
    "GitLab's for a pipeline": "glptt-" + drawn(40),
    "AWS's secret one": f'aws_secret_access_key = "{drawn(40, BASE64)}"',
    "AWS's secret one in JSON": f'{{"AWS_SECRET_ACCESS_KEY": "{drawn(40, BASE64)}"}}',
    "Azure's for messages": f"SharedAccessKey={drawn(43, BASE64)}=",
    "Telegram's in an address": f"https://api.telegram.org/bot7104659823:AAH{drawn(32)}/getMe",
    "an encrypted private key": f"-----BEGIN ENCRYPTED PRIVATE KEY-----\n{drawn(64, BASE64)}",
    "an older encrypted one": f"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,{drawn(32, 'ABCDEF0123456789')}\n\n{drawn(64, BASE64)}",
    "the same in JSON": f"-----BEGIN RSA PRIVATE KEY-----\\nProc-Type: 4,ENCRYPTED\\nDEK-Info: AES-128-CBC,{drawn(32, 'ABCDEF0123456789')}\\n\\n{drawn(64, BASE64)}",
    "PGP's": f"-----BEGIN PGP PRIVATE KEY BLOCK-----\nVersion: GnuPG v2\n\n{drawn(64, BASE64)}",
    "SSH's": f"---- BEGIN SSH2 ENCRYPTED PRIVATE KEY ----\nComment: mila\n{drawn(64, BASE64)}",
    "AWS's secret one in JavaScript": f"mySecretAccessKey: '{drawn(40, BASE64)}'",
    "AWS's of a session": f"aws_session_token = {drawn(300, BASE64)}",
    "Google's of an hour": "ya29." + drawn(180, LETTERS + "_-"),
    "Discord's webhook": f"https://discord.com/api/webhooks/{drawn(18, '0123456789')}/{drawn(68)}",
    "kaggle.json": f'{{"username":"mila","key":"{drawn(32, HEX)}"}}',
    "kaggle.json in JSON": f'{{\\"username\\": \\"mila\\", \\"key\\": \\"{drawn(32, HEX)}\\"}}',
    "Mistral's": f'"MISTRAL_API_KEY": "{drawn(32)}"',
    "Cohere's": f"export COHERE_API_KEY='{drawn(40)}'",
    "a quoted private key": f"> -----BEGIN PRIVATE KEY-----\n> {drawn(64)}\n> -----END PRIVATE KEY-----",
    "a private key in JSON in JSON": f"-----BEGIN PRIVATE KEY-----\\\\n{drawn(64)}\\\\n{drawn(64)}\\\\n",
    "an address without a user": f"redis://:{drawn(24)}@cache.company.com",
    "Google's in YAML": "key:AIza" + drawn(35, LETTERS + "_-"),
    "an address in JSON": f"mongodb+srv:\\/\\/mila:{drawn(16)}@cluster0.abcde.mongodb.net",
}  # fmt: skip
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
    *("https://user:password@example.com", "https://mila:Summer2024@example.org/x", "http://mila:Summer2024@localhost:8080", "ftp://mila:Summer2024@db/"),
    *("postgresql://user:pass1234@db.company.com/db", "https://your-name:your-token-123@github.com/a/b", "https://me:${TOKEN1}@a.com", "https://me:<token1>@a.com"),
    *("https://me:*******1@a.com", "git+https://github.com/a/b@v1.2.3", "https://a.com:8080/b@c.com", "see http://a.com: 12 letters1 to mila@b.com"),
    "123456:ABC-DEF1234ghIkl-zyx57W2v1u123ew11",  # Telegram's own pages
    "123456789:AABBCCDDEEFFaabbccddeeff-1234567890",
    f"1710465982:{drawn(34)}",
    "AccountKey=Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw==",
    "AccountKey=<your key>; AccountKey=" + "x" * 86 + "==",
    "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
    "aws_secret_access_key = os.environ['AWS_SECRET_ACCESS_KEY']",
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIiwibmFtZSI6IkpvaG4gRG9lIn0." + drawn(43),  # jwt.io
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9 is how it begins",
    "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: ...\n\n...",
    "pplx-" + "a" * 48,
    "glrt-a-name-of-many-words-with-1-digit",
    # RFC 7519, jwt.io's signature, Supabase's local demo
    "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk",
    "eyJhbGciOiJIUzI1NiIs.eyJzdWIiOiJ1c2VyMTIz.SflKxwRJSMeKKF2QT4fwpMeJf36POk6yJV_adQssw5c",
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJpc3MiOiJzdXBhYmFzZS1kZW1vIiwicm9sZSI6ImFub24iLCJleHAiOjE5ODM4MTI5OTZ9.CRXP1A7WOeoJeXxjNni43kdQwgnWNReilDMblYTn_I0",
    f"eyJ{drawn(33)}.eyJ{drawn(90)}.{'x' * 43}",
    "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0BAQEFAASC...\n-----END PRIVATE KEY-----",
    f"-----BEGIN RSA PRIVATE KEY-----\n{drawn(64)}\n...\n-----END RSA PRIVATE KEY-----",
    *("hf_YourTokenHereYourTokenHereYourToken", "hf_transformersModelForSequenceClassificationWithLoRA", "hf_AbCdEfGhIjKlMnOpQrStUvWxYz12345678"),
    *("ghp_1234567890abcdefghijklmnopqrstuvwxyzAB", "sk-1234567890abcdef1234567890abcdef", "sk-proj-1234567890ABCDEFGHIJKLMNOP", "sk_live_51HhahYourKeyHere0000000000"),
    *("sk-learn-classification-Report2020" + drawn(20), "sk-loading-Spinner-animation-" + drawn(24), f"img/sk-{drawn(32, HEX)}.png", "ASIAPACIFICREGIONALX"),
    *(f"20231224:A{drawn(34, seed=3)}", "https://hooks.slack.com/services/T00000000/B00000000/" + "X" * 24),
    *("rtsp://admin:adm-N92x@192.168.1.64:554/live", "http://mila:k8Vq2xLm9Zt4@10.0.0.1:3128", "http://mila:k8Vq2xLm9Zt4@172.20.0.1:80", "amqp://guest:guest123@rabbit.host"),
    *("postgres://scott:tiger123@db.internal/x", "ftp://anonymous:guest2000@ftp.gnu.org", "postgresql://user:p4ssw0rd@host.acme.com/db", "https://mila:Summer2024@db.company.com"),
    *("COHERE_API_KEY=os.environ['COHERE_API_KEY_OF_2024']", "API_KEY = load_the_key_of_the_service_from_2_files()", "MISTRAL_API_KEY=yourMistralKey12345678abcdefgh", "API_KEY=nameOfTheVariableThatHasIt2"),
    '{"username": "mila", "key": "00000000000000000000000000000000"}',
]  # fmt: skip
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


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_is_found_and_named(tmp_path, kind):
    for around in (
        "{}",
        "the key is `{}`, look",
        '{{"text": "say\\n{}\\n"}}',
        "KEY={}\n",
        "q=%3D{}",
        "\\u003d{}",
        "\x1b[0m{}",
    ):
        assert found(tmp_path, around.format(KEYS[kind])) == [kind], around


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


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_in_utf_16_is_found(tmp_path, kind):
    for around in "{}", "the key is `{}`, look", '{{"text": "say\\n{}\\n"}}', "мой ключ:{} 中{}":
        text = around.format(KEYS[kind], KEYS[kind])
        for encoding in "utf-16-le", "utf-16-be", "utf-16":
            assert found(tmp_path, text.encode(encoding)) == [kind] * around.count("{}"), (around, encoding)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16"])
@pytest.mark.parametrize("at", [WINDOW // 2 - 10, WINDOW // 2, 2 * WINDOW + 7])
def test_a_key_far_down_in_utf_16_is_found_once(tmp_path, at, encoding):
    text = ("A line of a book.\n" * (at // 18 + 1))[: at - 1] + " "
    assert found(tmp_path, f"{text}{KEYS['a GitHub token']}\n".encode(encoding)) == ["a GitHub token"]


def test_a_key_far_down_is_found_where_the_mark_alone_tells_utf_16(tmp_path):
    assert found(tmp_path, ("中" * WINDOW + KEYS["a GitHub token"]).encode("utf-16")) == ["a GitHub token"]


@pytest.mark.parametrize("text", [*HARMLESS, "".join(map(chr, range(0x20, 0x3000)))], ids=range(len(HARMLESS) + 1))
def test_what_is_no_key_in_utf_16_is_not_found(tmp_path, text):
    assert found(tmp_path, text.encode("utf-16-le")) == []


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16"])
def test_a_secret_in_use_is_found_in_utf_16(tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("MY_SERVICE_SECRET", "correct horse battery")
    assert found(tmp_path, "a correct horse battery".encode(encoding)) == ["the secret in use as MY_SERVICE_SECRET"]


def test_of_an_address_neither_user_nor_password_is_repeated(tmp_path):
    (tmp_path / "notes.txt").write_text(KEYS[ADDRESS])
    with pytest.raises(HubError, match=r"an address with a password \(`postgres:\.\.\.`\): line 1, column 1;"):
        refuse_secrets(tmp_path, tmp_path.parent)


@pytest.mark.parametrize("wrapped", [0, 76])
def test_pictures_as_text_hold_no_secret(tmp_path, wrapped):
    picture = random.Random(2).randbytes(3_000_000)
    text = base64.encodebytes(picture) if wrapped else base64.b64encode(picture)
    assert found(tmp_path, b'{"image": "data:image/png;base64,' + text + b'"}') == []
    assert found(tmp_path, base64.urlsafe_b64encode(picture)) == []


def test_prose_and_code_hold_no_secret(tmp_path):
    """The Python of the standard library and of huggingface_hub, with its tests' addresses and its documentation."""
    import huggingface_hub

    for folder in Path(random.__file__).parent, Path(huggingface_hub.__file__).parent:
        text = b"\n".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        assert len(text) > LONGEST and found(tmp_path, text) == []


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
        refuse_secrets(tmp_path, tmp_path.parent)
    assert "README.md holds what looks like an OpenAI or Anthropic key (`sk-...`)" in error.value.what
    assert "line 16, column 15, in `after` of sample 2; nothing was uploaded" in error.value.what
    assert key[3:12] not in str(error.value)


def test_further_places_are_counted(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(KEYS["a GitHub token"])
    with pytest.raises(HubError, match=r"a\.txt .* line 1, column 1, and 1 other place; nothing"):
        refuse_secrets(tmp_path, tmp_path.parent)


@pytest.mark.parametrize("name, taken_out_of", [("README.md", "{run}/facts.json, run `autosloth card {run}`"), ("adapter/a.json", "adapter/a.json of the upload")])  # fmt: skip
def test_of_the_early_upload_the_run_is_named_and_no_folder_that_is_gone(tmp_path, name, taken_out_of):
    folder = tmp_path / ".publish-abc.partial" / "model"
    (folder / "adapter").mkdir(parents=True)
    (folder / name).write_text(KEYS["a GitHub token"])
    with pytest.raises(HubError) as error:
        refuse_secrets(folder, tmp_path)
    assert f"{name} of the upload holds what looks like a GitHub token" in error.value.what
    assert f"Take it out of {taken_out_of.format(run=tmp_path)} and publish again" in error.value.todo
    assert ".partial" not in str(error.value)


@pytest.mark.parametrize("text", [b"http://", b"a://:" + b"1a" * 45, b"http://a@", b"a:", b"x_-.", b'"username":'])
def test_a_text_of_addresses_takes_no_longer_than_others(tmp_path, text):
    began = time.process_time()
    found(tmp_path, text * (2_000_000 // len(text)))
    assert time.process_time() - began < 4  # 12 before


def test_in_weights_the_byte_is_named(tmp_path):
    header = b'{"__metadata__":{"note":"' + KEYS["an AWS key"].encode() + b'"}}'
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(HubError, match=r"model\.safetensors holds what looks like an AWS key .* byte 33; nothing"):
        refuse_secrets(tmp_path, tmp_path.parent)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_a_real_vocabulary_holds_no_secret(name):
    read = vocabulary(name)
    assert secrets_in(read) == secrets_in(read.with_name(f"ggml-vocab-{name}.gguf")) == []


def test_a_real_sentencepiece_vocabulary_holds_no_secret(real_data):
    assert secrets_in(real_data("llama2-tokenizer.model")) == []
