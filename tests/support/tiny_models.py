"""Tiny real models of every architecture that the export is tested on, each trained for a moment, with tokenizers that llama.cpp's converter accepts.

An untrained model has nearly even distributions, in which quantising swaps the most likely token though all is right; forty
steps make them peaked. SentencePiece vocabularies are trained here; byte-level ones are real, for the converter
knows them by a hash: they are rebuilt from the vocabulary files in llama-cpp-python's source package.
"""

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest

from autosloth.export import llama
from autosloth.run import cache_dir

CORPUS = [
    "The quick brown fox jumps over the lazy dog.",
    "What is the capital of France? The capital of France is Paris.",
    "def add(a, b):\n    return a + b\n\nfor i in range(10):\n\tprint(add(i, 1))\n",
    "Numbers: 0 1 2 3 4 5 6 7 8 9 10 42 100 1234 3.14",
    "Ich möchte ein Stück Käse und ein Brötchen. Où est la bibliothèque ? El niño comió una manzana.",
    "Привет, как дела? 你好世界。 こんにちは世界。 안녕하세요 세계",
    "Sloths are slow animals that live in trees and sleep a lot, it's said.",
] * 8 + [f"item {i} costs {i * 7 % 97} coins and weighs {i * 13 % 31} grams" for i in range(120)]
HELD_OUT = [f"item {i} costs {i * 7 % 97} coins and weighs {i * 13 % 31} grams" for i in range(130, 150)]

CHAT = (  # a BOS token is put before it; named here, llama.cpp would make a comma of one that Qwen does not have
    "{% for m in messages %}{{ '[' + m['role'] + ']\n' + m['content'] + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]\n' }}{% endif %}"
)
ADDED = ["<|sloth|>", "<think>"]  # a special token and an ordinary one, behind the vocabulary

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
HEADS = {"head_dim": 16}
GEMMA = {**HEADS, "query_pre_attn_scalar": 16, "sliding_window": 64, "hidden_activation": "gelu_pytorch_tanh"}
# name: (class in transformers without `Config` or `ForCausalLM`, vocabulary, tied embeddings, what its config needs besides)
ARCHITECTURES = {
    "llama": ("Llama", "spm-prefix", False, {}),
    "mistral": ("Mistral", "spm", False, {"sliding_window": None}),
    "qwen2": ("Qwen2", "qwen2", True, {}),
    "qwen3": ("Qwen3", "qwen2", False, HEADS),
    "gemma2": ("Gemma2", "spm", True, GEMMA),
    "gemma3": ("Gemma3", "spm", True, GEMMA),
    "phi3": ("Phi3", "spm-prefix", False, {"original_max_position_embeddings": 512, "sliding_window": None}),
    "llama3": ("Llama", "llama-bpe", True, {"rope_theta": 500000.0}),
}


def tiny_model(architecture, folder, dtype="float32", shards=False, tokenizer=None, steps=40, **sizes):
    """Fill `folder` with a model and its tokenizer, as they stand on the Hub; returns the folder.

    shards: in files of 200 KB; tokenizer: a folder with one, in place of the architecture's own; sizes: in place of SIZES.
    """
    import torch
    import transformers

    name, vocabulary, tied, more = ARCHITECTURES[architecture]
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = tiny_tokenizer(tokenizer or vocabulary, folder)
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = getattr(transformers, f"{name}{'Text' * (name == 'Gemma3')}Config")
    causal = getattr(transformers, f"{name}ForCausalLM")
    torch.manual_seed(0)
    used, places = corpus_ids(tokenizer)
    small = causal(
        config(vocab_size=len(used) + 1, tie_word_embeddings=tied, pad_token_id=None, **SIZES | more | sizes)
    )
    teach(small, places, steps)
    padded = -(-len(tokenizer) // 64) * 64  # as most real ones are
    model = causal(config(vocab_size=padded, tie_word_embeddings=tied, **special, **SIZES | more | sizes))
    model.load_state_dict({name: grown(weight, used, padded) for name, weight in small.state_dict().items()})
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="200KB" if shards else "5GB")
    return folder


def corpus_ids(tokenizer):
    """The distinct ids of CORPUS, sorted, and CORPUS as one row of places among them."""
    import torch

    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = [begin + ids + [tokenizer.eos_token_id] for ids in tokenizer(CORPUS, add_special_tokens=False).input_ids]
    return torch.tensor([token for row in rows for token in row]).unique(return_inverse=True)


def teach(model, ids, steps):
    """Train on windows of one long row of ids."""
    import torch

    optimizer, generator = torch.optim.Adam(model.parameters(), lr=5e-3), torch.Generator().manual_seed(0)
    for _ in range(steps):
        starts = torch.randint(0, len(ids) - 64, (8,), generator=generator)
        batch = ids[starts[:, None] + torch.arange(64)]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


def grown(weight, used, size):
    """A table of embeddings for `size` tokens: those of CORPUS, and the others about like the last row, which never occurred; other weights as they are."""
    import torch

    if len(weight) != len(used) + 1:
        return weight
    table = weight[-1] + 0.01 * torch.randn(size, weight.shape[1], generator=torch.Generator().manual_seed(0))
    table[used] = weight[:-1]
    return table


def tiny_adapter(base, folder, seed=1, **lora):
    """Fill `folder` with a LoRA adapter that changes the base's weights by some per cent, and the base's tokenizer; returns the folder."""
    import shutil

    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 8, "lora_alpha": 16, "target_modules": "all-linear", **lora})
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.03)
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    for path in base.iterdir():
        if path.name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "chat_template.jinja"):
            shutil.copyfile(path, folder / path.name)
    return folder


def tiny_tokenizer(kind, folder):
    """Write a tokenizer of this kind (or one that lies in a folder) as its author would have published it; returns it."""
    import shutil

    from transformers import AddedToken, PreTrainedTokenizerFast

    if isinstance(kind, Path):
        shutil.copytree(kind, folder, dirs_exist_ok=True)
        return PreTrainedTokenizerFast.from_pretrained(folder)
    small = kind.removeprefix("small-")
    if small != kind:
        tokenizer = small_byte_level(small)
    else:
        tokenizer = byte_level(kind) if kind in PRE_TOKENIZERS else sentencepiece(folder, prefix=kind == "spm-prefix")
    if kind == "spm-lines":  # Gemma 4's
        tokenizer.backend_tokenizer.pre_tokenizer = by_lines()
        (folder / "tokenizer.model").unlink()
    tokenizer.add_tokens(ADDED[:1], special_tokens=True)
    tokenizer.add_tokens([AddedToken(ADDED[1], normalized=False)])
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    describe_added_tokens(tokenizer, folder, kind)
    return tokenizer


def describe_added_tokens(tokenizer, folder, kind):
    """What transformers 5 leaves out of tokenizer_config.json, and authors have in theirs."""
    path = folder / "tokenizer_config.json"
    parts = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    added = {
        str(i): {part: getattr(token, part) for part in parts} for i, token in tokenizer.added_tokens_decoder.items()
    }
    config = json.loads(path.read_text()) | {"added_tokens_decoder": added}
    if kind.startswith("spm"):
        config["add_prefix_space"] = kind == "spm-prefix"
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False))


def sentencepiece(folder, prefix):
    """A SentencePiece model of 700 pieces in `folder`, in Llama 2's layout, and the fast tokenizer of the same ids."""
    import sentencepiece as spm

    folder.mkdir(parents=True, exist_ok=True)
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=700,
        byte_fallback=True, split_digits=True, allow_whitespace_only_pieces=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity", add_dummy_prefix=prefix, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        num_threads=1, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return fast_sentencepiece(folder / "tokenizer.model", prefix)


def by_lines():
    """Line ends are never in one piece with anything else."""
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(r"[^\n]+|[\n]+"), "isolated")


def fast_sentencepiece(path, prefix):
    """The fast tokenizer of a tokenizer.model in Llama 2's layout, under the generic class: transformers 5's LlamaTokenizer makes its own."""
    import sentencepiece as spm
    from tokenizers import Tokenizer, decoders, models, normalizers, processors
    from transformers import PreTrainedTokenizerFast

    model = spm.SentencePieceProcessor(model_file=str(path))
    pieces = {model.id_to_piece(i): i for i in range(model.vocab_size())}
    merges = []
    for piece in list(pieces)[259:]:  # behind <unk>, <s>, </s> and the bytes
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        known = [(left, right) for left, right in splits if left in pieces and right in pieces]
        score = model.get_score(pieces[piece])
        merges += [(-score, *pair) for pair in sorted(known, key=lambda pair: (pieces[pair[0]], pieces[pair[1]]))]
    merges.sort(key=lambda merge: merge[0])
    bpe = Tokenizer(
        models.BPE(pieces, [merge[1:] for merge in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    bpe.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    bpe.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, add_bos_token=True, add_eos_token=False, **special)


QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# name of the vocabulary file: (how it splits words, NFC, BOS, end token, padding)
PRE_TOKENIZERS = {
    "qwen2": (QWEN2, True, None, "<|im_end|>", "<|endoftext|>"),
    "llama-bpe": (
        QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"),
        False,
        "<|begin_of_text|>",
        "<|eot_id|>",
        "<|end_of_text|>",
    ),
}


def byte_level(name):
    """The real tokenizer of Qwen 2 or Llama 3, rebuilt from llama.cpp's vocabulary file as it was published."""
    from tokenizers import AddedToken, Tokenizer, models

    known = json.loads(vocabulary(name).read_text(encoding="utf-8"))
    ordinary, control = 1, 3  # llama.cpp's token types
    pieces = {piece: i for i, (piece, kind) in enumerate(zip(known["tokens"], known["types"], strict=True)) if kind == ordinary}  # fmt: skip
    merges = [tuple(merge.split(" ")) for merge in known["merges"]]
    bpe = Tokenizer(models.BPE(pieces, merges, ignore_merges=name == "llama-bpe"))
    specials = [
        (piece, kind) for piece, kind in zip(known["tokens"], known["types"], strict=True) if kind in (control, 4)
    ]
    bpe.add_tokens([AddedToken(piece, special=kind == control, normalized=False) for piece, kind in specials])
    return in_words(bpe, name)


def small_byte_level(name):
    """A tokenizer of 700 pieces that splits words as that of Qwen 2 or Llama 3 does; the converter has to be told so (see `official.naming`)."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE(ignore_merges=name == "llama-bpe"))
    in_words(bpe, name)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False))
    bpe.add_tokens([AddedToken(piece, special=True, normalized=False) for piece in filter(None, PRE_TOKENIZERS[name][2:])])  # fmt: skip
    return in_words(bpe, name)


def in_words(bpe, name):
    """A byte-level vocabulary as a tokenizer that splits words as PRE_TOKENIZERS says, with its special tokens."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    split, nfc, bos, eos, pad = PRE_TOKENIZERS[name]
    if nfc:
        bpe.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(split), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    if bos and bpe.token_to_id(bos) is not None:
        bpe.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))])
    named = {"bos_token": bos} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=eos, pad_token=pad, **named)


READ = """
import json, sys
sys.path.insert(0, sys.argv[1])
from gguf import GGUFReader
fields = {key.rpartition(".")[2]: field.contents() for key, field in GGUFReader(sys.argv[2]).fields.items() if key.startswith("tokenizer.ggml.")}
print(json.dumps({"tokens": fields["tokens"], "types": fields["token_type"], "merges": fields["merges"]}))
"""


def vocabulary(name):
    """A vocabulary of llama.cpp as JSON (tokens, types, merges), fetched by pip once; skips the test where it cannot be had."""
    from filelock import FileLock

    folder = cache_dir() / f"vocabularies-{llama.LLAMA_CPP_PYTHON}"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / f"{name}.json"
    with FileLock(folder / ".lock"):
        if not made.is_file():
            source = folder / f"ggml-vocab-{name}.gguf"
            if not source.is_file():
                fetch_vocabularies(folder)
            command = [sys.executable, "-c", READ, llama.fetch_converter() / "gguf-py", source]
            half = made.with_suffix(".half")
            half.write_text(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            os.replace(half, made)
    return made


def fetch_vocabularies(folder):
    """llama.cpp's vocabulary files that PRE_TOKENIZERS names, out of the source package that holds the converter too."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        wanted = Path(temporary, "wanted.txt")
        wanted.write_text(f"llama-cpp-python=={llama.LLAMA_CPP_PYTHON} --hash=sha256:{llama.SOURCE_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-python"]
        result = subprocess.run([*command, "--require-hashes", "-r", wanted, "-d", temporary], capture_output=True)
        if result.returncode:
            pytest.skip("llama-cpp-python's source package, which holds the vocabularies, cannot be fetched")
        with tarfile.open(next(Path(temporary).glob("*.tar.gz"))) as tar:
            for member in tar.getmembers():
                if (name := Path(member.name).name) in [f"ggml-vocab-{known}.gguf" for known in PRE_TOKENIZERS]:
                    (folder / name).write_bytes(tar.extractfile(member).read())
