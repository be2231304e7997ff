"""Training does what the settings say, and goes on after it was killed."""

import errno
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from support.commands import DEMO, SHORT, killed_after, sets
from support.small_memory import small_memory

from autosloth.errors import ModelError
from autosloth.run import Run, read_json
from autosloth.settings import SFTSettings
from autosloth.training import batches, checkpoints, dpo, measure, train

# A value other than the default for everything that reaches the trainer.
UNUSUAL = dict(
    **{"batch_size": 3, "gradient_accumulation": 5, "epochs": 2.0, "max_steps": 0, "learning_rate": 1.5e-4},
    **{"scheduler": "cosine", "warmup": 0.25, "optimizer": "rmsprop", "weight_decay": 0.03, "max_grad_norm": 0.7},
    **{"seed": 11, "max_length": 96, "save_steps": 7},
)
IN_TRAINER = dict(
    **{"per_device_train_batch_size": 3, "gradient_accumulation_steps": 5, "num_train_epochs": 2.0, "max_steps": -1},
    **{"learning_rate": 1.5e-4, "lr_scheduler_type": "cosine", "warmup_steps": 0.25, "optim": "rmsprop"},
    **{"weight_decay": 0.03, "max_grad_norm": 0.7, "seed": 11, "data_seed": 11, "max_length": 96, "save_steps": 7},
    **{"fp16": False, "bf16": False, "packing": False, "loss_type": "nll", "report_to": []},
)


@pytest.fixture
def trainer(engine, finished, tmp_path):
    """TRL's trainer as the stage makes it, on the rows of the finished run."""
    settings = SFTSettings.load({"model": "demo", "dataset": "demo", "storage": str(tmp_path), **UNUSUAL})
    rows = Run.open(finished).rows("eval")
    model, tokenizer = train.load_model(settings), train.load_tokenizer(settings)
    return train.make_trainer(Run.create(settings), model, tokenizer, rows, rows, [])


def test_the_trainers_arguments_are_the_settings(trainer):
    assert {name: getattr(trainer.args, name) for name in IN_TRAINER} == IN_TRAINER


def test_the_adapter_is_on_all_linear_layers_and_only_it_is_trained(trainer):
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert all(".lora_" in name for name in trained)
    assert {name.split(".lora_")[0].rsplit(".", 1)[1] for name in trained} == set(train_layers())


def train_layers():
    return ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_the_loss_is_that_of_the_answers_alone(trainer):
    """The trainer's loss on a batch equals cross-entropy over the tokens that are labelled, by hand."""
    import torch

    trainer.model.eval()
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        logits = (
            trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
        )
        loss = trainer.compute_loss(trainer.model, dict(batch)).item()
    labels = batch["labels"][:, 1:]
    picked = torch.log_softmax(logits, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)[labels != -100]
    assert 0 < (labels != -100).sum() < labels.numel()
    assert loss == pytest.approx(-picked.mean().item(), abs=1e-4)


@pytest.mark.parametrize(
    "gpu, dtype, expected",
    [
        (
            True,
            "float16",
            {"fp16": True, "bf16": False, "optim": "adamw_8bit", "packing": True, "gradient_checkpointing": True},
        ),
        (True, "bfloat16", {"fp16": False, "bf16": True, "optim": "adamw_8bit", "packing": True}),
        (False, "float32", {"fp16": False, "bf16": False, "optim": "adamw_torch_fused", "packing": False}),
    ],
)
def test_precision_optimizer_and_packing_suit_the_hardware(tmp_path, gpu, dtype, expected):
    arguments = train.sft_arguments(SFTSettings(packing=True), tmp_path, dtype, gpu)
    assert {name: arguments[name] for name in expected} == expected


def test_the_finished_run_measured_itself(finished):
    facts = read_json(finished / "facts.json")
    assert facts["train"]["steps"] == SFTSettings.DEMO_DEFAULTS["max_steps"] == len(facts["train"]["losses"])
    assert facts["eval"]["after"]["loss"] < facts["eval"]["before"]["loss"] - 1
    assert set(facts["train"]) >= {"seconds", "first_loss", "peak_vram_gb", "peak_ram_gb", "tokens_per_second"}


def test_the_demo_task_is_out_of_the_bases_reach_and_within_that_of_the_fine_tuned_model(finished):
    evaluation = read_json(finished / "facts.json")["eval"]
    assert evaluation["before"]["exact_match"] < 0.10
    assert evaluation["after"]["exact_match"] > 0.80
    assert evaluation["after"]["answers_compared"] == 64


@pytest.mark.slow
def test_a_run_killed_in_mid_training_goes_on_and_ends_at_the_same_step(base, cli, tmp_path):
    arguments = [
        "sft",
        *sets(**SHORT | {"max_steps": 150, "save_steps": 20, "merged": False, "quantizations": "[]"}, storage=tmp_path),
    ]
    killed_after(tmp_path / "short" / "checkpoints" / "checkpoint-40" / "trainer_state.json", *arguments)
    assert not (tmp_path / "short" / "adapter").exists()
    for path in (tmp_path / "short" / "checkpoints").glob("checkpoint-*/trainer_state.json"):
        state = read_json(path)
        state["log_history"][0]["peak_ram_gb"] += 1000  # the killed process had more
        path.write_text(json.dumps(state))
        checkpoints.seal(path.parent)

    second = cli(*arguments)
    assert second.returncode == 0, second.stdout + second.stderr
    assert "going on from checkpoint-" in second.stdout and "data: done already, skipped" in second.stdout
    facts = read_json(tmp_path / "short" / "facts.json")
    assert facts["train"]["steps"] == 150 and facts["train"]["peak_ram_gb"] > 1000
    assert [step for step, _ in facts["train"]["losses"]] == list(range(1, 151))
    assert len(list((tmp_path / "short" / "checkpoints").glob("checkpoint-*"))) <= 2


def test_a_run_that_stopped_after_its_last_step_takes_no_step_more(copied, cli):
    facts = read_json(copied / "facts.json")
    (copied / ".done" / "train.json").unlink()
    (copied / "adapter" / "adapter_model.safetensors").unlink()
    again = cli("sft", *sets(**DEMO, storage=copied.parent))
    assert again.returncode == 0, again.stderr
    now = read_json(copied / "facts.json")
    assert now["train"]["steps"] == facts["train"]["steps"] == len(now["train"]["losses"])
    assert now["eval"]["after"] == facts["eval"]["after"]


def test_a_training_that_diverges_is_a_named_problem(base, cli, tmp_path):
    wild = {"learning_rate": 0.1, "lora_alpha": 4096, "lora_r": 1, "max_steps": 20, "quantizations": "[]"}
    result = cli("sft", *sets(**SHORT | wild, storage=tmp_path))
    assert result.returncode == 1 and "training diverged" in result.stderr and "Lower `learning_rate`" in result.stderr
    assert not (tmp_path / "short" / "adapter").exists()


FAULTS = {
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "optimizer.pt is not as it was written"),
    "zeros": (lambda path: path.write_bytes(b"\0" * path.stat().st_size), "optimizer.pt is not as it was written"),
    "gone": (lambda path: path.unlink(), "optimizer.pt is missing"),
    "no list": (lambda path: (path.parent / "whole.json").unlink(), "whole.json is missing"),
    "cut list": (lambda path: (path.parent / "whole.json").write_text('{"opt'), "whole.json cannot be read"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_is_passed_over_and_the_one_before_is_taken(tmp_path, fault, capsys):
    for step in (8, 20, 100):
        (tmp_path / "new" / f"checkpoint-{step}").mkdir(parents=True)
        (tmp_path / "new" / f"checkpoint-{step}" / "optimizer.pt").write_text("moments")
        checkpoints.keep(tmp_path / "new" / f"checkpoint-{step}", tmp_path / "kept", 2)
    assert [path.name for path in checkpoints.numbered(tmp_path / "kept")] == ["checkpoint-20", "checkpoint-100"]
    spoil, said = FAULTS[fault]
    spoil(tmp_path / "kept" / "checkpoint-100" / "optimizer.pt")
    assert checkpoints.last_checkpoint(tmp_path / "kept").name == "checkpoint-20"
    assert capsys.readouterr().out == f"train: checkpoint-100 is damaged ({said}) and passed over\n"
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["checkpoint-20"]
    spoil(tmp_path / "kept" / "checkpoint-20" / "optimizer.pt")
    assert checkpoints.last_checkpoint(tmp_path / "kept") is None
    assert "no checkpoint is whole; going on from the start" in capsys.readouterr().out


def test_checkpoints_of_a_run_on_drive_are_written_on_this_machine(tmp_path, monkeypatch):
    assert checkpoints.scratch_of(tmp_path / "checkpoints") == tmp_path / ".checkpoints.partial"
    monkeypatch.setattr(checkpoints, "DRIVE", tmp_path)
    assert not checkpoints.scratch_of(tmp_path / "checkpoints").is_relative_to(tmp_path)
    monkeypatch.setattr(checkpoints, "processes", lambda: 2)  # all of which have to find it
    assert checkpoints.scratch_of(tmp_path / "checkpoints").parent == tmp_path


def test_a_file_system_of_a_programs_own_is_told_by_its_mount(monkeypatch):
    import psutil

    mounts = [("/", "ext4"), ("/mnt/bucket", "fuse.gcsfuse"), ("/mnt/bucket/disk", "ext4")]
    told = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in mounts]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: told)
    late = [path for path in ("/mnt", "/mnt/bucket/a", "/mnt/bucket/disk/a") if checkpoints.flushes_late(Path(path))]
    assert late == ["/mnt/bucket/a"]


def losses(trainer):
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


def test_on_drive_a_training_goes_on_from_the_checkpoint_before_where_the_newest_was_cut(training, monkeypatch, capsys):
    """Drive is another disk: no rename leads there."""
    rename, tried = os.rename, []

    def across(old, new):
        if Path(old).parent == checkpoints.scratch_of(run_folder):
            tried.append(Path(old).name)
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(old, new)

    monkeypatch.setattr(checkpoints, "flushes_late", lambda path: True)
    run_folder = Path(training.storage, "drive", "checkpoints")
    monkeypatch.setattr(os, "rename", across)
    run, whole = training("drive")
    kept = run.path("checkpoints")
    assert kept == run_folder and tried == ["checkpoint-2", "checkpoint-4"]
    assert not checkpoints.scratch_of(kept).exists()
    assert [(path.name, checkpoints.damage(path)) for path in checkpoints.numbered(kept)] == [("checkpoint-2", None), ("checkpoint-4", None)]  # fmt: skip
    weights = kept / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    capsys.readouterr()
    _, again = training("drive")
    said = capsys.readouterr().out
    assert "checkpoint-4 is damaged (adapter_model.safetensors is not as it was written) and passed over" in said
    assert "train: going on from checkpoint-2" in said and losses(again) == losses(whole)


@pytest.mark.parametrize("road", ["sft", "dpo"])
@pytest.mark.parametrize("steps, warmup, taken", [(1, 0.1, 0), (1, 5, 0), (2, 5, 1), (3, 0.1, 1)])
def test_a_training_of_any_length_moves_its_weights(training, capsys, road, steps, warmup, taken):
    run, trainer = training("few", road=road, adapter=None, max_steps=steps, warmup=warmup, save_steps=10)
    assert any(weight.abs().max() > 0 for name, weight in train.trainable(trainer.model) if ".lora_B." in name)
    asked = f"the warm-up is {taken} instead of {max(1, int(warmup))} step"
    assert (asked in capsys.readouterr().out) == (steps <= max(1, warmup))
    assert train.about(trainer, run.settings)["warmup_steps"] == taken


@pytest.mark.parametrize("road", ["sft", "dpo"])
def test_in_4_bit_the_adapter_is_trained_as_finely_as_in_16(training, road):
    import torch

    _, trainer = training("narrow", road=road, adapter=None, load_in_4bit=True, max_steps=1)
    assert train.is_four_bit(trainer.model)
    assert {weight.dtype for _, weight in train.trainable(trainer.model)} == {torch.float32}


def test_a_training_that_changed_nothing_is_a_named_problem(training):
    with pytest.raises(ModelError, match=r"changed no weight in 4 steps at a learning rate of 1e-60.*Raise `learning_rate`"):  # fmt: skip
        training("still", learning_rate=1e-60)


def test_more_rows_at_once_teach_the_same_in_fewer_passes(training):
    run, few = training("few", batch_size=2, gradient_accumulation=4)
    run, many = training("many", batch_size=8, gradient_accumulation=1)
    assert losses(many) == pytest.approx(losses(few), rel=1e-4) and len(losses(many)) == 4
    weights, wanted = dict(train.trainable(many.model)), dict(train.trainable(few.model))
    assert all((weights[name] - wanted[name]).abs().max() < 1e-4 for name in wanted)
    train.record_training(run, many)
    assert {"batch_size": 8, "gradient_accumulation": 1, "rows_per_step": 8}.items() <= run.facts["train"].items()


@pytest.mark.parametrize("held, from_step", [(1000, 0), (6, 3)])
def test_pairs_of_like_length_go_together_and_each_counts_the_same(training, held, from_step, monkeypatch, capsys):
    """Beside a batch that holds a whole step: with all the memory, and where it ends so that a checkpoint is resumed in smaller batches."""
    _, whole = training("whole", road="uneven", batch_size=16, gradient_accumulation=1)
    held_at_once = []
    monkeypatch.setattr(train, "fits", keep_sizes(train.fits, held_at_once))
    _, parts = training("parts", held, from_step, "uneven", batch_size=4, gradient_accumulation=4)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4) and len(losses(parts)) == 4
    weights, wanted = dict(train.trainable(parts.model)), dict(train.trainable(whole.model))
    assert all((weights[name] - wanted[name]).abs().max() < 1e-4 for name in wanted)
    steps = [held_at_once[at : at + 4] for at in range(0, 16, 4)]
    assert all(sum(pairs for pairs, _ in step) == 16 for step in steps[:2]), "as many pairs a step as were asked for"
    assert any(len({pairs for pairs, _ in step}) > 1 for step in steps), "fewer of the long ones at once"
    places = sum(2 * pairs * length for pairs, length in held_at_once[:8])
    lengths = [length for _, length in held_at_once[:8]]
    assert places < 0.8 * 2 * 16 * 2 * max(lengths), "less padding than in one batch a step"
    if from_step:
        assert "no GPU memory" in (said := capsys.readouterr().out) and "going on from checkpoint-2" in said


def keep_sizes(fits, sizes):
    """`fits`, which notes (pairs, tokens of the longest row) of each batch of the training."""

    def noting(trainer, work):
        collate = trainer.data_collator

        def collated(rows):
            batch = collate(rows)
            sizes.append((len(rows), batch["input_ids"].shape[1]))
            return batch

        trainer.data_collator = collated
        try:
            return fits(trainer, work)
        finally:
            trainer.data_collator = collate

    return noting


@pytest.mark.parametrize(
    "road, held, from_step, said",
    [
        ("sft", 3, 1, "train: step 1 of 4"),
        ("sft", 3, 3, "train: going on from checkpoint-2"),
        ("dpo", 7, 3, "train: going on from checkpoint-2"),  # a pair is two rows
    ],
)
def test_where_the_memory_is_full_the_batch_is_halved_and_a_step_learns_from_as_many_rows(
    training, road, held, from_step, said, capsys
):
    run, trainer = training("full", held, from_step, road, batch_size=8, gradient_accumulation=1)
    lines = capsys.readouterr().out.splitlines()
    _, small = training("small", road=road, batch_size=2, gradient_accumulation=4)
    assert losses(trainer) == pytest.approx(losses(small), rel=1e-4) and len(losses(trainer)) == 4
    weights, wanted = dict(train.trainable(trainer.model)), dict(train.trainable(small.model))
    assert all((weights[name] - wanted[name]).abs().max() < 1e-4 for name in wanted)
    told = [line for line in lines if "no GPU memory" in line]
    assert [line.split("; ")[0][-12:] for line in told] == ["batch_size 8", "batch_size 4"]
    assert said in "\n".join(lines[lines.index(told[-1]) :])
    fitted = {"batch_size": 2, "gradient_accumulation": 4, "processes": 1, "rows_per_step": 8}
    assert run.facts["train"] == fitted
    train.record_training(run, trainer)
    assert fitted.items() <= run.facts["train"].items()


def test_a_resumed_run_begins_with_the_batch_that_fitted(training, capsys):
    run, _ = training("again", rows=3, batch_size=6, gradient_accumulation=2)
    assert run.facts["train"]["batch_size"] == 3 and run.facts["train"]["rows_per_step"] == 12
    shutil.rmtree(run.path("checkpoints", "checkpoint-4"))  # as if it had been killed before it
    capsys.readouterr()
    _, trainer = training("again", rows=3, batch_size=6, gradient_accumulation=2)
    assert trainer.args.per_device_train_batch_size == 3 and len(losses(trainer)) == 4
    assert "no GPU memory" not in capsys.readouterr().out


def test_where_one_row_is_too_much_it_says_what_to_change(training):
    with pytest.raises(ModelError, match=r"batch_size 1\. Lower `max_length`"):
        training("none", rows=0, batch_size=3, gradient_accumulation=1)


MEASURES = {"sft": measure.held_out_loss, "dpo": lambda trainer: dpo.preferences(trainer, beta=0.1)}


@pytest.mark.parametrize("road, held", [("sft", 3), ("dpo", 7)])
def test_where_the_memory_is_full_it_is_measured_in_smaller_batches_with_the_same_figures(training, road, held, capsys):
    _, trainer = training("measured", road=road, batch_size=8, gradient_accumulation=1, max_steps=1)
    assert trainer.args.per_device_eval_batch_size == 8
    wanted = MEASURES[road](trainer)
    full = small_memory(trainer, held, 0, training=False)
    assert MEASURES[road](trainer) == pytest.approx(wanted, abs=2e-4)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("measure:")]
    halved = [f"measure: no GPU memory for {size} rows at once; going on with {size // 2}" for size in (8, 4)]
    assert said[:2] == halved and len(said) == 2
    full.remove()
    small_memory(trainer, 0, 0, training=False)
    with pytest.raises(ModelError, match=r"batch_size 1\. Lower `max_length`"):
        MEASURES[road](trainer)


def test_the_held_out_loss_is_the_mean_over_tokens(training):
    import torch

    _, trainer = training("tokens", batch_size=8, gradient_accumulation=1, max_steps=1)
    total, tokens = 0.0, 0
    for row in trainer.eval_dataset:
        ids, labels = torch.tensor(row["input_ids"])[None], torch.tensor(row["labels"])[None, 1:]
        with torch.no_grad():
            logps = torch.log_softmax(trainer.model(input_ids=ids).logits[:, :-1].float(), dim=-1)
        learnt = labels != -100
        total -= logps.gather(-1, labels.clamp(min=0)[..., None])[..., 0][learnt].sum().item()
        tokens += learnt.sum().item()
    assert measure.held_out_loss(trainer) == pytest.approx(total / tokens, abs=2e-4)


def test_of_several_processes_none_shrinks_its_batch_while_others_wait_for_it(monkeypatch):
    batches.refuse_to_shrink(8)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ModelError, match="Halve `batch_size` and double `gradient_accumulation`"):
        batches.refuse_to_shrink(8)


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param("gguf/short-Q8_0.gguf", marks=pytest.mark.slow),
        "merged/model.safetensors",
        "publish/README.md",
        "data/train.parquet",
    ],
)
def test_a_file_that_was_deleted_is_made_again(copied, cli, lost):
    (copied / lost).unlink()
    again = cli("sft", *sets(**DEMO, storage=copied.parent))
    assert again.returncode == 0 and (copied / lost).is_file(), again.stderr
    assert "train: done already, skipped" in again.stdout


def test_a_second_run_skips_everything_and_a_changed_setting_redoes_what_depends_on_it(copied, cli):
    arguments = DEMO | {"storage": copied.parent}
    again = cli("sft", *sets(**arguments))
    assert again.stdout.count("done already, skipped") == 8
    changed = cli("sft", *sets(**arguments | {"merged": False}))
    assert "train: done already, skipped" in changed.stdout and "card: done in" in changed.stdout
    assert not (copied / "merged").exists() and (copied / "publish" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_what_unsloth_prints_of_its_cpu_backend_and_of_accumulation_is_not_shown(base, tmp_path, cli):
    few = {"max_steps": 2, "batch_size": 4, "gradient_accumulation": 2, "eval_answers": 2, "quantizations": "[]"}
    few["metric"] = "rouge"
    result = cli("sft", *sets(**SHORT | few, storage=tmp_path))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "difference, too few for a sure interval (rouge of 2 of 2 answers)" in " ".join(result.stdout.split())
    assert "Unsloth" not in result.stdout + result.stderr and "num_items_in_batch" not in result.stderr
