"""The tokenizer keeps what the GGUF needs, prompts have one BOS, and a 4-bit base leads to its 16-bit original."""

import json
import re

import pytest

from autosloth.errors import ModelError, SettingsError
from autosloth.models import base as base_files
from autosloth.models import engine as model
from autosloth.models import template as chats
from autosloth.settings import SFTSettings


@pytest.mark.parametrize(
    "quantized, original",
    [
        ("unsloth/mistral-7b-bnb-4bit", "unsloth/mistral-7b"),
        ("unsloth/zephyr-sft-bnb-4bit", "unsloth/zephyr-sft"),
        ("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", "unsloth/Qwen2.5-7B-Instruct"),
    ],
)
def test_the_16_bit_original_of_a_4_bit_base_is_found(monkeypatch, quantized, original):
    monkeypatch.setattr(base_files, "is_quantized", lambda source, revision=None: True)
    assert base_files.sixteen_bit_model(SFTSettings(model=quantized))[0] == original


def test_an_unknown_4_bit_base_asks_for_its_original(tmp_path):
    (tmp_path / "config.json").write_text('{"quantization_config": {}}')
    with pytest.raises(ModelError, match="Name it as `sixteen_bit_model`"):
        base_files.sixteen_bit_model(SFTSettings(model=str(tmp_path)))
    assert base_files.sixteen_bit_model(SFTSettings(model=str(tmp_path), sixteen_bit_model="me/full"))[0] == "me/full"


def test_a_base_in_16_bit_is_its_own_original(base):
    assert base_files.sixteen_bit_model(SFTSettings(model=str(base)))[0] == str(base)


def test_the_tokenizer_is_saved_with_what_transformers_leaves_out(engine, base, tmp_path):
    settings = SFTSettings(model="demo")
    model.save_tokenizer(model.load_tokenizer(settings), settings, tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (base / "tokenizer.model").read_bytes()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert {token["content"] for token in config["added_tokens_decoder"].values()} >= {"<s>", "</s>"}
    assert (tmp_path / "chat_template.jinja").read_text() == chats.named_template("alpaca")


def test_the_saved_tokenizer_makes_the_same_ids(engine, base, tmp_path):
    from transformers import AutoTokenizer

    settings = SFTSettings(model="demo")
    tokenizer = model.load_tokenizer(settings)
    model.save_tokenizer(tokenizer, settings, tmp_path)
    text = chats.render_chat(tokenizer, [{"role": "user", "content": " Où?  two\n\n½ 🦥 "}], answer_next=True)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text, add_special_tokens=False).input_ids == tokenizer(text, add_special_tokens=False).input_ids
    assert again.chat_template == tokenizer.chat_template


def test_a_prompt_has_one_bos_with_templates_that_write_it_and_those_that_do_not(engine, base):
    tokenizer = model.load_tokenizer(SFTSettings(model="demo"))
    for template in (chats.named_template("alpaca"), "{% for m in messages %}{{ m.content }}{% endfor %}"):
        tokenizer.chat_template = template
        ids = chats.encode_prompt(tokenizer, [{"role": "user", "content": "hello"}])
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_the_tokenizers_own_chat_template_is_kept_unless_another_is_named(engine, base, tmp_path):
    settings = SFTSettings(model="demo", chat_template="zephyr")
    model.save_tokenizer(model.load_tokenizer(settings), settings, tmp_path)
    (tmp_path / "config.json").write_text((base / "config.json").read_text())
    assert model.load_tokenizer(SFTSettings(model=str(tmp_path))).chat_template == chats.named_template("zephyr")
    assert model.load_tokenizer(
        SFTSettings(model=str(tmp_path), chat_template="mistral")
    ).chat_template == chats.named_template("mistral")


def test_thinking_is_off_in_the_published_template_too_unless_it_is_asked_for(engine, base, tmp_path):
    own = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}{% if enable_thinking is not defined or enable_thinking %}{{ '<think>' }}{% endif %}"
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(own)
    settings, ask = SFTSettings(model=str(tmp_path)), [{"role": "user", "content": "hello"}]
    quiet = model.load_tokenizer(settings)
    assert not chats.render_chat(quiet, ask, answer_next=True).endswith("<think>")
    model.save_tokenizer(quiet, settings, tmp_path / "saved")
    published = (tmp_path / "saved" / "chat_template.jinja").read_text()
    assert published == quiet.chat_template == chats.without_thinking(own) == chats.without_thinking(published)
    thinking = model.load_tokenizer(SFTSettings(model=str(tmp_path), thinking=True))
    assert thinking.chat_template == chats.with_thinking(own) == chats.with_thinking(chats.without_thinking(own))
    assert chats.render_chat(thinking, ask, answer_next=True).endswith("<think>")


@pytest.mark.parametrize(
    "make",
    [lambda folder: None, lambda folder: (folder / "config.json").write_text("{}")],
    ids=["no files", "no tokenizer"],
)
def test_a_folder_that_is_no_model_is_named(engine, tmp_path, make):
    make(tmp_path)
    with pytest.raises(ModelError, match="could not be loaded"):
        model.load_tokenizer(SFTSettings(model=str(tmp_path)))


def test_precision_follows_the_hardware_and_gives_its_reason(monkeypatch):
    import torch

    assert model.choose_precision(SFTSettings()) == ("float32", "no GPU") or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    assert model.choose_precision(SFTSettings()) == ("float16", "Tesla T4 has no bf16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert model.choose_precision(SFTSettings())[0] == "bfloat16"


@pytest.mark.parametrize("given", ["text", "path"])
def test_a_chat_template_of_ones_own_is_text_or_a_path(engine, base, tmp_path, given):
    own = "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
    (tmp_path / "mine.jinja").write_text(own + "\n")
    settings = SFTSettings.load({"model": "demo", "chat_template": own if given == "text" else str(tmp_path / "mine.jinja")})  # fmt: skip
    chats.check_template(settings)
    assert model.load_tokenizer(settings).chat_template == own


@pytest.mark.parametrize(
    "given, what",
    [
        ("nowhere/mine.jinja", r"nowhere/mine\.jinja cannot be read"),
        ("{% for m in messages %}{{ m.content }}", r"cannot be rendered \(line 1: "),
        ("{{ messages[0].content + messages[9].content }}", "cannot be rendered"),
        ("{{ raise_exception('never') }}", r"cannot be rendered \(never\)"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves out turns"),
    ],
)
def test_a_chat_template_that_shows_no_chat_is_refused_before_training(given, what):
    with pytest.raises(ModelError, match=what):
        chats.check_template(SFTSettings.load({"model": "demo", "chat_template": given}))


def test_a_name_that_is_no_chat_template_is_refused_with_ours():
    with pytest.raises(SettingsError, match="alpaca, mistral, zephyr"):
        SFTSettings.load({"model": "demo", "chat_template": "alpca"})


def test_of_several_chat_templates_of_a_model_default_is_taken_or_tool_use_for_tools(engine, base, tmp_path, capsys):
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    several = [{"name": name, "template": template} for name, template in named.items()]
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": several}))
    settings = SFTSettings(model=str(tmp_path))
    assert model.load_tokenizer(settings).chat_template == named["default"]
    assert model.load_tokenizer(settings, tools=True).chat_template == named["tool_use"]
    assert "(default, tool_use) `default` is used" in capsys.readouterr().out
    model.save_tokenizer(model.load_tokenizer(settings), settings, tmp_path / "saved")
    assert model.load_tokenizer(SFTSettings(model=str(tmp_path / "saved"))).chat_template == named["default"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": several[1:]}))
    with pytest.raises(ModelError, match="none of them is called default"):
        model.load_tokenizer(settings)


def test_an_end_token_that_only_config_json_tells_is_read_and_kept(engine, base, tmp_path):
    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "eos_token"}))  # fmt: skip
    settings = SFTSettings(model=str(tmp_path))
    tokenizer = model.load_tokenizer(settings)
    assert tokenizer.eos_token == "</s>" and model.end_ids(tokenizer, settings) == {tokenizer.eos_token_id}
    model.save_tokenizer(tokenizer, settings, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["eos_token"] == "</s>"


def test_tokens_without_an_embedding_are_told(engine, base, tmp_path, capsys):
    from autosloth.check import check_vocabulary

    for path in base.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = SFTSettings(model=str(tmp_path))
    check_vocabulary(settings)
    assert not capsys.readouterr().out
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 2}))
    check_vocabulary(settings)
    assert re.search(r"has no embedding for \S+, \S+: rows that hold one are left out", capsys.readouterr().out)
