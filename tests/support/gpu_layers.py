"""Which layers the class tree that a GPU gets trains and packs; run as a script: `gpu_layers.py FOLDER ASKED`, a line of JSON.

ASKED: {family: settings}. The models are loaded by Unsloth's own GPU loader, in 4 bit. What it asks of a GPU on the way is answered here: its
properties, that bitsandbytes, which has functions for a CPU too, can be used, the place of Llama's rotary cache, and that Colab has torchvision.
"""

import contextlib
import functools
import json
import math
import os
import sys
import types
from pathlib import Path


def stand_in_for_a_gpu():
    """Unsloth's GPU loader, content with a CPU."""
    import torch
    import unsloth
    from unsloth.models import llama, loader, vision

    properties = types.SimpleNamespace(name="none", major=7, minor=5, total_memory=16 * 10**9, gcnArchName="")
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.get_device_capability = lambda *_: (properties.major, properties.minor)
    torch.cuda.mem_get_info = lambda *_: (properties.total_memory, properties.total_memory)
    llama.get_current_device = lambda: "cpu"
    loader.ALLOW_BITSANDBYTES = True
    heads = types.ModuleType("unsloth.kernels.large_head_attention")  # its Triton kernels want a driver when imported
    heads.patch_large_head_attention = lambda model: model
    sys.modules[heads.__name__] = heads
    vision._missing_torchvision_error = lambda *_: False
    load = unsloth.FastLanguageModel.from_pretrained
    unsloth.FastLanguageModel.from_pretrained = functools.partial(load, device_map={"": "cpu"})


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
    engine.class_of_config = lambda *_: contextlib.nullcontext()  # which is for the CPU backend
    told = {}
    for family, given in json.loads(sys.argv[2]).items():
        settings = SFTSettings(model=str(made(family, Path(sys.argv[1]) / family)), max_length=64, **given)
        model = engine.load_model(settings)
        config = model.peft_config["default"]
        packed = [weight.quant_state for weight in model.parameters() if type(weight).__name__ == "Params4bit"]
        told[family] = {"layers": sorted(reached(model)), "packed": sum(math.prod(state.shape) for state in packed)}
        told[family] |= {name: getattr(config, name) for name in ("lora_alpha", "use_rslora", "use_dora")} | {
            "lora_r": config.r
        }
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    main()
