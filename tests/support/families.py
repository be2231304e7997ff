"""The families of models that people fine-tune, tiny, with the classes and the names of layers that their own config classes make."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from support.tiny_models import corpus_ids, describe_added_tokens, grown, teach, tiny_tokenizer

SIZES = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
SIZES |= dict(max_position_embeddings=512, vocab_size=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
HEADS = dict(head_dim=16)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
ROUTED = dict(
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1
)
LATENT = dict(
    num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=32
)
DELTA = dict(
    num_hidden_layers=4,
    layer_types=["linear_attention"] * 3 + ["full_attention"],
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
)
MAMBA = dict(
    layer_types=["mamba", "attention"],
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_n_groups=1,
    mamba_d_state=16,
    mamba_expand=2,
    mamba_chunk_size=64,
)
MAMBA_TYPES = dict(layer_types=["mamba", "attention"])  # which transformers writes in other words
SCALED = dict(embedding_multiplier=2.0, logits_scaling=0.5, residual_multiplier=0.5, attention_multiplier=0.25)
GRANITE = dict(**SCALED, tie_word_embeddings=True, shared_intermediate_size=64)
ROUTED_LOCALLY = dict(num_local_experts=4, num_experts_per_tok=2)
DENSE = dict(num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=128)
SLIDING = dict(sliding_window=64, layer_types=["sliding_attention", "full_attention"])
EVERY_FOURTH = dict(num_hidden_layers=4, sliding_window=64, layer_types=["sliding_attention"] * 3 + ["full_attention"])
SEEN = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
)
QWEN_SEEN = dict(
    depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, num_position_embeddings=16
)
GEMMA = dict(**HEADS, sliding_window=64, query_pre_attn_scalar=16, tie_word_embeddings=True)
# llama.cpp takes for granted that each sixth layer of Gemma 3 is of full attention, and each fifth of Gemma 3n; sparse are its first ten.
GEMMA3 = dict(**GEMMA, num_hidden_layers=6, layer_types=["sliding_attention"] * 5 + ["full_attention"])
GEMMA3N = dict(
    **GEMMA,
    num_hidden_layers=5,
    layer_types=["sliding_attention"] * 4 + ["full_attention"],
    num_kv_shared_layers=0,
    hidden_size_per_layer_input=256,
    laurel_rank=64,
    altup_num_inputs=4,
    activation_sparsity_pattern=[0.95] * 5,
    vocab_size_per_layer_input=256,
)
GEMMA4 = dict(**HEADS, **SLIDING, global_head_dim=32, num_kv_shared_layers=0, tie_word_embeddings=True)
GEMMA4_SEEN = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16
)
MROPE = dict(
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
    head_dim=32,
)
YARN = dict(
    rope_parameters={
        "rope_type": "yarn",
        "rope_theta": 1e6,
        "factor": 16.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 64,
        "llama_4_scaling_beta": 0.1,
    }
)
LONG_ROPE = dict(
    original_max_position_embeddings=256,
    partial_rotary_factor=0.75,
    rope_parameters={
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
        "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
    },
)
LLAMA3_ROPE = dict(
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    tie_word_embeddings=True,
)
MULTIPLIED = dict(
    embedding_multiplier=2.0,
    lm_head_multiplier=0.5,
    key_multiplier=0.7,
    attention_in_multiplier=0.9,
    attention_out_multiplier=1.1,
    ssm_in_multiplier=1.2,
    ssm_out_multiplier=0.8,
    mlp_multipliers=[0.8, 0.6],
    ssm_multipliers=[0.5, 0.6, 0.7, 0.8, 0.9],
)
GLM = (
    "<|endoftext|>",
    "[gMASK]",
    "<sop>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|observation|>",
)

ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
LLAMA = f"{ATTENTION} mlp.gate_proj mlp.up_proj mlp.down_proj"
FUSED = "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj"
STACKED = "experts.gate_up_proj experts.down_proj"
DELTA_NET = (
    "linear_attn.in_proj_qkv linear_attn.in_proj_z linear_attn.in_proj_a linear_attn.in_proj_b linear_attn.out_proj"
)
SHARED = "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert.down_proj"
MLA = "self_attn.q_a_proj self_attn.q_b_proj self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj self_attn.o_proj"
SHORT_CONV = "conv.in_proj conv.out_proj feed_forward.w1 feed_forward.w2 feed_forward.w3 self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj"


def stacked(block):
    """The experts' parameters in a block of this name."""
    return " ".join(f"{block}.{name}" for name in STACKED.split())


class Family(NamedTuple):
    """A family: its class in transformers and that of its config, the layers that are trained, what its config and its vision part need, its vocabulary.

    special: tokens that its converter looks for; tokenizer, config: entries of tokenizer_config.json and config.json that its models on the
    Hub have and transformers does not write; padded: whether there are more embeddings than tokens; shards: whether its files are several; gguf: whether llama.cpp reads its GGUF; ahead: the entry of config.json that
    counts the blocks which predict further tokens, of which the files then hold one, though transformers loads none.
    """

    kind: str
    config_kind: str
    layers: str
    needs: dict[str, Any] = {}
    seen: dict[str, Any] | None = None
    words: str = "small-llama-bpe"
    special: tuple[str, ...] = ()
    tokenizer: dict[str, Any] = {}
    config: dict[str, Any] = {}
    padded: bool = True
    shards: bool = False
    gguf: bool = True
    ahead: str | None = None


def causal(name, layers, **more):
    """A family whose classes are called as most are."""
    return Family(f"{name}ForCausalLM", f"{name}Config", layers, **more)


def wrapper(name, layers, seen, **more):
    """A multimodal family."""
    return Family(f"{name}ForConditionalGeneration", f"{name}Config", layers, seen=seen, **more)


FAMILIES = {
    "Llama 3": causal("Llama", LLAMA, needs=LLAMA3_ROPE, words="llama-bpe"),
    "Llama 2": causal("Llama", LLAMA, words="spm-prefix"),
    "Mistral": causal("Mistral", LLAMA, needs=dict(sliding_window=None), words="spm", shards=True),
    "Qwen 2.5": causal("Qwen2", LLAMA, needs=dict(tie_word_embeddings=True), words="small-qwen2"),
    "Qwen 3": causal("Qwen3", LLAMA, needs=HEADS, words="qwen2"),
    "Qwen 3 MoE": causal("Qwen3Moe", f"{ATTENTION} {stacked('mlp')}", needs=HEADS | EXPERTS | dict(norm_topk_prob=True), words="small-qwen2"),
    "Qwen 3 Next": causal("Qwen3Next", f"{ATTENTION} linear_attn.in_proj_qkvz linear_attn.in_proj_ba linear_attn.out_proj {SHARED} {stacked('mlp')}",
                          needs=EXPERTS | DELTA | dict(head_dim=32, shared_expert_intermediate_size=32, partial_rotary_factor=0.25), words="small-qwen2", ahead="mtp_num_hidden_layers"),
    "Qwen 3.5": wrapper("Qwen3_5", f"{LLAMA} {DELTA_NET}", QWEN_SEEN, needs=DELTA | MROPE, words="small-qwen2", ahead="mtp_num_hidden_layers"),
    "Qwen 3.5 text": Family("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", f"{LLAMA} {DELTA_NET}", needs=DELTA | MROPE, words="small-qwen2", config=dict(mtp_num_hidden_layers=1)),
    "Qwen 3.5 MoE": wrapper("Qwen3_5Moe", f"{ATTENTION} {DELTA_NET} {SHARED} {stacked('mlp')}", QWEN_SEEN,
                            needs=DELTA | MROPE | EXPERTS | dict(shared_expert_intermediate_size=32), words="small-qwen2", ahead="mtp_num_hidden_layers"),
    "Gemma 2": causal("Gemma2", LLAMA, needs=GEMMA, words="spm"),
    "Gemma 3": wrapper("Gemma3", LLAMA, SEEN, needs=GEMMA3, words="spm"),
    "Gemma 3 text": Family("Gemma3ForCausalLM", "Gemma3TextConfig", LLAMA, needs=GEMMA3, words="spm"),
    "Gemma 3n text": Family("Gemma3nForCausalLM", "Gemma3nTextConfig", f"{LLAMA} laurel.linear_left laurel.linear_right per_layer_input_gate per_layer_projection", needs=GEMMA3N, words="spm"),
    "Gemma 4": wrapper("Gemma4", f"{LLAMA} per_layer_input_gate per_layer_projection", GEMMA4_SEEN,
                       needs=GEMMA4 | dict(hidden_size_per_layer_input=32, vocab_size_per_layer_input=256), words="spm-lines", padded=False),
    "Gemma 4 MoE": wrapper("Gemma4", f"{LLAMA} {STACKED}", GEMMA4_SEEN,
                           needs=GEMMA4 | dict(hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32), words="spm-lines", padded=False),
    "gpt-oss": causal("GptOss", f"{ATTENTION} {stacked('mlp')}", needs=HEADS | SLIDING | ROUTED_LOCALLY | dict(intermediate_size=64), words="small-qwen2"),
    "Llama 4 text": Family("Llama4ForCausalLM", "Llama4TextConfig", f"{ATTENTION} feed_forward.shared_expert.gate_proj feed_forward.shared_expert.up_proj feed_forward.shared_expert.down_proj {stacked('feed_forward')}",
                           needs=HEADS | dict(intermediate_size_mlp=128, num_local_experts=2, num_experts_per_tok=1, interleave_moe_layer_step=1, attention_chunk_size=64, num_hidden_layers=4)),
    "Mistral Small 3.1": wrapper("Mistral3", LLAMA, SEEN | HEADS | dict(model_type="pixtral"), needs=HEADS | dict(model_type="mistral", sliding_window=None), words="spm"),
    "Ministral 3": wrapper("Mistral3", LLAMA, SEEN | HEADS | dict(model_type="pixtral"), needs=HEADS | YARN | dict(model_type="ministral3", sliding_window=None, tie_word_embeddings=True), words="spm"),
    "SmolLM 3": causal("SmolLM3", LLAMA, needs=dict(num_hidden_layers=4, tie_word_embeddings=True)),
    "Phi 3": causal("Phi3", FUSED, needs=dict(sliding_window=None, original_max_position_embeddings=512), words="spm-prefix"),
    "Phi 4": causal("Phi3", FUSED, needs=dict(sliding_window=None, original_max_position_embeddings=512), words="small-qwen2", tokenizer=dict(tokenizer_class="GPT2Tokenizer")),
    "Phi 4 mini": causal("Phi3", FUSED, needs=LONG_ROPE | dict(sliding_window=None, tie_word_embeddings=True), words="small-qwen2", tokenizer=dict(tokenizer_class="GPT2Tokenizer")),
    "Granite 4 H": causal("GraniteMoeHybrid", f"{ATTENTION} mamba.in_proj shared_mlp.input_linear shared_mlp.output_linear {stacked('block_sparse_moe')}",
                          needs=MAMBA | GRANITE | ROUTED_LOCALLY | dict(position_embedding_type=None), config=MAMBA_TYPES),
    "Granite 4 H, dense": causal("GraniteMoeHybrid", f"{ATTENTION} mamba.in_proj shared_mlp.input_linear shared_mlp.output_linear", needs=MAMBA | GRANITE | DENSE | dict(position_embedding_type=None), config=MAMBA_TYPES),
    "Granite 4, dense": causal("GraniteMoeHybrid", f"{ATTENTION} shared_mlp.input_linear shared_mlp.output_linear",
                               needs=MAMBA | GRANITE | DENSE | dict(layer_types=["attention"] * 2, position_embedding_type="rope"), config=dict(layer_types=["attention"] * 2)),
    "LFM 2": causal("Lfm2", SHORT_CONV, needs=dict(layer_types=["conv", "full_attention"], conv_L_cache=3, block_auto_adjust_ff_dim=False, tie_word_embeddings=True)),
    "LFM 2 MoE": causal("Lfm2Moe", f"{SHORT_CONV} {stacked('feed_forward')}", needs=EXPERTS | dict(layer_types=["conv", "full_attention"], conv_L_cache=3, num_dense_layers=1, tie_word_embeddings=True)),
    "OLMo 3": causal("Olmo3", LLAMA, needs=EVERY_FOURTH),
    "Command R7B": causal("Cohere2", LLAMA, needs=HEADS | EVERY_FOURTH | dict(logit_scale=0.25, tie_word_embeddings=True), config=dict(rotary_pct=1.0)),
    "GLM 4": causal("Glm4", f"{ATTENTION} mlp.gate_up_proj mlp.down_proj", needs=dict(head_dim=32, partial_rotary_factor=0.5), special=GLM),
    "GLM 4.5": causal("Glm4Moe", f"{LLAMA} mlp.shared_experts.gate_proj mlp.shared_experts.up_proj mlp.shared_experts.down_proj {stacked('mlp')}",
                      needs=ROUTED | dict(head_dim=32, first_k_dense_replace=1, partial_rotary_factor=0.5, use_qk_norm=True), special=GLM),
    "EXAONE 4": causal("Exaone4", LLAMA, needs=HEADS | dict(sliding_window=None, sliding_window_pattern=None, layer_types=["full_attention"] * 2)),
    "Falcon H1": causal("FalconH1", f"{ATTENTION} mamba.in_proj feed_forward.gate_proj feed_forward.up_proj feed_forward.down_proj",
                        needs=HEADS | dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16, mamba_d_conv=4, mamba_chunk_size=64, mamba_rms_norm=False, **MULTIPLIED)),
    "ERNIE 4.5": causal("Ernie4_5", LLAMA, needs=HEADS | dict(tie_word_embeddings=True), words="spm"),
    "DeepSeek V3": causal("DeepseekV3", f"{MLA} mlp.gate_proj mlp.up_proj mlp.down_proj mlp.shared_experts.gate_proj mlp.shared_experts.up_proj mlp.shared_experts.down_proj {stacked('mlp')}",
                          needs=ROUTED | LATENT | dict(first_k_dense_replace=1)),
    "Mixtral": causal("Mixtral", f"{ATTENTION} {stacked('mlp')}", needs=ROUTED_LOCALLY | dict(sliding_window=None), words="spm"),
    "Nemotron H": causal("NemotronH", "mixer.in_proj mixer.q_proj mixer.k_proj mixer.v_proj mixer.o_proj mixer.up_proj mixer.down_proj",
                         needs=HEADS | dict(num_hidden_layers=3, hybrid_override_pattern="M*-", mamba_num_heads=8, mamba_head_dim=16, n_groups=1, ssm_state_size=16, conv_kernel=4, chunk_size=64), gguf=False),
    "GPT 2": Family("GPT2LMHeadModel", "GPT2Config", "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj", needs=dict(n_embd=64, n_layer=2, n_head=4, n_positions=512), config=dict(n_ctx=512)),
}  # fmt: skip


# name: (class of the model, class of its config, what its config needs, what `check` says)
REFUSED = {
    "T5: an encoder with a decoder": ("T5ForConditionalGeneration", "T5Config", dict(d_model=64, num_layers=2, num_heads=4, d_ff=128, d_kv=16), "is a T5ForConditionalGeneration, which does not go on from a text"),
    "BERT: a classifier": ("BertForSequenceClassification", "BertConfig", SIZES, "is a BertForSequenceClassification, which does not go on from a text"),
    "NanoChat: no form in llama.cpp": ("NanoChatForCausalLM", "NanoChatConfig", SIZES, "it does not know its architecture (NanoChatForCausalLM)"),
    "Gemma 3n with eyes and ears, where the library timm is missing": ("Gemma3nForConditionalGeneration", "Gemma3nConfig", dict(text_config=SIZES | GEMMA3N), "needs a library that is not installed here"),
}  # fmt: skip


def config_of(family, **sizes):
    """The config of a family; sizes: in place of SIZES."""
    import transformers

    told = FAMILIES[family]
    rows = {"vocab_size_per_layer_input": sizes["vocab_size"]} if "vocab_size" in sizes and "vocab_size_per_layer_input" in told.needs else {}  # fmt: skip
    text = {**SIZES, **told.needs, **sizes, **rows}
    make = getattr(transformers, told.config_kind)
    if told.seen is None:
        return make(**text)
    config = make(text_config=text, vision_config=told.seen)
    config.tie_word_embeddings = text.get("tie_word_embeddings", False)
    return config


def without_weights(family, **sizes):
    """A model of a family that has shapes and no numbers; sizes: in place of SIZES."""
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, FAMILIES[family].kind)(config_of(family, **sizes))


def tiny_family(family, folder, steps=60):
    """Fill `folder` with a model of a family in bfloat16, trained for a moment, and its tokenizer, as they stand on the Hub; returns the folder."""
    import torch
    import transformers

    told, make = FAMILIES[family], getattr(transformers, FAMILIES[family].kind)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = family_tokenizer(told, folder)
    special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(0)
    used, places = corpus_ids(tokenizer)
    none = dict(pad_token_id=0 if told.seen else None, bos_token_id=None, eos_token_id=None)  # Gemma 4 asks for one
    small = make(config_of(family, vocab_size=len(used) + 1, **none)).eval()
    teach(small, places, steps)
    pad = 64 if told.padded else 1
    model = make(config_of(family, vocab_size=-(-len(tokenizer) // pad) * pad, **special))
    rows = model.get_input_embeddings().num_embeddings
    tables = ("embed", "lm_head", "wte")
    taught = small.state_dict().items()
    model.load_state_dict(
        {name: grown(weight, used, rows) if any(part in name for part in tables) else weight for name, weight in taught}
    )
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="200KB" if told.shards else "5GB")
    edit(folder / "config.json", told.config)
    if told.ahead:
        look_ahead(folder, told.ahead)
    return folder


def look_ahead(folder, entry):
    """Add a block for multi-token prediction to the files of a model, made of its last block, as Qwen 3.5's on the Hub have it."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    start, last = max(
        re.match(r"(model\.(?:language_model\.)?layers\.)(\d+)\.", name).groups()
        for name in weights
        if ".layers." in name and "visual" not in name
    )
    block = {
        name.removeprefix(f"{start}{last}."): weight
        for name, weight in weights.items()
        if name.startswith(f"{start}{last}.")
    }
    width = block["input_layernorm.weight"].numel()
    weights |= {f"mtp.layers.0.{name}": weight.clone() for name, weight in block.items()}
    weights |= {
        f"mtp.{name}.weight": torch.ones(width, dtype=torch.bfloat16)
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    }
    weights["mtp.fc.weight"] = (
        torch.randn(width, 2 * width, generator=torch.Generator().manual_seed(1)).mul(0.1).bfloat16()
    )
    save_file(weights, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config.get("text_config", config)[entry] = 1
    edit(folder / "config.json", config)


def family_tokenizer(told, folder):
    """Write the tokenizer of a family; returns it."""
    from transformers import AddedToken

    tokenizer = tiny_tokenizer(told.words, folder)
    if told.special:
        tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in told.special])
        tokenizer.save_pretrained(folder)
        describe_added_tokens(tokenizer, folder, told.words)
    edit(folder / "tokenizer_config.json", told.tokenizer)
    return tokenizer


def edit(path: Path, entries: dict[str, Any]) -> None:
    """Set entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries, indent=1, ensure_ascii=False))
