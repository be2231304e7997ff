"""Which layers the class tree that a GPU gets trains; run as a script: `gpu_layers.py FOLDER ASKED`, a line of JSON.

ASKED: {family: settings}. What Unsloth asks of a GPU before it adds the adapter is answered here: its properties, that bitsandbytes, which has
functions for a CPU too, can be used, and the place of Llama's rotary cache. The models are loaded by Unsloth's own GPU loader, in 4 bit;
but those with eyes are not, since without torchvision, which Colab has, it refuses their processor.
"""

import contextlib
import json
import os
import sys
import types
from pathlib import Path


def stand_in_for_a_gpu():
    """Unsloth's GPU loader, content with a CPU."""
    import torch
    import unsloth
    from unsloth.models import llama, loader

    properties = types.SimpleNamespace(name="none", major=7, minor=5, total_memory=16 * 10**9, gcnArchName="")
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.get_device_capability = lambda *_: (properties.major, properties.minor)
    torch.cuda.mem_get_info = lambda *_: (properties.total_memory, properties.total_memory)
    llama.get_current_device = lambda: "cpu"
    loader.ALLOW_BITSANDBYTES = True
    heads = types.ModuleType("unsloth.kernels.large_head_attention")  # its Triton kernels want a driver when imported
    heads.patch_large_head_attention = lambda model: model
    sys.modules[heads.__name__] = heads
    load = unsloth.FastLanguageModel.from_pretrained
    unsloth.FastLanguageModel.from_pretrained = lambda source, **given: loaded(load, source, given)


def loaded(load, source, given):
    """A model, by Unsloth's loader or, where it has eyes, by transformers, as Unsloth's loader for such leaves it."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(source)
    if not hasattr(config, "vision_config"):
        return load(source, device_map={"": "cpu"}, **given)
    os.environ["UNSLOTH_USE_NEW_MODEL"] = "1"
    model = getattr(transformers, config.architectures[0]).from_pretrained(source)
    model.max_seq_length = given["max_seq_length"]
    return model, None


def made(family, folder):
    """Fill `folder` with a model of a family, of random numbers, and its tokenizer; returns it."""
    import torch
    import transformers

    from support.families import FAMILIES, config_of, family_tokenizer

    told = FAMILIES[family]
    folder.mkdir(parents=True)
    tokens = -(-len(family_tokenizer(told, folder)) // 64) * 64
    model = getattr(transformers, told.kind)(config_of(family, vocab_size=tokens))
    model.to(torch.float16).save_pretrained(folder)
    return folder


def main():
    os.environ["UNSLOTH_ALLOW_CPU"] = "1"
    sys.path.append(str(Path(__file__).parents[1]))
    from autosloth.models import engine
    from autosloth.models.targets import reached
    from autosloth.settings import SFTSettings

    engine.start_engine()
    stand_in_for_a_gpu()
    engine.class_of_config = lambda folder: contextlib.nullcontext()  # which is for the CPU backend
    told = {}
    for family, given in json.loads(sys.argv[2]).items():
        settings = SFTSettings(model=str(made(family, Path(sys.argv[1]) / family)), max_length=64, **given)
        model = engine.load_model(settings)
        config = model.peft_config["default"]
        packed = sum(type(weight).__name__ == "Params4bit" for weight in model.parameters())
        told[family] = {"layers": sorted(reached(model)), "packed": packed}
        told[family] |= {name: getattr(config, name) for name in ("lora_alpha", "use_rslora", "use_dora")} | {
            "lora_r": config.r
        }
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    main()
