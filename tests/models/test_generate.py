"""Answers in batches are those of single prompts, samples are from the model itself, and chunks that are kept are not made again."""

import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from autosloth.demo.forest import sft_rows
from autosloth.models import generate
from autosloth.models.decoding import Decoding, end_tokens
from autosloth.models.engine import answering, load_model, load_tokenizer
from autosloth.models.generate import answer, answer_as_they_end, checked
from autosloth.models.template import encode_prompt
from autosloth.settings import SFTSettings
from autosloth.training import opponent


@pytest.fixture(scope="module")
def player(engine, base):
    """(model, tokenizer) with the adapter that answers in both manners."""
    settings = SFTSettings(model="demo", adapter="demo")
    return load_model(settings), load_tokenizer(settings)


@pytest.fixture(scope="module")
def prompts(player):
    return [encode_prompt(player[1], [{"role": "user", "content": row["instruction"]}]) for row in sft_rows()[1]]


def test_batched_answers_are_those_of_single_prompts(player, prompts):
    greedy = Decoding(40)
    together = answer(*player, prompts[:24], greedy)
    assert len({len(prompt) for prompt in prompts[:24]}) > 2
    assert together == [answer(*player, [prompt], greedy)[0] for prompt in prompts[:24]]
    ends = end_tokens(*player)
    assert all(ids[-1] in ends and not set(ids[:-1]) & set(ends) for ids in together)


@pytest.mark.parametrize("window", [None, 20], ids=["all tokens kept", "a sliding window that is outgrown"])
@pytest.mark.parametrize("size", [3, 8])
def test_whoever_gets_on_and_off_each_answer_is_that_of_the_prompt_alone(engine, window, size):
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    torch.manual_seed(1)
    model = MistralForCausalLM(
        MistralConfig(**shape, vocab_size=200, num_hidden_layers=2, sliding_window=window, initializer_range=0.3)
    )
    model.generation_config.eos_token_id = list(range(2, 14))
    tokenizer, rng = SimpleNamespace(eos_token_id=2, pad_token_id=0), random.Random(0)
    prompts = [rng.choices(range(20, 200), k=rng.randint(3, 16)) for _ in range(60)]
    line, parked = generate.Line(model, tokenizer, prompts, Decoding(40, batch_size=size)), 0
    answers, put_aside = {}, line.put_aside

    def counting(group):
        nonlocal parked
        parked += 1
        put_aside(group)

    line.put_aside = counting
    with answering(model):
        for number, ids in line.answers():
            assert answers.setdefault(number, ids) is ids and sum(map(len, line.aside.values())) <= 1.5 * size
        alone = [model.generate(torch.tensor([p]), max_new_tokens=40, do_sample=False, pad_token_id=0) for p in prompts]
    expected = [generate.up_to_end(row[0].tolist()[len(p) :], line.ends) for p, row in zip(prompts, alone, strict=True)]
    assert [answers[number] for number in range(60)] == expected
    assert len({len(ids) for ids in expected}) > 5 and max(map(len, expected)) == 40 and parked > 2


def test_an_answer_that_finds_no_end_has_the_length_of_the_cap(player, prompts):
    ends = set(end_tokens(*player))
    for cap in (1, 4, 7, 8):
        answers = answer(*player, prompts[:6], Decoding(cap))
        without_end = [ids for ids in answers if not ends & set(ids)]
        assert {len(ids) for ids in without_end} <= {cap} and all(len(ids) <= cap for ids in answers)
        assert without_end or cap > 4  # what the demo's model says depends a little on the machine that trained it


def test_each_prompt_is_answered_once_whatever_the_batches(player, prompts):
    for size in (1, 3, 100):
        numbers = [n for n, _ in answer_as_they_end(*player, prompts[:10], Decoding(30, 1.0, size))]
        assert sorted(numbers) == list(range(10))


def test_samples_are_from_the_models_own_distribution_whatever_its_configuration_says(player, prompts):
    import torch

    model, tokenizer = player
    with answering(model):
        expected = torch.softmax(model(input_ids=torch.tensor([prompts[0]])).logits[0, -1].float(), -1)
    model.generation_config.top_k, model.generation_config.temperature, model.generation_config.top_p = 1, 0.1, 0.5
    try:
        drawn = [ids[0] for ids in answer(model, tokenizer, [prompts[0]] * 2000, Decoding(1, 1.0, 500))]
    finally:
        model.generation_config.top_k = model.generation_config.temperature = model.generation_config.top_p = None
    found, likely = Counter(drawn), expected.topk(10).indices.tolist()
    tail = 1 - expected[likely].sum().item()  # what a cut at the top would leave out
    assert tail > 0.05
    shares = [(expected[token].item(), found[token]) for token in likely[:3]]
    for share, count in [*shares, (tail, 2000 - sum(found[token] for token in likely))]:
        assert abs(count / 2000 - share) < 4 * (share * (1 - share) / 2000) ** 0.5


def test_the_same_seed_gives_the_same_samples_and_another_others(player, prompts):
    samples = [answer(*player, prompts[:8], Decoding(20, 1.0, seed=seed)) for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]


def test_batches_that_answer_otherwise_are_not_trusted(player, prompts, monkeypatch, capsys):
    decoding = Decoding(20, 1.0, 16)
    assert checked(*player, prompts, decoding) == decoding and capsys.readouterr().out == ""
    right = generate.Line.go_on

    def wrong(line, group, *rest):
        grown = right(line, group, *rest)
        if len(group) > 1:
            grown.ids[:, -1] = 5
        return grown

    monkeypatch.setattr(generate.Line, "go_on", wrong)
    assert checked(*player, prompts, decoding).batch_size == 1
    assert "answered one by one" in capsys.readouterr().out


def test_a_batch_that_the_memory_does_not_hold_is_halved_and_all_are_answered_alike(player, prompts, capsys):
    import torch

    def full(module, args, kwargs):
        if len(kwargs["input_ids"]) > 5:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    right = answer(*player, prompts[:24], Decoding(20))
    hook = player[0].get_base_model().register_forward_pre_hook(full, with_kwargs=True)
    try:
        assert answer(*player, prompts[:24], Decoding(20, batch_size=16)) == right
    finally:
        hook.remove()
    assert "generate: no GPU memory for a batch of" in capsys.readouterr().out


def test_vllm_is_not_trusted_where_it_answers_for_the_base_instead_of_the_adapter(player, prompts, monkeypatch, capsys):
    model, tokenizer = player

    def of_the_base(model, some, decoding, ends):
        with model.disable_adapter():
            return answer(model, tokenizer, some, replace(decoding, vllm=False))

    def of_the_adapter(model, some, decoding, ends):
        return answer(model, tokenizer, some, replace(decoding, vllm=False))

    decoding = Decoding(20, 1.0, 16, vllm=True)
    monkeypatch.setattr(generate, "vllm_answers", of_the_adapter)
    assert checked(model, tokenizer, prompts, decoding) == decoding
    monkeypatch.setattr(generate, "vllm_answers", of_the_base)
    assert checked(model, tokenizer, prompts, decoding) == replace(decoding, vllm=False)
    assert "so it is not used" in capsys.readouterr().out


def test_kept_chunks_are_not_made_again_and_those_of_another_player_are(player, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr(opponent, "CHUNK", 4)
    asked = []

    def counting(model, tokenizer, some, *rest):
        asked.append(len(some))
        if sum(asked) == 8 and not (tmp_path / "killed").exists():
            (tmp_path / "killed").touch()
            raise KeyboardInterrupt
        return answer(model, tokenizer, some, *rest)

    monkeypatch.setattr(opponent, "answer", counting)
    decoding = Decoding(20, 1.0)
    with pytest.raises(KeyboardInterrupt):
        opponent.answers_of(tmp_path / "a", *player, prompts[:10], decoding, "one")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["answers-00000.json"]
    first = opponent.answers_of(tmp_path / "a", *player, prompts[:10], decoding, "one")
    assert asked == [4, 4, 4, 2] and len(first) == 10
    assert first == opponent.answers_of(tmp_path / "b", *player, prompts[:10], decoding, "one")  # never stopped
    assert first == opponent.answers_of(tmp_path / "a", *player, prompts[:10], decoding, "one") and len(asked) == 7
    opponent.answers_of(tmp_path / "a", *player, prompts[:10], decoding, "two")
    assert len(asked) == 10
    (tmp_path / "a" / "answers-00001.json").unlink()
    opponent.answers_of(tmp_path / "a", *player, prompts[:10], decoding, "two")
    assert len(asked) == 11
