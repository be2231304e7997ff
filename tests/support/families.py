"""The families of models that people fine-tune, tiny, with the classes and the names of layers that their own config classes make."""

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
)
GRANITE = dict(shared_intermediate_size=64, num_local_experts=4, num_experts_per_tok=2)
DENSE = dict(num_local_experts=0, num_experts_per_tok=0)
SLIDING = dict(sliding_window=64, layer_types=["sliding_attention", "full_attention"])
SEEN = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
)
QWEN_SEEN = dict(
    depth=1, hidden_size=32, intermediate_size=64, num_heads=2, out_hidden_size=64, num_position_embeddings=16
)
GEMMA4 = dict(**HEADS, **SLIDING, global_head_dim=32, num_kv_shared_layers=0)
GEMMA4_SEEN = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16
)
MROPE = dict(
    rope_parameters={
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
    },
    head_dim=32,
)

ATTENTION = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
LLAMA = f"{ATTENTION} mlp.gate_proj mlp.up_proj mlp.down_proj"
STACKED = "experts.gate_up_proj experts.down_proj"
DELTA_NET = (
    "linear_attn.in_proj_qkv linear_attn.in_proj_z linear_attn.in_proj_a linear_attn.in_proj_b linear_attn.out_proj"
)
SHARED = "mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert.down_proj"
MLA = "self_attn.q_a_proj self_attn.q_b_proj self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj self_attn.o_proj"


def stacked(block):
    """The experts' parameters in a block of this name."""
    return " ".join(f"{block}.{name}" for name in STACKED.split())


# name: (class of the model, class of its config, what its config needs, what the vision part needs, the layers that are trained)
FAMILIES = {
    "Llama 3": ("LlamaForCausalLM", "LlamaConfig", {}, None, LLAMA),
    "Mistral": ("MistralForCausalLM", "MistralConfig", {}, None, LLAMA),
    "Qwen 3": ("Qwen3ForCausalLM", "Qwen3Config", HEADS, None, LLAMA),
    "Qwen 3 MoE": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", HEADS | EXPERTS, None, f"{ATTENTION} {stacked('mlp')}"),
    "Qwen 3 Next": ("Qwen3NextForCausalLM", "Qwen3NextConfig", EXPERTS | DELTA | dict(head_dim=32, shared_expert_intermediate_size=32), None,
                    f"{ATTENTION} linear_attn.in_proj_qkvz linear_attn.in_proj_ba linear_attn.out_proj {SHARED} {stacked('mlp')}"),
    "Qwen 3.5": ("Qwen3_5ForConditionalGeneration", "Qwen3_5Config", DELTA | MROPE, QWEN_SEEN, f"{LLAMA} {DELTA_NET}"),
    "Qwen 3.5 text": ("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", DELTA | MROPE, None, f"{LLAMA} {DELTA_NET}"),
    "Qwen 3.5 MoE": ("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeConfig", DELTA | MROPE | EXPERTS | dict(shared_expert_intermediate_size=32), QWEN_SEEN,
                     f"{ATTENTION} {DELTA_NET} {SHARED} {stacked('mlp')}"),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", HEADS, None, LLAMA),
    "Gemma 3": ("Gemma3ForConditionalGeneration", "Gemma3Config", HEADS | SLIDING, SEEN, LLAMA),
    "Gemma 3 text": ("Gemma3ForCausalLM", "Gemma3TextConfig", HEADS | SLIDING, None, LLAMA),
    "Gemma 3n text": ("Gemma3nForCausalLM", "Gemma3nTextConfig", HEADS | SLIDING | dict(num_kv_shared_layers=0, hidden_size_per_layer_input=32, laurel_rank=32, altup_num_inputs=4, activation_sparsity_pattern=[0.0] * 2, vocab_size_per_layer_input=256), None,
                      f"{LLAMA} laurel.linear_left laurel.linear_right per_layer_input_gate per_layer_projection"),
    "Gemma 4": ("Gemma4ForConditionalGeneration", "Gemma4Config", GEMMA4 | dict(hidden_size_per_layer_input=32, vocab_size_per_layer_input=256), GEMMA4_SEEN,
                f"{LLAMA} per_layer_input_gate per_layer_projection"),
    "Gemma 4 MoE": ("Gemma4ForConditionalGeneration", "Gemma4Config", GEMMA4 | dict(hidden_size_per_layer_input=0, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32), GEMMA4_SEEN,
                    f"{LLAMA} {STACKED}"),
    "gpt-oss": ("GptOssForCausalLM", "GptOssConfig", HEADS | SLIDING | dict(num_local_experts=4, num_experts_per_tok=2), None, f"{ATTENTION} {stacked('mlp')}"),
    "Llama 4 text": ("Llama4ForCausalLM", "Llama4TextConfig", HEADS | dict(intermediate_size_mlp=128, num_local_experts=2, num_experts_per_tok=1, interleave_moe_layer_step=1), None,
                     f"{ATTENTION} feed_forward.shared_expert.gate_proj feed_forward.shared_expert.up_proj feed_forward.shared_expert.down_proj {stacked('feed_forward')}"),
    "Mistral Small 3.1": ("Mistral3ForConditionalGeneration", "Mistral3Config", HEADS | dict(model_type="mistral"), SEEN | HEADS | dict(model_type="pixtral"), LLAMA),
    "Ministral 3": ("Mistral3ForConditionalGeneration", "Mistral3Config", HEADS | dict(model_type="ministral3"), SEEN | HEADS | dict(model_type="pixtral"), LLAMA),
    "SmolLM 3": ("SmolLM3ForCausalLM", "SmolLM3Config", {}, None, LLAMA),
    "Phi 3 and 4": ("Phi3ForCausalLM", "Phi3Config", {}, None, "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj"),
    "Granite 4 H": ("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", MAMBA | GRANITE, None,
                    f"{ATTENTION} mamba.in_proj shared_mlp.input_linear shared_mlp.output_linear {stacked('block_sparse_moe')}"),
    "Granite 4, dense": ("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", MAMBA | GRANITE | DENSE | dict(layer_types=["attention"] * 2), None,
                         f"{ATTENTION} shared_mlp.input_linear shared_mlp.output_linear"),
    "LFM 2": ("Lfm2ForCausalLM", "Lfm2Config", dict(layer_types=["conv", "full_attention"]), None,
              "conv.in_proj conv.out_proj feed_forward.w1 feed_forward.w2 feed_forward.w3 self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj"),
    "LFM 2 MoE": ("Lfm2MoeForCausalLM", "Lfm2MoeConfig", EXPERTS | dict(layer_types=["conv", "full_attention"], num_dense_layers=1), None,
                  f"conv.in_proj conv.out_proj feed_forward.w1 feed_forward.w2 feed_forward.w3 self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj {stacked('feed_forward')}"),
    "OLMo 3": ("Olmo3ForCausalLM", "Olmo3Config", SLIDING, None, LLAMA),
    "Command R7B": ("Cohere2ForCausalLM", "Cohere2Config", HEADS | SLIDING, None, LLAMA),
    "GLM 4": ("Glm4ForCausalLM", "Glm4Config", dict(head_dim=32), None, f"{ATTENTION} mlp.gate_up_proj mlp.down_proj"),
    "GLM 4.5": ("Glm4MoeForCausalLM", "Glm4MoeConfig", ROUTED | dict(head_dim=32, first_k_dense_replace=1), None,
                f"{LLAMA} mlp.shared_experts.gate_proj mlp.shared_experts.up_proj mlp.shared_experts.down_proj {stacked('mlp')}"),
    "EXAONE 4": ("Exaone4ForCausalLM", "Exaone4Config", HEADS | SLIDING, None, LLAMA),
    "Falcon H1": ("FalconH1ForCausalLM", "FalconH1Config", HEADS | dict(mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_n_groups=1, mamba_d_state=16), None,
                  f"{ATTENTION} mamba.in_proj feed_forward.gate_proj feed_forward.up_proj feed_forward.down_proj"),
    "ERNIE 4.5": ("Ernie4_5ForCausalLM", "Ernie4_5Config", HEADS, None, LLAMA),
    "DeepSeek V3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", ROUTED | LATENT | dict(first_k_dense_replace=1), None,
                    f"{MLA} mlp.gate_proj mlp.up_proj mlp.down_proj mlp.shared_experts.gate_proj mlp.shared_experts.up_proj mlp.shared_experts.down_proj {stacked('mlp')}"),
    "Mixtral": ("MixtralForCausalLM", "MixtralConfig", dict(num_local_experts=4, num_experts_per_tok=2), None, f"{ATTENTION} {stacked('mlp')}"),
    "Nemotron H": ("NemotronHForCausalLM", "NemotronHConfig", HEADS | dict(num_hidden_layers=3, hybrid_override_pattern="M*-", mamba_num_heads=8, mamba_head_dim=16, n_groups=1, ssm_state_size=16), None,
                   "mixer.in_proj mixer.q_proj mixer.k_proj mixer.v_proj mixer.o_proj mixer.up_proj mixer.down_proj"),
    "GPT 2": ("GPT2LMHeadModel", "GPT2Config", dict(n_embd=64, n_layer=2, n_head=4), None, "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
}  # fmt: skip


def config_of(family, **sizes):
    """The config of a family; sizes: in place of SIZES."""
    import transformers

    _, kind, needs, seen, _ = FAMILIES[family]
    text = {**SIZES, **needs, **sizes}
    make = getattr(transformers, kind)
    return make(**text) if seen is None else make(text_config=text, vision_config=seen)


def without_weights(family):
    """A model of a family that has shapes and no numbers."""
    import torch
    import transformers

    with torch.device("meta"):
        return getattr(transformers, FAMILIES[family][0])(config_of(family))


def with_weights(family, base, folder):
    """A folder with a tiny random model of a family, in bfloat16, and the tokenizer of the folder `base`."""
    import shutil

    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    rows = -(-len(tokenizer) // 64) * 64
    each = dict(vocab_size_per_layer_input=rows) if "vocab_size_per_layer_input" in FAMILIES[family][2] else {}
    torch.manual_seed(0)
    model = getattr(transformers, FAMILIES[family][0])(config_of(family, vocab_size=rows, **ids, **each))
    model.to(torch.bfloat16).save_pretrained(folder)
    for path in base.iterdir():
        if path.name.startswith(("tokenizer", "special_tokens")):
            shutil.copyfile(path, folder / path.name)
    return folder
