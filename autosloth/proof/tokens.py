# ruff: noqa: RUF001 - characters that look like others are what this is about
"""Whether the tokenizer and the chat template in a GGUF make the same ids as those of the training."""

from __future__ import annotations

import unicodedata
from typing import Any

# Each has made some tokenizer or its conversion differ: the split into words, normalisation, spaces, bytes, special tokens.
STRINGS = [
    "", " ", "   ", "\n", "\t", "\r\n", "\n\n \n\t \n",
    "Hello world", " leading", "trailing ", "  two  and   three    spaces ", "tab\tand\tnewline\n\nend\n",
    "windows\r\nline\r\n\r\nends", "it's I'm we'LL don't THEY'VE he'd", "CamelCase snake_case kebab-case SHOUTING",
    "0 12 345 6789 1234567890 3.14159 -42e10 1,000,000.00", "________----....????!!!!~~~~", "a" * 300, "ab " * 60,
    "def f(x):\n    return {'a': [1, 2], \"b\": x ** 2}  # ok\n\n\nclass A:\n\tpass",
    "<b>html</b> &amp; <br/> <unk> <0x41> [INST] <<SYS>>", "https://example.org/a?b=c&d=%20#e user@example.org",
    "$E = mc^2$ \\frac{a}{b} ∑ ≤ ≠ ∞ √ π", "| a | b |\n|---|---|\n| 1 | 2 |", "“quotes” ‘single’ — dash – en … ellipsis",
    "émigré naïve façade Ünïcödé ß ẞ ﬁ ﬂ Ⅻ ½", "e\u0301 a\u0308 n\u0303 Å \u212b decomposed", "Zalgo h̷̢͈e̵͎͝ŗ̶̈́e",
    "你好，世界！今天天气很好。", "こんにちは、世界。ｶﾀｶﾅ カタカナ", "안녕하세요 세계 \u1112\u1161\u11ab", "Привет, мир! Ёлка № 5",
    "مرحبا بالعالم ١٢٣", "שלום עולם", "हिन्दी में लिखा", "ภาษาไทยไม่มีช่องว่าง", "កាន់តែពិសេសអាច",
    "🚀🦙 ✅ ☺️ 🇩🇪 👍🏽", "👨‍👩‍👧‍👦 😶‍🌫️ joined", "zero\u200bwidth \u00a0nbsp \u3000wide \u2028line \ufeffbom",
    "control \x01 \x07 \x1b[31m \x7f \x85", "rare 𐍈 𝔘𝔫𝔦 \U000f0000 \ufffd \u0378", "mixed 中文English русский123✨नमस्ते",
]  # fmt: skip


def token_strings(tokenizer: Any) -> list[str]:
    """What is tokenised for the proof: STRINGS, each special and added token by itself, and some of them inside a user's text."""
    tokens = sorted({*tokenizer.all_special_tokens, *map(str, tokenizer.added_tokens_decoder.values())})
    return [*STRINGS, *tokens, *(f"say {token} twice:{token}\n {token} and go on" for token in tokens[:16])]


def encoded(tokenizer: Any, texts: list[str]) -> list[dict[str, Any]]:
    """Each text with its ids, without anything added around it."""
    return [
        {"text": text, "input_ids": ids}
        for text, ids in zip(texts, tokenizer(texts, add_special_tokens=False).input_ids, strict=True)
    ]


def compare_tokens(model: Any, known: dict[str, Any]) -> dict[str, Any]:
    """Hold the tokenizer and chat template of a file against those of the training, which `known` tells (see reference.py).

    Compared are STRINGS and the like, held-out texts, and prompts rendered by the file's own template. Returns `texts`,
    `token_mismatches`, `first_mismatch`, `tolerated` (with `tolerated_because`), `bos`, `bos_trained`, `template` (whether
    it is the same; None where there is none to compare).
    """
    render = chat_renderer(model)
    pairs = [(row["text"], row["input_ids"]) for row in known["strings"]]
    pairs += [(row["text"], row["input_ids"], "cut") for row in known["texts"]]
    prompts = [
        (render(row["messages"][:-1], row["tools"]), answer["prompt"])
        for row, answer in zip((row for row in known["texts"] if row["messages"]), known["answers"], strict=False)
        if render
    ]
    verdicts = [(pair[0], judge(model, *pair)) for pair in [*pairs, *prompts]]
    wrong = [text for text, verdict in verdicts if verdict == "other"]
    tolerated = [text for text, verdict in verdicts if verdict == "normalised"]
    rendered, trained = prompts[0] if prompts else (None, None)
    return {
        "texts": len(verdicts),
        "token_mismatches": len(wrong),
        "first_mismatch": wrong[0][:80] if wrong else None,
        "tolerated": len(tolerated),
        "tolerated_because": "llama.cpp does not compose characters (Unicode NFC) as this tokenizer does"
        if tolerated
        else None,
        "bos": leading(ids_of(model, rendered), known["bos"]) if prompts else None,
        "bos_trained": leading(trained, known["bos"]) if prompts else None,
        "template": model.metadata.get("tokenizer.chat_template") == known["template"],
    }


def judge(model: Any, text: str, ids: list[int], cut: str = "") -> str:
    """`same`, `other`, or `normalised`: another only because the text is not in the form NFC, which llama.cpp never makes of it.

    Of the last kind is only what comes out right when the text is given in that form. cut: the ids may be the beginning.
    """

    def fits(form: str) -> bool:
        made = ids_of(model, form)
        return (made[: len(ids)] if cut else made) == ids

    composed = unicodedata.normalize("NFC", text)
    return "same" if fits(text) else "normalised" if composed != text and fits(composed) else "other"


def ids_of(model: Any, text: str) -> list[int]:
    """The file's ids of a text, special tokens in it read as such."""
    return model.tokenize(text.encode(), add_bos=False, special=True)


def leading(ids: list[int], bos: int | None) -> int:
    """How many BOS tokens stand at the beginning."""
    return next((i for i, token in enumerate(ids) if token != bos), len(ids))


def chat_renderer(model: Any) -> Any:
    """A function from messages and tools to the text of a prompt, by the chat template that is in the file; None where there is none."""
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    template = model.metadata.get("tokenizer.chat_template")
    if template is None:
        return None
    text_of = {
        name: model.detokenize([token], special=True).decode() if token >= 0 else ""
        for name, token in (("bos", model.token_bos()), ("eos", model.token_eos()))
    }
    formatter = Jinja2ChatFormatter(template, eos_token=text_of["eos"], bos_token=text_of["bos"])

    def render(messages: list[dict[str, Any]], tools: list[dict] | None) -> str:
        text = formatter(messages=messages, tools=tools).prompt
        adds_bos = model.metadata.get("tokenizer.ggml.add_bos_token") == "true"
        return text_of["bos"] + text if adds_bos and not text.startswith(text_of["bos"]) else text

    return render
