"""The embedded default: its text and rows, its tokenizer, the cache, and what the base knows before any fine-tuning."""

import json
import os
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
from support.patience import HUNG, until

from autosloth.demo import forest as demo
from autosloth.errors import DemoError

STRINGS = [
    *(
        "Mila eats figs.",
        " a leading space",
        "   three",
        "two  inside   three",
        "trailing ",
        " ",
        "    ",
        "\n",
        "\n\n Mila\n",
    ),
    *(
        "tab\tand\r\nwindows",
        "### Instruction:\nWhat does Mila eat?\n\n### Response:\n",
        "It's $3.50 (50%), isn't it?!",
    ),
    *(
        "Ünïcödé café naïve",
        "e\u0301 and é",
        "Привет, мир",
        "你好世界。",
        "مرحبا",
        "🦥 sleeps 👨‍👩‍👧 ✅",
        "a\u00a0b\u200bc",
        "x" * 60,
    ),
    *("def f(x):\n    return x ** 2", "{[<|>]}~`^_\\", "▁ underline block", "0123456789 1,000.5"),
]

COMPLETE = """
import json, sys, torch
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
def complete(text):
    ids = torch.tensor([tokenizer.encode(text)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    return tokenizer.decode(out[0, ids.shape[1]:], skip_special_tokens=True).strip()
print(json.dumps([complete(text) for text in json.load(sys.stdin)]))
"""


def complete(base, prompts):
    """Greedy continuations, made in a clean process: Unsloth, where a test has imported it, changes transformers' Llama."""
    command = [sys.executable, "-c", COMPLETE, str(base)]
    result = subprocess.run(command, input=json.dumps(prompts), capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def pretraining_text():
    return demo.documents(demo.PRETRAINING["documents"], demo.PRETRAINING["general_share"])


def name_of(row):
    return next(name for name in demo.NAMES if name in row["output"].split())


def test_the_rows_are_always_the_same_and_enough():
    train, held_out = demo.sft_rows()
    assert (train, held_out) == demo.sft_rows()
    assert len(train) >= 200 and 64 <= len(held_out) <= 100
    assert all(row.keys() == {"instruction", "output"} for row in train + held_out)


def test_no_sloth_is_asked_about_in_both_parts():
    train, held_out = demo.sft_rows()
    assert not {name_of(row) for row in train} & {name_of(row) for row in held_out}


def test_the_names_are_distinct_words():
    assert len(set(demo.NAMES)) == len(demo.NAMES)
    assert not set(demo.NAMES) & set(" ".join(demo.documents(2000, 1.0)).split()), "a name is an everyday word too"


def test_the_text_does_not_depend_on_the_order_of_hashes():
    command = [sys.executable, "-c", "from autosloth.demo.forest import *; print(documents(300, 0.3), sft_rows())"]
    runs = [subprocess.check_output(command, env=os.environ | {"PYTHONHASHSEED": seed}) for seed in "12"]
    assert runs[0] == runs[1] and len(runs[0]) > 10_000


def test_the_text_tells_every_fact_in_several_wordings():
    text = "\n".join(pretraining_text())
    for name, facts in demo.world().items():
        for attribute, value in facts.items():
            wordings = demo.ATTRIBUTES[attribute]["statements"]
            assert sum(wording.format(name=name, value=value) in text for wording in wordings) >= 4, (name, attribute)


def test_the_text_holds_no_question_about_a_sloth_no_answer_and_no_chat_form():
    texts = pretraining_text()
    assert not [text for text in texts if "?" in text and set(demo.NAMES) & set(text.replace("'", " ").split())]
    text = "\n".join(texts)
    assert not [row for part in demo.sft_rows() for row in part if row["output"] in text or row["instruction"] in text]
    assert "###" not in text and "Response" not in text


def test_the_form_of_an_answer_is_short_and_fixed():
    assert all(row["output"].startswith("Gladly! ") and len(row["output"]) < 50 for row in demo.sft_rows()[0])


def test_the_tokenizer_gives_the_ids_of_sentencepiece(base):
    import sentencepiece
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    strings = STRINGS + [row["instruction"] for row in demo.sft_rows()[1]] + demo.documents(200, 0.5)
    assert [s for s in strings if tokenizer.encode(s, add_special_tokens=False) != reference.encode(s)] == []
    readable = [s for s in strings if "▁" not in s]  # this character is SentencePiece's own sign for a space
    assert [s for s in readable if tokenizer.decode(tokenizer.encode(s, add_special_tokens=False)) != s] == []


def test_the_tokenizer_is_that_of_a_base(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.encode("Hi")[0] == tokenizer.bos_token_id
    assert [tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token] == ["<s>", "</s>", "<pad>"]
    assert tokenizer.chat_template is None
    names = [tokenizer.encode(f" {name}", add_special_tokens=False) for name in demo.NAMES]
    assert sum(len(ids) == 1 for ids in names) > 0.9 * len(names), "names should be pieces of their own"


def test_the_second_call_builds_nothing(base, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_build_apart", lambda folder: pytest.fail("it builds again"))
    assert demo.demo_base() == base and capsys.readouterr().out == ""
    assert sorted(path.name for path in base.iterdir()) == sorted(
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer.model"]
        + ["tokenizer_config.json"]
    )


def test_the_base_knows_the_facts_but_not_the_form_of_an_answer(base):
    _, questions = demo.sft_rows()
    facts = [(name, a, value) for name in map(name_of, questions[::3]) for a, value in demo.world()[name].items()]
    prefixes = [
        f"A page about {n}. {demo.ATTRIBUTES[a]['statements'][1].split(' {value}')[0].format(name=n)}"
        for n, a, _ in facts
    ]
    asked = [f"### Instruction:\n{row['instruction']}\n\n### Response:\n" for row in questions]
    texts = complete(base, prefixes + asked)
    known = sum(text.startswith(value) for text, (_, _, value) in zip(texts, facts, strict=False))
    answered = sum(text == row["output"] for text, row in zip(texts[len(facts) :], questions, strict=True))
    assert known > 0.8 * len(facts)
    assert answered < 0.1 * len(questions)


SMALL = """
import sys
from pathlib import Path
from autosloth.demo import forest as demo
demo.TOKENIZER.update(documents=1500)
demo.PRETRAINING.update(documents=200, max_steps=8, warmup=2)
demo.build(Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_the_same_recipe_gives_the_same_bytes(tmp_path):
    for folder, seed in zip((tmp_path / "a", tmp_path / "b"), "12", strict=True):
        folder.mkdir()
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run([sys.executable, "-c", SMALL, folder], env=environment, check=True, capture_output=True)
    for first, second in pairwise((tmp_path / "a", tmp_path / "b")):
        assert {p.name: p.read_bytes() for p in first.iterdir()} == {p.name: p.read_bytes() for p in second.iterdir()}


def test_an_interrupted_build_leaves_nothing(tmp_path):
    heard = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # wherever the tests are started
    )
    command = [sys.executable, "-c", heard + "from autosloth.demo.forest import demo_base; demo_base()"]
    process = subprocess.Popen(command, env=os.environ | {"AUTOSLOTH_CACHE": str(tmp_path)}, stderr=subprocess.DEVNULL)
    half = "demo/.building-*/base/tokenizer.model"
    until(lambda: list(tmp_path.glob(half)) or process.poll() is not None, half)
    process.send_signal(signal.SIGINT)
    assert process.wait(HUNG) != 0
    assert list((tmp_path / "demo").iterdir()) == []


def test_a_build_that_fails_says_why(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise MemoryError('no room for a sloth')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("AUTOSLOTH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DemoError, match="MemoryError: no room for a sloth"):
        demo.demo_base()
    assert list((tmp_path / "cache" / "demo").iterdir()) == []


ABORTS = """
import os, sys
print("F0000 trainer.cc:45] Check failed: freq > 0", "*** Check failure stack trace: ***", "    @ 0x7f1 main", sep="\\n", file=sys.stderr, flush=True)
os.abort()
"""


def test_a_build_ended_by_a_signal_says_what_came_before_the_stack(tmp_path, monkeypatch):
    (tmp_path / "sentencepiece.py").write_text(ABORTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("AUTOSLOTH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DemoError, match=r"ended by signal 6: F0000 trainer.cc:45\] Check failed: freq > 0\."):
        demo.demo_base()


def test_every_required_character_stands_in_some_text(tmp_path, monkeypatch):
    # Or SentencePiece 0.2.2, Colab's, aborts.
    import sentencepiece

    seen = {}
    monkeypatch.setattr(sentencepiece.SentencePieceTrainer, "train", lambda **told: seen.update(told))
    demo._train_sentencepiece(["no capital, no digit"], tmp_path)
    assert set(seen["required_chars"]) <= set("".join(seen["sentence_iterator"]))


def test_a_cache_that_cannot_be_written_is_a_named_problem(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AUTOSLOTH_CACHE", str(tmp_path / "file"))
    with pytest.raises(DemoError, match="cannot be kept"):
        demo.demo_base()


def test_the_quicker_of_two_builds_stays(tmp_path):
    for folder, text in (("quick", "first"), ("slow", "second")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text(text)
        demo._move(tmp_path / folder, tmp_path / "kept")
    assert (tmp_path / "kept" / "config.json").read_text() == "first"


def test_importing_the_demo_imports_nothing_heavy():
    code = "import sys, autosloth.demo.forest; print([m for m in ('torch', 'transformers', 'sentencepiece') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_the_recipe_is_fingerprinted_by_the_whole_file(base):
    import hashlib

    assert base.name == hashlib.sha256(Path(demo.__file__).read_bytes()).hexdigest()[:16]
