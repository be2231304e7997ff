"""The first minutes of a training: what would fail late fails early, the batch is what the memory holds, and no trace is left."""

import functools
import json
import math
from types import SimpleNamespace

import pytest

from autosloth.data.stage import prepare_data
from autosloth.errors import ModelError, StorageError, VerifyError
from autosloth.export import head_of
from autosloth.run import Run
from autosloth.settings import DPOSettings, SFTSettings, SPINSettings
from autosloth.training import batches, dpo, spin, train, trial
from autosloth.training.checkpoints import trainable

ROADS = {"sft": (SFTSettings, train.make_trainer), "dpo": (DPOSettings, dpo.make_trainer)}


@pytest.fixture(scope="module")
def prepared(engine, base, tmp_path_factory):
    """A function from a road to a run with the demo's rows for it, which is not trained."""

    @functools.cache
    def run(road):
        run = Run.create(ROADS[road][0](model="demo", dataset="demo", storage=str(tmp_path_factory.mktemp(road))))
        prepare_data(run)
        return run

    return run


@pytest.fixture
def made(prepared, tmp_path):
    """made("name", road=, **settings) -> (run, trainer, tokenizer), ready to train."""

    def make(name, road="sft", **values):
        settings, make_trainer = ROADS[road]
        few = {"batch_size": "auto", "gradient_accumulation": 8, "max_steps": 4, "save_steps": 2, "warmup": 1}
        few |= {"storage": str(tmp_path), "run_name": name}
        run, rows = Run.create(settings(model="demo", dataset="demo", **{**few, **values})), prepared(road)
        (run.folder / "data").symlink_to(rows.path("data"))
        model, tokenizer = train.load_model(run.settings), train.load_tokenizer(run.settings, rows.path("data", "chat_template.jinja"))  # fmt: skip
        return run, make_trainer(run, model, tokenizer, run.rows("train"), run.rows("eval"), []), tokenizer

    return make


def test_a_trial_says_what_it_found_in_three_lines_and_leaves_no_trace(made, capsys):
    import torch

    run, tried, tokenizer = made("tried", lora_dropout=0.1)  # drawn by chance
    capsys.readouterr()
    trial.try_out(run, tried, tokenizer)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "trial: 8 rows at once, 1 pass a step",
        "trial: a checkpoint was written and read back; answers in a batch are those of single prompts",
    ]
    assert lines[2].startswith("trial: the adapter has its place in the GGUF, and ") and len(lines) == 3
    assert "texts become the same tokens there (" in lines[2]
    assert (run.facts["trial"]["batch_size"], run.facts["trial"]["answers_at_once"]) == (8, 8)
    assert run.facts["train"] == {"batch_size": 8, "gradient_accumulation": 1, "processes": 1, "rows_per_step": 8}
    assert not run.is_trained and not [path for path in run.folder.iterdir() if path.name.startswith(".trial")]
    train.go_on(run, tried)

    run, untried, _ = made("untried", lora_dropout=0.1)
    batches.take_batches(untried, 8)
    train.go_on(run, untried)
    assert losses(tried) == losses(untried) and len(losses(tried)) == 4
    wanted = dict(trainable(untried.model))
    assert all(torch.equal(weight, wanted[name]) for name, weight in trainable(tried.model))
    same = dict.fromkeys(("output_dir", "per_device_eval_batch_size"))
    assert tried.args.to_dict() | same == untried.args.to_dict() | same


def losses(trainer):
    return [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def gpu(monkeypatch):
    """gpu(rows, gb) -> the sizes that are tried, on a GPU of 16 GB that holds so many rows; gb: what a step of so many takes."""

    def play(rows, gb):
        tried, take = [], trial.one_step

        def one_step(trainer, longest, size, checkpoint=None):
            tried.append(size)
            if size > rows:
                return None
            take(trainer, longest, size, checkpoint)
            return gb(size)

        monkeypatch.setattr(trial, "one_step", one_step)
        monkeypatch.setattr(trial, "memory", lambda: (16.0, 1.0))
        return tried

    return play


@pytest.mark.parametrize(
    "given, held, gb, fitting, steps",
    [
        ({}, 8, lambda rows: 1 + rows / 2, 8, [1, 1, 2, 8]),
        ({}, 5, lambda rows: 1 + rows / 2, 4, [1, 1, 2, 8, 4]),
        ({}, 8, lambda rows: 1 + 3 * rows, 4, [1, 1, 2, 4]),  # 8 would take 25 GB, so they are not tried
        ({}, 8, lambda rows: 1 + (3 * rows if rows < 4 else 4 * rows), 2, [1, 1, 2, 4]),  # more than it promised
        ({}, 8, lambda rows: 7 * rows, 1, [1, 1, 2]),
        ({}, 1, lambda rows: 3, 1, [1, 1, 2]),
        ({"gradient_accumulation": 9}, 9, lambda rows: 2, 9, [1, 1, 3, 9]),
        ({"gradient_accumulation": 1}, 9, lambda rows: 2, 1, [1, 1]),
        ({"batch_size": 4, "gradient_accumulation": 4}, 16, lambda rows: 2, 4, [4, 4]),
        ({"batch_size": 8, "gradient_accumulation": 2}, 3, lambda rows: 2, 2, [8, 4, 2, 2]),
    ],
)
def test_the_batch_is_what_steps_on_the_longest_rows_leave_room_for(made, gpu, given, held, gb, fitting, steps):
    run, trainer, _ = made("fit", **given)
    tried = gpu(held, gb)
    with trial.left_as_it_was(trainer):
        trainer.args.output_dir = str(run.path("checkpoints"))
        fit = trial.choose_batch(
            trainer, run.settings, trial.longest_first(trainer.train_dataset, run.settings.rows_per_step)
        )
    assert (fit.rows, tried) == (fitting, steps)


def test_where_one_row_does_not_fit_it_says_so_before_the_training(made, gpu):
    run, trainer, tokenizer = made("none")
    gpu(0, lambda rows: 1)
    with pytest.raises(ModelError, match=r"out of memory with batch_size 1\. Lower `max_length`"):
        trial.try_out(run, trainer, tokenizer)
    assert trainer.args.per_device_train_batch_size == 2 and not run.facts.get("trial")


@pytest.mark.parametrize("road", ["sft", "dpo"])
def test_the_rows_of_a_trial_are_the_longest(made, road):
    _, trainer, _ = made("longest", road=road, adapter=None)
    rows, half = trainer.train_dataset, len(trainer.train_dataset) // 2
    wanted, found = (lengths_of(each) for each in (rows, trial.longest_first(rows, half)))
    assert found == sorted(wanted, reverse=True)[:half] and len(set(found)) > 1


def lengths_of(rows):
    return list(rows["length"]) if "length" in rows.column_names else list(map(len, rows["input_ids"]))


def test_a_loss_that_is_no_number_on_the_longest_rows_stops_it_there(made, monkeypatch):
    run, trainer, tokenizer = made("wild")
    compute = trainer.compute_loss
    monkeypatch.setattr(trainer, "compute_loss", lambda *given, **named: compute(*given, **named) * math.nan)
    with pytest.raises(ModelError, match="The loss is no number on the longest rows: training diverged"):
        trial.try_out(run, trainer, tokenizer)


@pytest.mark.parametrize("fault", ["other", "gone", "cut"])
def test_a_checkpoint_that_does_not_hold_the_adapter_is_found_at_once(made, monkeypatch, fault):
    from safetensors.torch import load_file, save_file

    find = trial.numbered

    def damaged(folder):
        (found,) = find(folder)
        path = found / "adapter_model.safetensors"
        save_file({name: weight * 1.5 for name, weight in load_file(path).items()}, path)
        if fault == "cut":
            path.write_bytes(path.read_bytes()[:-100])
        return [] if fault == "gone" else [found]

    run, trainer, tokenizer = made("lost")
    monkeypatch.setattr(trial, "numbered", damaged)
    with pytest.raises(StorageError, match=r"does not hold the adapter that was trained\. Choose another `storage`"):
        trial.try_out(run, trainer, tokenizer)
    assert not run.is_trained


@pytest.mark.parametrize(
    "found, again, steps",
    [
        ({1: 2.0, 4: 5.0}, False, [1, 4]),
        ({1: 4.0}, True, [1]),  # four times 3 GB more than the 1 that are there would be too much
        ({1: 2.0, 4: 12.0}, True, [1, 4]),  # more than it promised
        ({1: None}, True, [1]),
        ({1: 2.0, 4: None}, True, [1, 4]),
    ],
)
def test_blocks_are_computed_again_unless_all_rows_have_room_without(monkeypatch, found, again, steps):
    tried, trainer = [], SimpleNamespace(args=SimpleNamespace(gradient_checkpointing=True), model=None)
    monkeypatch.setattr(trial, "compute_blocks_again", lambda model, again: None)

    def step(rows):
        assert not trainer.args.gradient_checkpointing
        tried.append(rows)
        return found[rows]

    fit = trial.without_checkpointing(trainer, step, trial.Fit(4, True, 3.0), resting=1.0, room=10.0)
    assert (fit.again, trainer.args.gradient_checkpointing, tried) == (again, again, steps)
    assert fit.rows == 4 and fit.gb == (3.0 if again else 5.0)


@pytest.fixture
def head(finished, tmp_path):
    """The run that is trained, its tokenizer, and the head of a GGUF of its adapter."""
    run = Run.open(finished)
    tokenizer = train.load_tokenizer(run.settings, run.path("data", "chat_template.jinja"))
    return run, tokenizer, head_of(run.settings, run.path("adapter"), tmp_path / "head")


def test_a_gguf_that_would_have_other_tokens_is_refused_unless_it_is_published_all_the_same(head):
    from tokenizers import normalizers

    run, tokenizer, file = head
    assert file.stat().st_blocks * 512 < 2**20, "a hole in place of the weights"
    assert trial.compare(run, tokenizer, file).endswith(" texts become the same tokens there")
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizers.Sequence([normalizers.Lowercase(), backend.normalizer])
    with pytest.raises(VerifyError, match=r"A GGUF of this model would not be it: .* become other tokens than in training .*Or set `quantizations: \[\]`"):  # fmt: skip
        trial.compare(run, tokenizer, file)
    run.settings = run.settings.model_copy(update={"publish_unverified": True})
    assert "it would fail its proof, which `publish_unverified` allows" in trial.compare(run, tokenizer, file)


@pytest.mark.parametrize("outcome", ["right", "wrong"])
def test_tokens_are_compared_at_the_first_checkpoint_by_which_llama_cpp_is_compiled(
    tmp_path, monkeypatch, capsys, outcome
):
    ready, folder = [False, True, True], SimpleNamespace(cleanup=lambda: None)
    monkeypatch.setattr(trial, "compiled", lambda: ready.pop(0))

    def compare():
        if outcome == "wrong":
            raise VerifyError("A GGUF of this model would not be it: others.", "Do not use the file.")
        return "67 texts become the same tokens there"

    callback = trial.when_compiled(compare, folder)
    for _ in range(3):
        callback.on_save(None, None, None)
    told = {
        "right": "trial: of the GGUF 67 texts become the same tokens there\n",
        "wrong": "trial: A GGUF of this model would not be it: others. Do not use the file.\n",
    }
    assert capsys.readouterr().out == told[outcome]


def test_a_head_that_llama_cpp_does_not_read_is_told_as_what_it_is(head):
    run, tokenizer, file = head
    file.write_bytes(file.read_bytes()[:64])
    with pytest.raises(
        VerifyError, match=r"does not read what its converter makes of this model: .*Set `quantizations: \[\]`"
    ):
        trial.compare(run, tokenizer, file)


def test_a_batch_that_does_not_fit_beside_the_optimizer_is_made_smaller(made, monkeypatch):
    run, trainer, _ = made("beside", batch_size=4, gradient_accumulation=2)
    take, tried = trial.one_step, []

    def one_step(trainer, longest, size, checkpoint=None):
        tried.append((size, checkpoint is not None))
        return None if checkpoint and size > 2 else take(trainer, longest, size, checkpoint)

    monkeypatch.setattr(trial, "one_step", one_step)
    with trial.left_as_it_was(trainer):
        trainer.args.output_dir = str(run.path("checkpoints"))
        fit = trial.choose_batch(trainer, run.settings, trial.longest_first(trainer.train_dataset, 8))
    assert fit.rows == 2 and tried == [(4, False), (4, True), (2, False), (2, True)]


def test_where_the_batch_is_part_of_the_objective_a_trial_does_not_choose_it(made, gpu):
    run, trainer, _ = made("anchored", road="dpo", adapter=None, sft_weight=1.0)
    tried = gpu(8, lambda rows: 1.0)
    with trial.left_as_it_was(trainer):
        trainer.args.output_dir = str(run.path("checkpoints"))
        fit = trial.choose_batch(trainer, run.settings, trial.longest_first(trainer.train_dataset, 8))
    assert fit.rows == 2 and tried == [2, 2]


def test_before_self_play_the_model_that_comes_first_keeps_its_dropout(prepared, tmp_path):
    import torch

    rows = prepared("sft")
    run = Run.create(
        SPINSettings(
            model="demo", dataset="demo", storage=str(tmp_path), run_name="drop", lora_dropout=0.1, adapter=None
        )
    )
    (run.folder / "data").symlink_to(rows.path("data"))
    game = spin.Game(run)
    game.try_out()
    assert {module.p for module in game.model.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}
    assert "ref" not in game.model.peft_config and run.facts["trial"]["batch_size"] == 16


def test_what_is_not_to_be_a_gguf_is_not_tried_as_one(finished, monkeypatch):
    run = Run.open(finished)
    run.settings = run.settings.model_copy(update={"quantizations": []})
    assert trial.convert(run, None, None, None) == "no GGUF is asked for"


def test_a_run_is_tried_once_on_each_kind_of_gpu_and_not_on_several(tmp_path, monkeypatch):
    import torch

    run = Run.create(SFTSettings(model="demo", dataset="demo", storage=str(tmp_path)))
    assert not trial.is_due(run) and run.facts["trial"] == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    assert trial.is_due(run)
    run.record("trial", gpu="Tesla T4")
    assert not trial.is_due(run)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA L4")
    assert trial.is_due(run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not trial.is_due(run)


def test_what_was_left_out_for_speed_is_what_a_full_memory_takes_back_first(made, monkeypatch, capsys):
    run, trainer, _ = made("less")
    run.record("trial", gradient_checkpointing=False)
    monkeypatch.setattr(trial, "compute_blocks_again", lambda model, again: None)
    train.take_less(run, trainer)
    assert "no GPU memory without gradient checkpointing; going on with it" in capsys.readouterr().out
    assert trainer.args.gradient_checkpointing and trainer.args.per_device_train_batch_size == 2
    train.take_less(run, trainer)
    assert trainer.args.per_device_train_batch_size == 1
    assert json.loads(run.path("facts.json").read_text())["trial"]["gradient_checkpointing"] is True
