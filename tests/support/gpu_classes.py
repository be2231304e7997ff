"""What the class tree that a GPU gets makes of AutoSloth's arguments and rows, import only; run as a script: `gpu_classes.py BASE ROWS`, a line of JSON."""

import json
import os
import sys


def changed(kind, settings, wanted):
    """The arguments that a config of Unsloth's does not take as they are given: {name: [given, taken]}."""
    assert kind(output_dir="x", bf16=False).learning_rate != settings.learning_rate, "Unsloth's defaults were expected"
    made = kind(**wanted)
    return {name: (value, getattr(made, name)) for name, value in wanted.items() if getattr(made, name) != value}


def batches(base, rows, packing):
    """An epoch of rows, three at once, as the trainer hands them to the model."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from autosloth.settings import SFTSettings
    from autosloth.training.train import sft_arguments, sft_trainer

    lora = LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    model.max_seq_length = 64
    settings = SFTSettings(max_length=64, batch_size=3, optimizer="adamw_torch_fused")
    arguments = sft_arguments(settings, "checkpoints", "float32", False) | {"packing": packing}
    rows = Dataset.from_list(rows)
    trainer = sft_trainer(arguments, model, AutoTokenizer.from_pretrained(base), rows, rows, [])
    names = ("input_ids", "labels", "packed_seq_lengths")
    return [{name: batch[name].tolist() for name in names} for batch in trainer.get_train_dataloader()]


def main():
    os.environ["UNSLOTH_ALLOW_CPU"] = "1"
    from autosloth.models.engine import start_engine

    start_engine()
    from unsloth.models.rl import patch_trl_rl_trainers

    patch_trl_rl_trainers()
    from trl import DPOConfig, DPOTrainer, SFTConfig
    from unsloth.trainer import _patch_trl_trainer

    from autosloth.settings import DPOSettings, SFTSettings
    from autosloth.training.dpo import dpo_arguments
    from autosloth.training.train import sft_arguments

    assert "Unsloth" in DPOTrainer.__name__ and hasattr(DPOTrainer, "_prepare_dataset"), DPOTrainer
    sft = SFTSettings(optimizer="adamw_torch_fused")
    dpo = DPOSettings(optimizer="adamw_torch_fused", sft_weight=0.5)
    told = {"sft": changed(SFTConfig, sft, sft_arguments(sft, "x", "float32", False))}
    told["dpo"] = changed(DPOConfig, dpo, dpo_arguments(dpo, "x", "float32", False))
    _patch_trl_trainer()
    told["batches"] = [batches(sys.argv[1], json.loads(sys.argv[2]), packing) for packing in (False, True)]
    print("\n" + json.dumps(told, default=str))


if __name__ == "__main__":
    main()
