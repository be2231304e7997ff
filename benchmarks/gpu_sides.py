"""One side of a row of `gpu.py`, in a process of its own: `python benchmarks/gpu_sides.py '{"side": "autosloth", ...}'` prints one line of JSON.

A case: `side`, one of SIDES; `run`, a folder that `prepare` made; `steps`; `cap_gb`, the most that torch may take of the GPU.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from gpu_meter import Meter, memory, on_gpu, same_start
from gpu_models import make_model, write_instructions, write_pairs
from sides import Case, in_turn, tell

NOTEBOOK = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "learning_rate": 2e-4, "warmup_steps": 5, "optim": "adamw_8bit", "weight_decay": 0.01, "lr_scheduler_type": "linear", "seed": 3407}  # fmt: skip
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


# ---------------------------------------------------------------------------------------------------------------- rows
def prepare(case: Case) -> Case:
    """Make the model and the rows, and run the data stage of AutoSloth on them; gives the run's folder and what its check expects of memory."""
    from autosloth.data.stage import prepare_data
    from autosloth.models.memory import estimate, known_shape
    from autosloth.run import Run
    from autosloth.settings import ROADS

    folder = Path(case["folder"])
    model = make_model(folder / case["model"], **case["make"])
    rows = folder / f"{case['name']}.json"
    write = write_pairs if case["road"] == "dpo" else write_instructions
    write(rows, case["rows"], **case.get("lengths", {}))
    given = dict(model=str(model), dataset=str(rows), storage=str(folder / "runs"), run_name=case["name"], eval_rows=32, eval_answers=0, quantizations=[])  # fmt: skip
    settings = ROADS[case["road"]].from_values(given | case["settings"], "the benchmark")
    run = Run.create(settings)
    prepare_data(run)
    shape = known_shape(settings)
    expected = [part._asdict() for part in estimate(settings, shape, case["gpu_gb"], settings.lora_r)] if shape else []
    return {"run": str(run.folder), "expected": expected, "length": run.facts["data"]["length"]}


# ---------------------------------------------------------------------------------------------------------------- sides
def opened(case: Case) -> Any:
    """The run that `prepare` made, with the settings changed that this side wants otherwise."""
    from autosloth.run import Run

    run = Run.open(case["run"])
    run.settings = run.settings.model_copy(update={"max_steps": case["steps"], "save_steps": 10_000, **case.get("changed", {})})  # fmt: skip
    return run


def autosloth(case: Case) -> Case:
    """AutoSloth's own trainer, as its training stage makes it."""
    from autosloth.models.engine import load_model, load_tokenizer
    from autosloth.notebook.live import Interruption, progress_callback
    from autosloth.training import dpo, train
    from autosloth.training.trial import is_due, try_out
    from autosloth.values import AUTO

    run = opened(case)
    tokenizer, model = load_tokenizer(run.settings), load_model(run.settings)
    same_start(model)
    road = dpo if run.settings.road == "dpo" else train
    callbacks = [progress_callback(Interruption())]
    trainer = road.make_trainer(run, model, tokenizer, run.rows("train"), run.rows("eval"), callbacks)
    if run.settings.batch_size == AUTO and is_due(run):
        try_out(run, trainer, tokenizer)
    return {**Meter(trainer, case.get("profiled", False)).train(), "trial": run.facts.get("trial")}


def dtype_of(run: Any) -> tuple[Any, Case]:
    """The precision that AutoSloth would train this run in, as torch names it and as a trainer's arguments do."""
    import torch

    from autosloth.models.engine import choose_precision

    name, _ = choose_precision(run.settings)
    return getattr(torch, name), {"bf16": name == "bfloat16", "fp16": name == "float16"}


def unsloth_model(settings: Any, dtype: Any) -> tuple[Any, Any]:
    """Model and tokenizer as Unsloth's public notebooks load them."""
    from unsloth import FastLanguageModel

    model, tokenizer = FastLanguageModel.from_pretrained(settings.model, max_seq_length=settings.max_length, dtype=dtype, load_in_4bit=settings.load_in_4bit)  # fmt: skip
    model = FastLanguageModel.get_peft_model(
        model, r=settings.lora_r, target_modules=LAYERS, lora_alpha=settings.lora_alpha, lora_dropout=0, bias="none",
        use_gradient_checkpointing="unsloth" if on_gpu() else False, random_state=3407, use_rslora=False, loftq_config=None,
    )  # fmt: skip
    same_start(model)
    return model, tokenizer


def notebook_arguments(case: Case, run: Any, precision: Case) -> Case:
    """What the notebooks pass to a trainer, besides the lengths."""
    output = {"output_dir": str(run.path("notebook")), "report_to": "none", "logging_steps": 1, "save_strategy": "no"}
    eight_bit = {} if on_gpu() else {"optim": "adamw_torch_fused"}
    return {**NOTEBOOK, **precision, **output, **eight_bit, "max_steps": case["steps"]}


def notebook(case: Case) -> Case:
    """Unsloth with TRL as its public notebooks call them: whole rows are learnt, no packing, whatever else is Unsloth's default."""
    import unsloth  # noqa: F401 (before trl, which it patches)
    from trl import SFTConfig, SFTTrainer

    run = opened(case)
    dtype, precision = dtype_of(run)
    model, tokenizer = unsloth_model(run.settings, dtype)
    arguments = notebook_arguments(case, run, precision)
    texts = {"dataset_text_field": "text", "max_length": run.settings.max_length, "packing": False}
    rows = run.rows("train").select_columns(["text"])
    trainer = SFTTrainer(
        model=model, processing_class=tokenizer, train_dataset=rows, args=SFTConfig(**arguments, **texts)
    )
    return Meter(trainer, case.get("profiled", False)).train()


def notebook_dpo(case: Case) -> Case:
    """Unsloth's DPO as its Zephyr notebook calls it."""
    import unsloth  # noqa: F401
    from trl import DPOConfig, DPOTrainer

    run = opened(case)
    dtype, precision = dtype_of(run)
    model, tokenizer = unsloth_model(run.settings, dtype)
    tokenizer.chat_template = chat_template()
    arguments = notebook_arguments(case, run, precision) | {"learning_rate": 5e-6, "warmup_steps": 0.1}
    rows = run.rows("train").select_columns(["prompt", "chosen", "rejected"])
    args = DPOConfig(**arguments, beta=0.1, max_length=run.settings.max_length)
    return Meter(DPOTrainer(model=model, ref_model=None, processing_class=tokenizer, train_dataset=rows, args=args)).train()  # fmt: skip


def chat_template() -> str:
    from autosloth.models.template import named_template

    return named_template("alpaca")


def bare(case: Case) -> Case:
    """Unsloth with TRL, given AutoSloth's arguments and rows: what is left between the two is AutoSloth itself."""
    import unsloth  # noqa: F401
    from trl import SFTConfig, SFTTrainer

    from autosloth.training.train import sft_arguments

    run = opened(case)
    dtype, _ = dtype_of(run)
    model, tokenizer = unsloth_model(run.settings, dtype)
    args = SFTConfig(**sft_arguments(run.settings, run.path("bare"), str(dtype).removeprefix("torch."), on_gpu()))
    rows = run.rows("train").select_columns(["input_ids", "labels"])
    return Meter(SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer)).train()  # fmt: skip


def plain(case: Case) -> Case:
    """QLoRA by transformers, peft and trl alone, on AutoSloth's rows and labels, with the values of its settings."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = opened(case)
    settings, (dtype, precision) = run.settings, dtype_of(run)
    model = AutoModelForCausalLM.from_pretrained(settings.model, dtype=dtype, device_map={"": 0} if on_gpu() else None)
    arguments = notebook_arguments(case, run, precision) | {
        "per_device_train_batch_size": settings.rows_at_once, "gradient_accumulation_steps": settings.rows_per_step // settings.rows_at_once,
        "learning_rate": settings.learning_rate, "warmup_steps": settings.warmup, "weight_decay": settings.weight_decay,
        "lr_scheduler_type": settings.scheduler, "max_grad_norm": settings.max_grad_norm, "seed": settings.seed, "data_seed": settings.seed,
        "gradient_checkpointing": on_gpu(), "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }  # fmt: skip
    trainer = plain_trainer(run, model, AutoTokenizer.from_pretrained(settings.model), arguments)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # trl makes them bf16, which fp16's gradient scaler cannot take (its issue 4901)
            parameter.data = parameter.data.float()
    same_start(trainer.model)
    return Meter(trainer).train()


def plain_trainer(run: Any, model: Any, tokenizer: Any, arguments: Case) -> Any:
    """TRL's trainer with a LoRA adapter on all linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

    settings, train = run.settings, run.rows("train")
    lora = LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, lora_dropout=0.0, target_modules=LAYERS, task_type="CAUSAL_LM")  # fmt: skip
    if settings.road == "dpo":
        tokenizer.chat_template = chat_template()
        args = DPOConfig(**arguments, beta=settings.beta, max_length=settings.max_length)
        rows = train.select_columns(["prompt", "chosen", "rejected"])
        return DPOTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, peft_config=lora)
    rows, collator = train.select_columns(["input_ids", "labels"]), DataCollatorForSeq2Seq(tokenizer)
    if (
        not on_gpu()
    ):  # trl 1.15's loss is a Triton kernel, which a machine without a GPU lacks; that of transformers is the same
        return Trainer(model=get_peft_model(model, lora), args=TrainingArguments(**arguments), train_dataset=rows, data_collator=collator)  # fmt: skip
    args = SFTConfig(**arguments, max_length=settings.max_length)
    return SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=tokenizer, data_collator=collator, peft_config=lora)  # fmt: skip


def generation(case: Case) -> Case:
    """The three sides of generate.py, tokens per second by round."""
    import generate

    size = generate.Size(**case["size"])
    loaded = generate.counting_model(Path(case["folder"]) / case["model"], **case["make"])
    return {"tokens_per_second": in_turn(size.rounds, generate.sides(*loaded, size)), **memory()}


def spin_round(case: Case) -> Case:
    """A whole round of self-play by AutoSloth: seconds by part."""
    from autosloth.training.spin import Game, self_play

    run, seconds = opened(case), {}
    timed(Game, "generate", seconds)
    timed(Game, "train", seconds)
    timed(Game, "__init__", seconds)
    started = time.perf_counter()
    self_play(run)
    whole = time.perf_counter() - started
    facts = run.facts["rounds"][0]
    parts = {"loading": seconds["__init__"], "generation": seconds["generate"], "training": seconds["train"]}
    return {"seconds": parts | {"other": whole - sum(parts.values()), "whole": whole}, "pairs": facts["generated"], **memory()}  # fmt: skip


def timed(kind: Any, name: str, seconds: dict[str, float]) -> None:
    """Add up the seconds that are spent in a method."""
    method = getattr(kind, name)

    def with_clock(*arguments: Any, **named: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*arguments, **named)
        finally:
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - started

    setattr(kind, name, with_clock)


def whole_training(case: Case) -> Case:
    """AutoSloth's training stage under a cap that its first batch does not fit: the steps and the tokens that it told of in the end."""
    from autosloth.errors import AutoSlothError
    from autosloth.training.train import train_adapter

    run = opened(case)
    try:
        train_adapter(run)
    except AutoSlothError as problem:
        return {"stopped": str(problem), **memory()}
    told = run.facts["train"]
    return {"steps": told["steps"], "tokens": told["tokens"], "facts": {k: v for k, v in told.items() if k != "losses"}, **memory()}  # fmt: skip


def machine(case: Case) -> Case:
    """What it is measured on; asked in a process of its own, since torch takes GPU memory to tell."""
    from autosloth.hardware import hardware, versions

    return {"hardware": hardware(), "versions": versions()}


SIDES = {
    side.__name__: side
    for side in (
        prepare,
        autosloth,
        notebook,
        notebook_dpo,
        bare,
        plain,
        generation,
        spin_round,
        whole_training,
        machine,
    )
}


def main() -> None:
    case = json.loads(sys.argv[1])
    if case["side"] not in (
        "plain",
        "machine",
    ):  # before torch makes anything on the GPU: Unsloth sets how its allocator works
        from autosloth.models.engine import start_engine

        start_engine()
    if case.get("cap_gb") and on_gpu():
        import torch

        from autosloth import hardware
        from autosloth.models import memory

        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, case["cap_gb"] * 1e9 / total))
        memory.first_gpu = lambda: hardware.GPU("capped", case["cap_gb"])  # what AutoSloth is to think that there is
    tell(SIDES[case["side"]](case))


if __name__ == "__main__":
    main()
