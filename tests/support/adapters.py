"""Tiny models of random weights, and adapters of every kind for them."""

SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96)
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
EXPERTS = dict(target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], target_modules=["q_proj"])


def tiny(folder, kind, **config):
    """A tiny model of random weights in `folder`, as transformers saves it."""
    import torch
    import transformers

    if kind == "GPT2":
        config = dict(n_embd=32, n_layer=2, n_head=4, vocab_size=96, n_positions=64) | config
    elif kind == "Gemma3":
        text = transformers.Gemma3TextConfig(**SMALL, intermediate_size=48, head_dim=8, tie_word_embeddings=True)
        sight = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28)
        config = dict(text_config=text.to_dict(), vision_config=sight, mm_tokens_per_image=4)
    else:
        config = SMALL | dict(intermediate_size=48, tie_word_embeddings=False) | config
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


def adapter(folder, base, **config):
    """An adapter for the base, each of its weights random, as PEFT saves it; gives PEFT's model too."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**dict(r=4, lora_alpha=6) | config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(folder)
    return folder, model.eval()
