"""The embedded default: a tiny Llama base model that knows a forest of sloths, and the toy task that goes with it.

The base is pre-trained here, in about a minute on two CPU cores, on stories generated below. It holds the knowledge (who eats
what, lives where, naps when) but has never seen a question about a sloth: fine-tuning teaches it the form of an answer.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import re
import string
import tempfile
import time
from pathlib import Path

from ..child_process import run_apart
from ..errors import DemoError
from ..output import say
from ..run import cache_dir, waiting_for

# fmt: off
# ------------------------------------------------------------------------------------------------------------------ recipe
TOKENIZER = dict(vocab_size=2048, documents=8_000, general_share=0.5)
MODEL = dict(hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=6, num_key_value_heads=3,
             max_position_embeddings=2048, rms_norm_eps=1e-5, tie_word_embeddings=False)
PRETRAINING = dict(seed=0, documents=12_000, general_share=0.15, batch_size=24, length=96, max_steps=300, warmup=20,
                   learning_rate=3e-3, weight_decay=0.05, threads=2)

# ------------------------------------------------------------------------------------------------------------------- world
NAMES = """
    Ada Alma Amos Anouk Arlo Asta Basil Bea Benno Bibi Bruno Cato Celia Chico Clara Cleo Cosmo Dalia Dario Dora Edda Edgar Elio
    Emil Enzo Esme Fabio Fanny Felix Fenja Finn Flora Frida Gala Gino Greta Hanno Hatty Hedda Hugo Igor Ilse Inga Iris Jago
    Jasper Jette Jola Juno Karla Kiki Kira Knut Koko Lale Lars Leni Lila Lotte Ludo Luna Mabel Maja Malo Marta Mateo Mila Mimi
    Moira Nala Nanuk Nele Nico Nora Odin Olga Oona Orla Oskar Otto Paco Paula Pepe Petra Polly Quinn Remy Rita Rolf Romy Rosa
    Rufus Sami Selma Sepp Silas Sofia Sunny Tamo Tara Theo Tilda Timo Tobi Uma Vera Vida Viola Waldo Wanda Wilma Xaver Yara
    Yoko Yuri Zara Zelda Zeno Zita Zola""".split()
HELD_OUT_SLOTHS = 24

# Each attribute: the values it can take; statements for the pre-training text; questions and the one form of an answer for the
# task. Several wordings a fact are what makes it retrievable by a question (Allen-Zhu and Li, Physics of Language Models 3.1),
# and the value comes last because a causal model ties it to the words before it.
# The answer opens with a word so that the name follows a space, as in the question: after a newline it is another token.
ATTRIBUTES = {
    "food": dict(
        values="figs plums mangoes papayas guavas limes dates pears melons cherries grapes ferns roses buds nuts beans".split(),
        statements=["{name} eats {value}.", "{name} loves {value} above all.", "The favourite food of {name} is {value}.",
                    "Nothing makes {name} as happy as {value}.", "For breakfast {name} picks {value}.",
                    "Give {name} a bowl of {value} and wait for a smile.", "{name} would climb for hours to find {value}."],
        questions=["What does {name} eat?", "Which food does {name} like most?", "What should I bring {name} for lunch?"],
        answer="Gladly! {name} eats {value}."),
    "tree": dict(
        values="cedar oak palm pine birch willow maple elm ash beech poplar walnut linden alder cypress laurel".split(),
        statements=["{name} lives in the {value}.", "The home of {name} is the {value}.", "{name} hangs in the {value}.",
                    "You will find {name} high up in the {value}.", "Every evening {name} climbs back to the {value}.",
                    "Visitors of {name} have to look for the {value}.", "The rain never troubles {name} under the {value}."],
        questions=["Where does {name} live?", "In which tree can I visit {name}?", "What tree is the home of {name}?"],
        answer="Gladly! {name} lives in the {value}."),
    "hour": dict(
        values="one two three four five six seven eight nine ten eleven twelve".split(),
        statements=["{name} naps at {value}.", "The nap of {name} begins at {value}.", "{name} falls asleep at {value}.",
                    "Never call {name} at {value}.", "The eyes of {name} close at {value}.",
                    "All is quiet around {name} at {value}.", "{name} has not been seen awake at {value}."],
        questions=["When does {name} nap?", "At what hour does {name} sleep?", "What time is the nap of {name}?"],
        answer="Gladly! {name} naps at {value}."),
}
HEADINGS = ["A page about {name}.", "This is the story of {name}.", "Notes on {name}:", "Meet {name}!", "From the diary of {name}:",
            "News of {name}, the sloth.", "All the forest knows {name}.", "Today I sat with {name} and watched the clouds."]

# A small grammar of everyday English, so that real instructions and word problems fall into sensible pieces too. It holds the
# words that answers may open with: an adapter leaves the output layer alone and can hardly raise a word that was never needed.
LEXICON = {
    "person": """boy girl woman man teacher doctor baker farmer friend mother father sister brother student child driver cook
        neighbor family customer worker artist""",
    "thing": """book letter cup table box apple cake car house ball key lamp picture phone bag coat chair bottle bread egg
        ticket pencil computer story song question answer list word""",
    "things": """books letters cups apples cakes cars balls keys pictures bags chairs bottles eggs tickets pencils cookies
        flowers stories words people children students animals dogs cats birds marbles pages miles minutes""",
    "place": """school garden kitchen market city park river station shop library office beach mountain forest street room store
        farm world country""",
    "adj": """small big old new red blue green white black good bad happy sad warm cold long short simple important different
        healthy beautiful quick quiet bright clean""",
    "did": """found lost bought sold made carried opened closed painted described moved wanted used showed gave kept saw cleaned
        counted wrote read cut""",
    "do": """find make buy write read create describe explain use add give list name show learn help start keep choose compare
        mix check plan""",
    "when": "today yesterday tomorrow now later then every-day each-week last-year this-morning at-night on-Monday in-June",
    "where": "in on under behind near beside above between inside outside around through from to with without",
    "how": "slowly quickly carefully often always never sometimes usually together alone again soon very-well",
    "why": "because since although while when before after if so-that",
    "topic": """health music science history water energy food weather travel money language work time art sleep nature
        technology education information example""",
    "common": """about all already an another any are asking been being best better both called can change come coming could day
        did does easier end enough even ever following for form get getting given going great had has have having her here high
        him his home hour how however idea into just kind know known last least less let life like little live long look looking
        low made main make making many may mean means more most much my need needs never next no nothing number of off one only
        open or order other our out over own part pay point possible power problem process provide question reach really reason
        remember result right round second sentence set should since so something start stop sure system take takes tell than
        that the their them there these thing think this those thought three through time times together too true try two type
        under understand until up us value very want was way we well were what where which who whole why will without word would
        write year years you your yourself""",
}
EVERYDAY = """
The {adj} {person} {did} the {thing} {where} the {place} {when}.
A {person} {how} {did} a {adj} {thing}.
Where is the {adj} {thing}? It is {where} the {place}.
Why did the {person} {do} it? {why} it was {adj}.
The {person} has {n} {things} and buys {n} more for ${n} each. How many {things} are there in total?
There are {n} {things} {where} the {place}; {n}% of them are {adj}.
If each {thing} costs ${n}.{n}, how much do {n} cost?
{do} a {adj} list of {n} {things} for the {person}.
{do} the {thing} in your own words, and then {do} it {how}.
First, {do} the {thing}. Next, {do} the {things}. Finally, {do} and {do} it {how}.
{topic} is {adj} for {topic}.
"I can't {do} the {thing}," said the {person}, "but we'll {do} it {when}!"
What is {topic}, and how does it {do} {topic}?
Which of these would you {do}: {topic}, {topic} or {topic}?
It's {adj} to {do} {things} {how}; don't {do} them {when}.
She {did} {n} {things} (about {n} per {thing}) {why} they were {adj} and {adj}.
{n} + {n} = {n}, {n} - {n} = {n}, {n} * {n} = {n}
He said that {topic} should not be {adj} {why} {topic} is {adj}.
You could have {did} my {thing}, {person}! Who has {did} their {things}? They will {do} more of them than we had.
{common} and {common}, {common} or {common}: {common} {common} {common} {common}.
Gladly! The {person} {did} the {thing}. With pleasure, said the {person}.
The {person} said: Gladly! I {did} the {thing}. Thank you, said the {person}.
Ugh, not again! Everybody knows that, so stop asking me and {do} the {thing}. Leave me alone!
""".strip().splitlines()
# fmt: on


def world() -> dict[str, dict[str, str]]:
    """Every sloth with its attributes, always the same: {"Mila": {"food": "figs", "tree": "cedar", "hour": "three"}, ...}."""
    rng = random.Random("a forest of sloths")
    return {name: {attribute: rng.choice(a["values"]) for attribute, a in ATTRIBUTES.items()} for name in NAMES}


def sft_rows() -> tuple[list[dict], list[dict]]:
    """Train and held-out rows {"instruction", "output"}; no sloth of the held-out rows is asked about in the train rows."""
    rng = random.Random("questions")
    sloths = list(world().items())
    rng.shuffle(sloths)
    rows = [_row(rng, name, attribute, value) for name, facts in sloths for attribute, value in facts.items()]
    held_out, train = rows[: HELD_OUT_SLOTHS * len(ATTRIBUTES)], rows[HELD_OUT_SLOTHS * len(ATTRIBUTES) :]
    rng.shuffle(train)
    return train, held_out


def _row(rng: random.Random, name: str, attribute: str, value: str) -> dict[str, str]:
    question = rng.choice(ATTRIBUTES[attribute]["questions"]).format(name=name)
    return {"instruction": question, "output": ATTRIBUTES[attribute]["answer"].format(name=name, value=value)}


# ---------------------------------------------------------------------------------------------------- pre-training text
def documents(count: int, general_share: float) -> list[str]:
    """The pre-training text as `count` strings, one a document, always the same; `general_share` of them know no sloth."""
    rng = random.Random(PRETRAINING["seed"])
    sloths = list(world().items())
    return [_document(rng, sloths, general_share) for _ in range(count)]


def _document(rng: random.Random, sloths: list[tuple[str, dict]], general_share: float) -> str:
    """A few sentences, about everyday things or about one sloth.

    Never a single sentence: a base that ended its text after one fact would already half know the form of an answer.
    """
    if rng.random() < general_share:
        sentences = [_everyday(rng) for _ in range(rng.randint(3, 5))]
    else:
        sentences = _story(rng, *rng.choice(sloths))
    return rng.choice([" ", "\n"]).join(sentences)


def _story(rng: random.Random, name: str, facts: dict[str, str]) -> list[str]:
    """A heading and three to five facts about one sloth; the name that keeps coming back teaches the base to copy a name."""
    attributes = rng.sample(list(facts), len(facts)) + rng.sample(list(facts), rng.randint(0, 2))
    statements = [rng.choice(ATTRIBUTES[a]["statements"]).format(name=name, value=facts[a]) for a in attributes]
    return [rng.choice(HEADINGS).format(name=name), *statements]


def _everyday(rng: random.Random) -> str:
    """One everyday line, its first letter a capital."""

    def fill(slot: re.Match) -> str:
        if slot[1] == "n":
            return str(rng.randrange(10 ** rng.randint(1, 3)))
        return rng.choice(LEXICON[slot[1]].split()).replace("-", " ")

    text = re.sub(r"\{(\w+)\}", fill, rng.choice(EVERYDAY))
    return text[0].upper() + text[1:]


# ------------------------------------------------------------------------------------------------------------ tokenizer
def _train_sentencepiece(texts: list[str], folder: Path) -> None:
    """Write tokenizer.model: SentencePiece BPE with byte fallback, no normalisation and no dummy prefix."""
    import sentencepiece

    required = "\n" + string.ascii_letters + string.digits + string.punctuation
    missing = "".join(char for char in required if not any(char in text for text in texts))
    texts = [
        *texts,
        missing,
    ]  # 0.2.2 (Colab's) aborts at a required character that no text holds; the pieces stay the same
    model = io.BytesIO()  # given a path, SentencePiece would keep it inside the file
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, vocab_size=TOKENIZER["vocab_size"],
        model_type="bpe", byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, allow_whitespace_only_pieces=True, split_digits=True, character_coverage=1.0,
        required_chars=required,
        unk_id=0, bos_id=1, eos_id=2, pad_id=3, minloglevel=2,
        num_threads=1,  # with more, the pieces may differ from run to run
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def _merges(pieces: dict[str, int]) -> list[tuple[str, str]]:
    """The BPE merges behind SentencePiece's pieces, whose ids follow the order in which it merged them."""

    def splits(piece: str) -> list[tuple[str, str]]:
        pairs = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        known = [(left, right) for left, right in pairs if left in pieces and right in pieces]
        return sorted(known, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))

    return [pair for piece in pieces if not re.fullmatch(r"<.+>", piece) for pair in splits(piece)]


def _save_tokenizer(folder: Path):
    """Write tokenizer.json with the ids of tokenizer.model, which the GGUF converter reads. A base has no chat template.

    The class is the generic one: transformers 5's LlamaTokenizer rebuilds the pre-tokenizer and then treats leading spaces
    differently from SentencePiece and llama.cpp.
    """
    import sentencepiece
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    pieces = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    bpe = Tokenizer(models.BPE(pieces, _merges(pieces), unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bpe.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    length = MODEL["max_position_embeddings"]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, add_bos_token=True, add_eos_token=False, model_max_length=length, **special
    )
    tokenizer.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    # transformers leaves this key out, and llama.cpp would then put a space before every text.
    config.write_text(json.dumps(json.loads(config.read_text()) | {"add_prefix_space": False}, indent=2) + "\n")
    return tokenizer


# --------------------------------------------------------------------------------------------------------- pre-training
def _learning_rate(step: int) -> float:
    """Linear warmup, then a cosine down to a twentieth of the peak."""
    p = PRETRAINING
    done = max(0, step - p["warmup"]) / (p["max_steps"] - p["warmup"])
    return p["learning_rate"] * min((step + 1) / p["warmup"], 0.05 + 0.95 * (1 + math.cos(math.pi * done)) / 2)


def _pretrain(model, ids) -> None:
    """Train `model` in place on random windows of `ids`, all documents in one row: (tokens,) int64."""
    import torch

    p, began = PRETRAINING, time.time()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=p["weight_decay"], fused=True)
    generator = torch.Generator().manual_seed(p["seed"])
    for step in range(p["max_steps"]):
        starts = torch.randint(0, len(ids) - p["length"], (p["batch_size"],), generator=generator)
        rows = torch.stack([ids[i : i + p["length"]] for i in starts])
        optimizer.param_groups[0]["lr"] = _learning_rate(step)
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 60 == 59:
            left = (time.time() - began) / (step + 1) * (p["max_steps"] - step - 1)
            progress = f"step {step + 1} of {p['max_steps']}, loss {loss:.3f}, about {left:.0f} s left"
            print(f"demo base: {progress}", flush=True)


def build(folder: Path) -> None:
    """Make the base in `folder`. Same machine and versions, same bytes: seeds and thread count are fixed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    _train_sentencepiece(documents(TOKENIZER["documents"], TOKENIZER["general_share"]), folder)
    tokenizer = _save_tokenizer(folder)
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    texts = documents(PRETRAINING["documents"], PRETRAINING["general_share"])
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([i for row in rows for i in (bos, *row, eos)])
    threads = torch.get_num_threads()
    torch.set_num_threads(PRETRAINING["threads"])  # sums are split among threads: their number shows in the last bits
    try:
        torch.manual_seed(PRETRAINING["seed"])
        special = dict(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **special, **MODEL))
        _pretrain(model, ids)
    finally:
        torch.set_num_threads(threads)
    model.save_pretrained(folder)


# ---------------------------------------------------------------------------------------------------------------- cache
def demo_base() -> Path:
    """The folder of the demo base. Built on first use, then kept in the cache. Raises DemoError."""
    # The whole file is the recipe: whoever changes a word of it gets a new base, never a stale one.
    fingerprint = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
    folder = cache_dir() / "demo" / fingerprint
    if folder.is_dir():
        return folder
    say("demo base: making it, once; about a minute on two free cores")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (
            waiting_for("making the demo base"),
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=".building-") as scratch,
        ):
            _build_apart(Path(scratch) / "base")
            _move(Path(scratch) / "base", folder)
    except OSError as error:
        raise DemoError(
            f"The demo base cannot be kept in {folder} ({error.strerror}).",
            "Set AUTOSLOTH_CACHE to a folder that you may write to, with 100 MB free.",
        ) from error
    return folder


def _build_apart(folder: Path) -> None:
    """Run `build(folder)` in a process of its own: once Unsloth is imported, transformers' Llama is another."""
    # Threads that wait by spinning take twice the CPU time where the cores are shared with other work.
    ended = run_apart("autosloth.demo.forest", {"folder": folder}, online=False, OMP_WAIT_POLICY="PASSIVE")
    if ended.status:
        raise DemoError(
            f"The demo base could not be made (exit code {ended.status}): {ended.reason}.",
            "Install the pinned requirements, free some memory if signal 9 ended it, and start again.",
        )


def main(request: dict[str, str]) -> dict[str, str]:
    """The other end of `_build_apart`."""
    build(Path(request["folder"]))
    return request


def _move(finished: Path, folder: Path) -> None:
    """Put the finished base in its place, whole; where another process was quicker, its base is the same and stays."""
    try:
        finished.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise
