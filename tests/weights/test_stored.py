"""Weights that are packed are read as what transformers unpacks, by rows and whole, from one file or several, or refused in one sentence."""

import json

import pytest

from autosloth.errors import ExportError, ModelError
from autosloth.export.merge import refuse_unreadable
from autosloth.weights.stored import model_headers, refuse_untold, whole_blocks


def model(folder, *files, **told):
    """A folder with the files of a model: tensors by name in each; told: how its config says that they are packed."""
    from safetensors.torch import save_file

    names = [f"model-{i}.safetensors" for i in range(len(files))]
    for name, weights in zip(names, files, strict=True):
        save_file(weights, folder / name)
    index = {weight: name for name, weights in zip(names, files, strict=True) for weight in weights}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text(json.dumps({"quantization_config": told} if told else {}))
    return folder


def packed_in(folder):
    """The packed weights of a model, by name."""
    headers = model_headers(folder).values()
    return {name: entry["packed"] for header in headers for name, entry in header.items() if "packed" in entry}


def mxfp4(experts=3, outputs=6, inputs=64):
    """Blocks and scales of a stack, at random."""
    import torch

    made = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (experts, outputs, inputs // 32, 16), generator=made, dtype=torch.uint8)
    return blocks, torch.randint(118, 130, (experts, outputs, inputs // 32), generator=made, dtype=torch.uint8)


def agrees(weight, expected):
    """Whether a packed weight is this tensor, however it is read."""
    import numpy
    import torch

    lines = expected.reshape(-1, expected.shape[-1])
    wanted = numpy.array([0, 1, 2, len(lines) - 1, 5, 4, len(lines) - 2])
    assert weight.shape == tuple(expected.shape) and weight.dtype == "bfloat16"
    assert torch.equal(weight.whole(), expected.bfloat16())
    assert torch.equal(weight.rows(wanted), lines[wanted].bfloat16())
    assert torch.equal(weight[1:3], expected[1:3].bfloat16())


def test_mxfp4_is_read_as_transformers_unpacks_it(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = mxfp4()
    parts = ({"experts.down_proj_blocks": blocks}, {"experts.down_proj_scales": scales})
    folder = model(tmp_path, *parts, quant_method="mxfp4")
    (weight,) = packed_in(folder).values()
    assert weight.paths == {str(folder / "model-0.safetensors"), str(folder / "model-1.safetensors")}
    assert [list(header) for header in model_headers(folder).values()] == [["experts.down_proj"], []]
    agrees(weight, convert_moe_packed_tensors(blocks, scales))


SHAPES = {
    "blocks": ((256, 384), (2, 3), [128, 128]),
    "blocks that stand over the edges": ((200, 300), (2, 3), [128, 128]),
    "blocks of which two stand over an edge, and would divide it": ((130, 70), (2, 1), [128, 128]),
    "one block for all": ((40, 64), (1, 1), [128, 128]),
    "other blocks": ((30, 64), (3, 2), [10, 32]),
    "one scale for all": ((40, 64), (), None),
    "a stack by blocks": ((3, 200, 130), (3, 2, 2), [128, 128]),
    "a stack with one scale each": ((3, 20, 64), (3, 1, 1), None),
    "a stack with one scale for all": ((3, 20, 64), (), None),
}


@pytest.mark.parametrize("form", SHAPES)
def test_fp8_is_read_as_its_numbers_times_its_scales(tmp_path, form):
    import torch

    shape, grid, block = SHAPES[form]
    made = torch.Generator().manual_seed(0)
    numbers = torch.randn(shape, generator=made).to(torch.float8_e4m3fn)
    scales = torch.rand(grid, generator=made) + 0.5
    spread = scales
    if block:
        spread = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., : shape[-2], : shape[-1]]
    weights = {"up.weight": numbers, "up.weight_scale_inv": scales, "up.activation_scale": torch.ones(())}
    folder = model(tmp_path, weights, quant_method="fp8", weight_block_size=block)
    (header,) = model_headers(folder).values()
    assert list(header) == ["up.weight"]
    agrees(header["up.weight"]["packed"], numbers.float() * spread)


@pytest.mark.parametrize("kinds", [("float8_e4m3fn", "float32"), ("float8_e5m2", "bfloat16"), ("float8_e4m3fn", "float8_e8m0fnu")])  # fmt: skip
@pytest.mark.parametrize("form", [form for form, (shape, *_) in SHAPES.items() if len(shape) == 2])
def test_transformers_unpacks_fp8_in_the_same_way(tmp_path, form, kinds):
    """kinds: of the numbers, and of their scales."""
    from types import SimpleNamespace

    import torch
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    shape, grid, block = SHAPES[form]
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(getattr(torch, kinds[0]))
    scales = (torch.rand(grid, generator=torch.Generator().manual_seed(1)) + 0.5).to(getattr(torch, kinds[1]))
    weights = {"up.weight": numbers, "up.weight_scale_inv": scales}
    folder = model(tmp_path, weights, quant_method="fp8", weight_block_size=block)
    told = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block))
    with whole_blocks():
        found = Fp8Dequantize(told).convert({"weight$": [numbers], "weight_scale_inv": [scales]})["weight"]
    agrees(packed_in(folder)["up.weight"], found)


def faults():
    """What is wrong, the tensors, how they are said to be packed, and what is said of it."""
    import torch

    blocks, scales = mxfp4()
    numbers, scale = torch.ones(40, 64).to(torch.float8_e4m3fn), torch.ones(1, 1)
    by_blocks, by_channel = dict(quant_method="fp8", weight_block_size=[128, 128]), dict(quant_method="fp8", weight_block_size=None)  # fmt: skip
    return [
        ({"a_blocks": blocks}, dict(quant_method="mxfp4"), "holds a_blocks without its scales (a_scales)"),
        ({"a.weight": numbers}, by_blocks, "holds a.weight without its scales (a.weight_scale_inv)"),
        ({"a.weight": numbers, "a.weight_scale_inv": torch.ones(2, 2)}, by_blocks, "do not fit its numbers ((40, 64))"),
        ({"a.weight": numbers, "a.weight_scale_inv": scale.byte()}, by_blocks, "do not fit its numbers"),
        (
            {"a.weight": numbers, "a.weight_scale": scale},
            by_blocks,
            "a.weight with a.weight_scale and not a.weight_scale_inv",
        ),
        (
            {"a.weight": numbers, "a.weight_scale_inv": torch.ones(40, 1)},
            by_channel,
            "do not fit its numbers ((40, 64))",
        ),
        ({"a.weight": numbers[0], "a.weight_scale_inv": scale}, by_channel, "do not fit its numbers ((64,))"),
        ({"a.weight": numbers, "a.weight_scale_inv": scale}, by_blocks | dict(weight_block_size=[128]), "do not fit"),
        (
            {"a.weight": numbers, "a.weight_scale_inv": scale},
            by_blocks | dict(weight_block_size=[0, 128]),
            "do not fit",
        ),
        (
            {"a_blocks": blocks, "a_scales": scales[..., :1].contiguous()},
            dict(quant_method="mxfp4"),
            "do not fit its numbers ((3, 6, 2, 16))",
        ),
        (
            {"a_blocks": blocks[0], "a_scales": scales[0]},
            dict(quant_method="mxfp4"),
            "do not fit its numbers ((6, 2, 16))",
        ),
        ({"a.weight": numbers, "a.weight_scale": scale}, {}, "as F8_E4M3, which is no 16-bit or 32-bit weight"),
        ({"a.qweight": blocks, "a.scales": scale}, dict(quant_method="awq"), "are stored as awq"),
        ({"a.weight": numbers, "a.weight_scale_inv": scale}, {}, "as F8_E4M3, which is no 16-bit or 32-bit weight"),
        ({"a_blocks": blocks, "a_scales": scales}, {}, "as U8, which is no 16-bit or 32-bit weight"),
    ]


@pytest.mark.parametrize("number", range(15))
def test_what_cannot_be_read_is_told_by_the_headers_alone(tmp_path, number):
    weights, told, said = faults()[number]
    folder = model(tmp_path, weights, **told)
    with pytest.raises(ExportError) as error:
        refuse_unreadable(str(folder))
    assert said in error.value.what and "`sixteen_bit_model`" in error.value.todo


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_numbers_of_8_bits_that_the_config_tells_nothing_of_are_not_trained(tmp_path, kind):
    """As in repositories of ModelOpt, and older ones of compressed-tensors: transformers drops their scales without a word."""
    import torch

    weights = {"a.weight": torch.ones(40, 64).to(getattr(torch, kind)), "a.weight_scale": torch.ones(())}
    with pytest.raises(ModelError, match=r"files of me/model hold a.weight in 8 bits .*without their scales"):
        refuse_untold(model(tmp_path, weights), "me/model")
    refuse_untold(model(tmp_path, weights, quant_method="compressed-tensors"), "me/model")


def test_a_file_that_is_cut_short_is_told(tmp_path):
    import numpy

    blocks, scales = mxfp4()
    folder = model(tmp_path, {"a_scales": scales, "a_blocks": blocks}, quant_method="mxfp4")
    (weight,) = packed_in(folder).values()
    path = folder / "model-0.safetensors"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ExportError, match="cut short"):
        weight.rows(numpy.arange(2, weight.shape[0] * weight.shape[1]))


@pytest.mark.parametrize(
    "content", [b"", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"\x90\0\0\0\0\0\0\0{}"]
)
def test_a_file_that_holds_no_weights_is_told(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ExportError, match=r"model.safetensors is not whole, or no safetensors file"):
        refuse_unreadable(str(tmp_path))
