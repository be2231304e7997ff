"""Every linear layer and all experts of the text part are trained, and nothing else, whatever the family calls them."""

import re
import shutil

import pytest
from support.families import ATTENTION, FAMILIES, config_of, tiny_family, without_weights

from autosloth.check import Problems, check
from autosloth.errors import ModelError
from autosloth.models import planned_layers
from autosloth.models.targets import layer_counts, layers_line, reached, targets_of, trainable_layers
from autosloth.settings import SFTSettings


def kinds(names):
    """The names without the numbers of blocks, and what comes before them."""
    return {re.split(r"\.\d+\.", name, maxsplit=1)[1] for name in names}


def with_adapter(model, targets, **lora):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=targets.modules, target_parameters=targets.parameters, **lora))  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_that_are_trained_are_those_of_the_text_and_an_adapter_reaches_just_these(family, engine):
    model = without_weights(family)
    targets = targets_of(model, "all-linear")
    assert kinds(targets.names) == set(FAMILIES[family].layers.split())
    planned = layer_counts(model, targets.names)
    of_tokens = {
        f"{name}.weight" for name, module in model.named_modules() if type(module).__name__.endswith("Embedding")
    }
    matrices = {name for name, weight in model.named_parameters(remove_duplicate=False) if weight.ndim > 1} - of_tokens
    assert sum(count["of"] for count in planned.values()) == len(matrices) and targets.names <= {name.removesuffix(".weight") for name in matrices}  # fmt: skip
    trained = with_adapter(model, targets)
    assert reached(trained) == targets.names
    assert layer_counts(trained, reached(trained)) == planned
    assert all("lora_" in name for name, weight in trained.named_parameters() if weight.requires_grad)


@pytest.mark.parametrize("family", ["Llama 3", "Gemma 3", "Qwen 3 MoE", "Granite 4 H", "DeepSeek V3", "Nemotron H"])
def test_attention_alone_is_attention_alone(family, engine):
    names = targets_of(without_weights(family), "attention").names
    told = {"DeepSeek V3": "self_attn.", "Nemotron H": "mixer."}.get(family)
    assert kinds(names) == {kind for kind in FAMILIES[family].layers.split() if (kind.startswith(told) if told else kind in ATTENTION.split())} - {"mixer.in_proj", "mixer.up_proj", "mixer.down_proj"}  # fmt: skip


def test_names_are_taken_where_the_text_has_them_and_refused_where_not(engine):
    model = without_weights("Gemma 3")
    targets = targets_of(model, ["q_proj", "up_proj"])
    assert kinds(targets.names) == {"self_attn.q_proj", "mlp.up_proj"}
    assert reached(with_adapter(model, targets)) == targets.names and not any(
        "vision" in name for name in targets.names
    )
    with pytest.raises(ModelError) as error:
        targets_of(without_weights("Phi 4"), ["q_proj", "down_proj"])
    assert error.value.what.startswith("`target_modules` names q_proj, and")
    assert "self_attn.o_proj, self_attn.qkv_proj, mlp.gate_up_proj, mlp.down_proj" in error.value.todo
    experts = targets_of(without_weights("Mixtral"), ["gate_up_proj"])
    assert experts.parameters == ["mlp.experts.gate_up_proj"] and experts.modules == []


def test_a_layer_whose_weights_its_block_reads_itself_is_left_out(engine):
    """Mamba's kernels take `out_proj.weight`, past an adapter, which would never get a gradient."""
    linear, _ = trainable_layers(without_weights("Granite 4 H"))
    assert not any(name.endswith("mamba.out_proj") for name in linear)
    linear, _ = trainable_layers(without_weights("LFM 2"))
    assert any(name.endswith("conv.out_proj") for name in linear)


def test_layers_that_peft_takes_for_experts_are_trained_as_parameters_or_told_as_untrained_where_they_are_packed(
    engine,
):
    import torch

    model = without_weights("GLM 4.5")
    targets = targets_of(model, "all-linear")
    assert "mlp.shared_experts.up_proj.weight" in targets.parameters and "up_proj" not in targets.modules
    for name in (name for name in targets.names if name.endswith("shared_experts.up_proj")):
        model.get_submodule(name).weight = torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.uint8), requires_grad=False)
    packed = targets_of(model, "all-linear")
    assert targets.names - packed.names == {"model.layers.1.mlp.shared_experts.up_proj"}
    assert (
        "mlp.shared_experts.up_proj 1" in layers_line(layer_counts(model, packed.names)).partition("not trained: ")[2]
    )
    assert reached(with_adapter(model, packed)) == packed.names


def test_what_is_trained_is_told_by_kind(engine):
    model = without_weights("Qwen 3 MoE")
    line = layers_line(layer_counts(model, targets_of(model, "all-linear").names))
    assert line == (
        "12 of 15 matrices: self_attn.q_proj 2 of 2, self_attn.k_proj 2 of 2, self_attn.v_proj 2 of 2, self_attn.o_proj 2 of 2, "
        "mlp.experts.gate_up_proj 2 of 2, mlp.experts.down_proj 2 of 2; not trained: mlp.gate 2, lm_head 1"
    )
    line = layers_line(layer_counts(model, targets_of(model, ["q_proj"]).names))
    assert (
        line.startswith("2 of 15 matrices: self_attn.q_proj 2 of 2; not trained: ")
        and "mlp.experts.down_proj 2" in line
    )


def test_what_the_settings_say_is_what_the_adapter_gets(engine, base):
    from autosloth.models import load_model

    asked = {"target_modules": "q_proj", "use_dora": True, "use_rslora": True, "lora_r": 4, "lora_alpha": 8}
    model = load_model(SFTSettings.load({"model": "demo", "adapter": None, "load_in_4bit": False, **asked}))
    told = model.peft_config["default"]
    assert (told.use_dora, told.use_rslora, told.r, told.lora_alpha) == (True, True, 4, 8)
    assert {name.rpartition(".")[2] for name in reached(model)} == {"q_proj"}


@pytest.mark.parametrize("whole", [["lm_head"], ["embed_tokens", "lm_head"]])
def test_modules_that_are_trained_whole_are_told_and_counted(engine, base, whole):
    from autosloth.models import load_model

    settings = SFTSettings.load({"model": "demo", "load_in_4bit": False, "modules_to_save": whole})
    model = load_model(settings)
    told = layer_counts(model)
    assert told == planned_layers(settings)
    assert all(told[name] == {"trained": 0, "of": 1, "whole": 1} for name in whole)
    line = layers_line(told)
    assert line.startswith("28 of 28 matrices: self_attn.q_proj 4 of 4") and "not trained" not in line
    assert sorted(line.partition("; trained whole: ")[2].split(", ")) == [f"{name} 1" for name in whole]


def test_experts_are_not_trained_with_what_peft_cannot(engine, tmp_path):
    config_of("Mixtral", architectures=["MixtralForCausalLM"]).save_pretrained(tmp_path)
    told = {"model": str(tmp_path), "use_dora": True}
    with pytest.raises(ModelError, match=r"experts of .* cannot be trained with `use_dora`"):
        planned_layers(SFTSettings(**told))
    counts = planned_layers(SFTSettings(**told, target_modules="attention"))
    assert counts["mlp.experts.down_proj"] == {"trained": 0, "of": 2} and counts["self_attn.q_proj"]["trained"] == 2


def test_experts_that_unsloth_takes_apart_in_4_bit_are_not_trained_for_an_export(engine, tmp_path, monkeypatch):
    from autosloth.models import engine as loader

    config_of("gpt-oss", architectures=["GptOssForCausalLM"]).save_pretrained(tmp_path)
    told = {"model": str(tmp_path), "load_in_4bit": True}
    planned_layers(SFTSettings(**told))  # without a GPU nothing is packed
    monkeypatch.setattr(loader, "first_gpu", lambda: "a GPU")
    with pytest.raises(ModelError, match=r"each expert of .* is layers of its own"):
        planned_layers(SFTSettings(**told))
    for more in ({"target_modules": "attention"}, {"load_in_4bit": False}, {"quantizations": []}):
        planned_layers(SFTSettings(**told | more))


def test_check_tells_what_would_be_trained_and_refuses_a_layer_that_is_not_there(engine, base, tmp_path, capsys):
    settings = SFTSettings(model=str(base), dataset="demo", storage=str(tmp_path), target_modules="attention", load_in_4bit=False)  # fmt: skip
    check(settings)
    assert "check: LoRA trains 16 of 29 matrices: self_attn.q_proj 4 of 4" in capsys.readouterr().out
    with pytest.raises(Problems) as error:
        check(settings.model_copy(update={"target_modules": ["qkv"]}))
    assert [problem.what for problem in error.value.problems] == [
        "`target_modules` names qkv, and the model has no such layer that LoRA could train."
    ]


def test_experts_that_unsloth_packs_on_a_gpu_are_found(engine):
    """As its loader leaves them: the parameter is of bytes, and knows the shape of what they stand for."""
    import torch
    from unsloth_zoo.mxfp4_dequant import Mxfp4ExpertParam

    model = without_weights("gpt-oss")
    expected = targets_of(model, "all-linear").names
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            for parameter in ("gate_up_proj", "down_proj"):
                experts, inputs, outputs = getattr(module, parameter).shape
                blocks = torch.zeros(experts, outputs, inputs // 32, 16, dtype=torch.uint8)
                scales = torch.zeros(experts, outputs, inputs // 32, dtype=torch.uint8)
                setattr(module, parameter, Mxfp4ExpertParam(blocks, mxfp4_scales=scales))
                assert getattr(module, parameter)._original_shape == (experts, inputs, outputs)
    assert targets_of(model, "all-linear").names == expected


@pytest.mark.parametrize(
    ("asked", "hint"),
    [
        (["lm_head"], "Name lm_head in `modules_to_save`"),
        (["all-linear", "q_proj"], "`all-linear` stands alone"),
        (["q_proj,v_proj"], "as a list, such as [q_proj, v_proj]"),
        (["gate"], "Routers are not trained"),
    ],
)
def test_a_name_that_is_none_is_told_what_was_meant(engine, asked, hint):
    with pytest.raises(ModelError) as error:
        targets_of(without_weights("Qwen 3 MoE"), asked)
    assert hint in error.value.todo and "mlp.experts.gate_up_proj" in error.value.todo


def test_a_longer_name_tells_layers_of_one_last_name_apart(engine):
    model = without_weights("GLM 4.5")
    assert kinds(targets_of(model, ["shared_experts.up_proj"]).names) == {"mlp.shared_experts.up_proj"}
    assert kinds(targets_of(model, ["mlp.up_proj"]).names) == {"mlp.up_proj"}
    assert kinds(targets_of(model, ["up_proj"]).names) == {"mlp.shared_experts.up_proj", "mlp.up_proj"}


def test_an_adapter_to_start_from_is_told_as_it_is_and_takes_no_other_shape(engine, base, tmp_path, capsys):
    from support.tiny_models import tiny_adapter

    tiny_adapter(base, tmp_path / "adapter", target_modules=["q_proj", "v_proj"])
    told = {"model": str(base), "dataset": "demo", "storage": str(tmp_path), "adapter": str(tmp_path / "adapter"), "load_in_4bit": False}  # fmt: skip
    check(SFTSettings(**told))
    assert (
        "check: LoRA trains 8 of 29 matrices: self_attn.q_proj 4 of 4, self_attn.v_proj 4 of 4; "
        in capsys.readouterr().out
    )
    check(SFTSettings(**told, target_modules=["v_proj", "q_proj"]))
    for more in ({"target_modules": "attention"}, {"use_dora": True}, {"use_rslora": True}, {"modules_to_save": ["lm_head"]}):  # fmt: skip
        with pytest.raises(Problems) as error:
            check(SFTSettings(**told, **more))
        (problem,) = error.value.problems
        assert f"is trained further as it is, and `{next(iter(more))}` asks for another" in problem.what


def test_an_adapter_that_does_not_fit_is_told_once(base, tmp_path):
    settings = SFTSettings(model=str(base), dataset="demo", storage=str(tmp_path), adapter=str(tmp_path / "none"))
    with pytest.raises(Problems) as error:
        check(settings)
    assert len(error.value.problems) == 1


def test_files_that_lack_a_weight_are_refused_before_random_numbers_are_trained(engine, base, tmp_path):
    from safetensors.torch import load_file, save_file

    model = shutil.copytree(base, tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    del weights["lm_head.weight"], weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    settings = SFTSettings(
        model=str(model), dataset="demo", storage=str(tmp_path), load_in_4bit=False, quantizations=[]
    )
    with pytest.raises(Problems) as error:
        check(settings)
    (problem,) = error.value.problems
    assert (
        problem.what
        == f"The files of {model} lack 2 of the model's weights, for example model.layers.1.mlp.up_proj.weight."
    )


@pytest.mark.parametrize(("factor", "whole"), [(1.0, 2), (1.5, 1)])
def test_a_head_that_the_files_hold_beside_tied_embeddings_is_one_weight_with_them_if_it_is_the_same(engine, tmp_path, factor, whole):  # fmt: skip
    from safetensors.torch import load_file, save_file

    from autosloth.models import load_model

    model = tiny_family("Qwen 2.5", tmp_path / "model", steps=1)
    weights = load_file(model / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"] * factor
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    settings = SFTSettings(model=str(model), load_in_4bit=False, modules_to_save=["embed_tokens"])
    told = planned_layers(settings)
    assert sum(count.get("whole", 0) for count in told.values()) == whole
    assert told == layer_counts(load_model(settings))


@pytest.mark.parametrize("family", ["Nemotron H", "GPT 2"])
def test_embeddings_and_head_are_found_whatever_a_family_calls_them(engine, tmp_path, family):
    config_of(family, architectures=[FAMILIES[family].kind]).save_pretrained(tmp_path)
    told = planned_layers(SFTSettings(model=str(tmp_path), modules_to_save=["embed_tokens", "lm_head"]))
    assert sum(count.get("whole", 0) for count in told.values()) == 2
