"""Models in the forms in which some are published, each beside its 16-bit original: weights of the same values."""

import shutil

from support.families import edit

MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]}  # fmt: skip


def rewritten(folder, copy, weights, **config):
    """A copy of a model's folder with other weights."""
    from safetensors.torch import save_file

    shutil.copytree(folder, copy)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    edit(copy / "config.json", config)
    return copy


def in_mxfp4(folder):
    """A gpt-oss in MXFP4, as OpenAI publishes it, and its 16-bit original; both beside `folder`, whose experts they round.

    16 bytes hold the 32 numbers of a block of inputs, the first in the lower half of the first byte; a scale is an exponent of two.
    """
    import torch
    from safetensors.torch import load_file
    from transformers.integrations.mxfp4 import FP4_VALUES, convert_moe_packed_tensors

    weights = load_file(folder / "model.safetensors")
    packed, plain = dict(weights), dict(weights)
    levels = torch.tensor(FP4_VALUES[:8])
    for name in [name for name in weights if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        groups = weights[name].float().transpose(1, 2).unflatten(-1, (-1, 32))  # (experts, outputs, blocks, 32)
        exponent = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=2.0**-20))) - 2
        scaled = groups / exponent.exp2()[..., None]
        code = (scaled.abs()[..., None] - levels).abs().argmin(-1) + 8 * (scaled < 0)
        blocks, scales = (code[..., ::2] + 16 * code[..., 1::2]).to(torch.uint8), (exponent + 127).to(torch.uint8)
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales)
    beside = folder.parent
    return rewritten(folder, beside / "mxfp4", packed, quantization_config=MXFP4), rewritten(folder, beside / "plain", plain)  # fmt: skip


def in_fp8(folder, block=(128, 128), skipped=("lm_head", "embed_tokens")):
    """A model whose matrices are in FP8, by blocks or (None) with one scale each, and its 16-bit original; both beside `folder`."""
    import torch
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    packed, plain = dict(weights), dict(weights)
    for name, weight in weights.items():
        if weight.ndim != 2 or any(part in name for part in skipped):
            continue
        tall, wide = block or weight.shape
        scale = torch.stack([
            torch.stack([part.abs().max() / 448 for part in rows.float().split(wide, dim=1)]) for rows in weight.split(tall)
        ])  # fmt: skip
        spread = scale.repeat_interleave(tall, 0).repeat_interleave(wide, 1)[: weight.shape[0], : weight.shape[1]]
        packed[name] = (weight.float() / spread).to(torch.float8_e4m3fn)
        packed[f"{name}_scale_inv"] = scale if block else scale.reshape(()).bfloat16()
        if not block:
            spread = packed[f"{name}_scale_inv"].float()
            packed[name.replace(".weight", ".activation_scale")] = torch.tensor(0.5).bfloat16()
        plain[name] = (packed[name].float() * spread).bfloat16()
    told = {"quant_method": "fp8", "activation_scheme": "dynamic" if block else "static", "weight_block_size": block and list(block)}  # fmt: skip
    beside = folder.parent
    return rewritten(folder, beside / "fp8", packed, quantization_config=told), rewritten(folder, beside / "plain", plain)  # fmt: skip
