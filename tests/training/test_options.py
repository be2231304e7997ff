"""Options of training that papers propose: each does what it says, and what is exported is what was trained."""

import itertools
import math
import shutil

import pytest

from autosloth.demo import demo_base
from autosloth.errors import ModelError, SettingsError
from autosloth.models.engine import load_model
from autosloth.models.residual import exchange, save_adapter, take_start
from autosloth.run import read_json
from autosloth.settings import DPOSettings, SFTSettings, SPINSettings
from autosloth.training import checkpoints, train
from autosloth.weights import Adapter

STARTS = ("pissa", "olora")


def logged(trainer, name):
    return [float(entry[name]) for entry in trainer.state.log_history if name in entry]


def weights_of(model):
    """What each layer does as a whole, base and adapter: W + s B A."""
    from peft.tuners.lora import LoraLayer

    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, LoraLayer)]
    return {name: (each.get_base_layer().weight + each.get_delta_weight("default")).detach() for name, each in layers}


def distance(some, others):
    assert some.keys() == others.keys() and others
    return max((some[name] - others[name]).abs().max().item() for name in others)


@pytest.fixture(scope="module")
def of_base(engine, base):
    """The weights of the base's layers."""
    return weights_of(load_model(SFTSettings(model="demo", dataset="demo")))


@pytest.mark.parametrize("start", STARTS)
def test_an_adapter_that_starts_in_the_base_starts_as_the_base(of_base, start):
    model = load_model(SFTSettings(model="demo", dataset="demo", init_lora_weights=start))
    assert distance(weights_of(model), of_base) < 1e-5
    assert all(weight.abs().max() > 1e-3 for weight in model.adapter_start.values())  # B too


@pytest.mark.parametrize("start, road", zip(STARTS, ("sft", "dpo"), strict=True))
def test_such_an_adapter_is_saved_as_a_plain_one_on_the_base_itself(training, tmp_path, start, road):
    """As PEFT alone takes it, and the export; in one case by rsLoRA, whose scale goes by the root of the rank."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    values = {"adapter": None, "init_lora_weights": start, "use_rslora": start == "pissa", "learning_rate": 1e-3}
    run, trainer = training("begun", road=road, **values)
    if road == "dpo":  # whose reference is a copy of the start, and so the base
        assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-4)
        trainer.model.delete_adapter("ref")
    trained, folder = weights_of(trainer.model), tmp_path / "plain"
    save_adapter(trainer.model, folder)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(demo_base()), folder)
    assert distance(weights_of(again), trained) < 1e-5 < distance(trained, weights_of(load_model(SFTSettings(model="demo", dataset="demo"))))  # fmt: skip
    assert again.peft_config["default"].r == 32 == train.adapter_shape(trainer.model)["saved_r"]
    assert len(Adapter.read(folder, demo_base()).pairs) == 28
    with_it = load_model(run.settings.model_copy(update={"adapter": str(folder)}))  # as `autosloth score` loads it
    assert distance(weights_of(with_it), trained) < 1e-5 and not hasattr(with_it, "adapter_start")


def test_a_training_that_starts_in_the_base_goes_on_from_its_checkpoint(training, capsys):
    values = {"init_lora_weights": "pissa", "learning_rate": 1e-3}
    run, whole = training("whole", **values)
    shutil.rmtree(run.path("checkpoints", "checkpoint-4"))
    _, again = training("whole", **values)
    assert "going on from checkpoint-2" in capsys.readouterr().out
    assert distance(weights_of(again.model), weights_of(whole.model)) == 0
    assert logged(again, "loss") == logged(whole, "loss")


def test_a_machine_that_took_other_parts_out_of_the_base_goes_on_with_those_of_the_checkpoint(training, capsys):
    import torch
    from peft import load_peft_weights, set_peft_model_state_dict

    run, trainer = training("there", init_lora_weights="pissa", learning_rate=1e-3)
    wanted, checkpoint = weights_of(trainer.model), run.path("checkpoints", "checkpoint-4")
    here, noise = load_model(run.settings), torch.Generator().manual_seed(0)
    other = {name: w + 0.01 * torch.randn(w.shape, generator=noise) for name, w in here.adapter_start.items()}
    exchange(here, here.adapter_start, other)
    here.adapter_start = other
    take_start(here, checkpoint)
    set_peft_model_state_dict(here, load_peft_weights(str(checkpoint), device="cpu"))
    assert distance(weights_of(here), wanted) < 1e-5
    (checkpoint / "start.safetensors").unlink()
    with pytest.raises(ModelError, match="does not tell where its adapter started"):
        take_start(here, checkpoint)


@pytest.mark.parametrize("values, told", [
    ({"load_in_4bit": True}, "needs the base in 16 bit; set `load_in_4bit: false`"),
    ({"use_dora": True}, "cannot be had with `use_dora`"),
    ({"adapter": "demo"}, "is for a fresh adapter, and `adapter` is demo; set `adapter: null`"),
    ({"modules_to_save": ["lm_head"]}, "cannot be had with `modules_to_save`"),
])  # fmt: skip
@pytest.mark.parametrize("road", [SFTSettings, DPOSettings])
def test_what_cannot_start_in_the_base_is_a_named_problem(road, values, told):
    with pytest.raises(SettingsError, match=told):
        road.load({"model": "demo", "init_lora_weights": "olora", "adapter": None, **values})


def test_self_play_has_no_such_start():
    with pytest.raises(
        SettingsError, match="`init_lora_weights` is a setting of `autosloth sft` and `autosloth dpo`, not of"
    ):
        SPINSettings.load({"init_lora_weights": "pissa"})


def test_of_lora_plus_b_learns_so_many_times_as_fast(training):
    _, plain = training("plain")
    _, plus = training("plus", lora_plus_ratio=16, weight_decay=0.02)
    names = {weight: name for name, weight in train.trainable(plus.model)}
    rates = {(".lora_B." in names[weight], group["lr"], group["weight_decay"])
             for group in plus.optimizer.param_groups for weight in group["params"]}  # fmt: skip
    peak = plus.args.learning_rate
    assert sum(len(group["params"]) for group in plus.optimizer.param_groups) == len(names)
    assert {(b, weight_decay) for b, _, weight_decay in rates} == {(True, 0.02), (False, 0.02)}
    first = {b: group["initial_lr"] for group in plus.optimizer.param_groups for w in group["params"] for b in [".lora_B." in names[w]]}  # fmt: skip
    assert first == {True: pytest.approx(16 * peak), False: pytest.approx(peak)}
    moved = [sum(w.abs().sum().item() for name, w in train.trainable(each.model) if ".lora_B." in name) for each in (plain, plus)]  # fmt: skip
    assert moved[1] > 4 * moved[0]  # B begins at 0


@pytest.mark.parametrize("name, kind", [("adafactor", "Adafactor"), ("lion", "Lion")])
def test_each_optimizer_is_the_one_of_its_name_and_goes_on_after_a_stop(training, name, kind):
    values = {"optimizer": name, "learning_rate": 1e-4, "lora_plus_ratio": 2 if name == "lion" else 1}
    run, whole = training(name, **values)
    optimizer = getattr(whole.optimizer, "optimizer", whole.optimizer)
    assert type(optimizer).__name__ == kind
    shutil.rmtree(run.path("checkpoints", "checkpoint-4"))
    _, again = training(name, **values)
    assert distance(dict(train.trainable(again.model)), dict(train.trainable(whole.model))) == 0


def rates(training, scheduler, **values):
    _, trainer = training(scheduler, scheduler=scheduler, max_steps=12, save_steps=6, warmup=2, learning_rate=1e-3, **values)  # fmt: skip
    return [round(rate * 1e3, 3) for rate in logged(trainer, "learning_rate")]


def test_a_stable_rate_falls_in_the_last_fifth_of_the_steps(training):
    assert rates(training, "warmup_stable_decay") == [
        0,
        0.5,
        *[1] * 8,
        1,
        0.5,
    ]  # of step 1 the warm-up's first, of 12 the last before 0


def test_a_cosine_with_restarts_rises_as_often_as_it_is_to_fall():
    import torch
    from transformers import get_scheduler

    settings = SFTSettings(scheduler="cosine_with_restarts", scheduler_cycles=3)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    steps = get_scheduler(settings.scheduler, optimizer, 2, 62, train.schedule(settings, 62))
    rates = [optimizer.step() or steps.step() or steps.get_last_lr()[0] for _ in range(61)]
    assert [step for step, (one, other) in enumerate(itertools.pairwise(rates), 2) if other > one] == [2, 22, 42]


def noises(model):
    """[(training, alpha at least), ...] of each forward pass: the largest noise on the embeddings that come to the first block, times sqrt(L d)."""
    found, ids = [], []
    table = model.get_input_embeddings()

    def compare(module, args, kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        noise = (hidden - table.weight[ids[-1]]).abs().max().item()
        found.append((module.training, noise * math.sqrt(hidden.shape[1] * hidden.shape[2])))

    table.register_forward_pre_hook(lambda module, args: ids.append(args[0]))
    model.base_model.model.model.layers[0].register_forward_pre_hook(compare, with_kwargs=True)
    return found


def test_the_noise_on_the_embeddings_is_that_of_the_paper_in_training_alone(training, monkeypatch):
    """Uniform within alpha / sqrt(L d) (arXiv 2310.05914, algorithm 1); once, also where the memory was too small at first."""
    make, told = train.load_model, []

    def load(settings):
        model = make(settings)
        told.append(noises(model))
        return model

    monkeypatch.setattr(train, "load_model", load)
    _, trainer = training("noise", rows=4, from_step=1, neftune_alpha=5, batch_size=8, gradient_accumulation=1)
    trainer.evaluate()
    assert trainer.args.per_device_train_batch_size == 4
    assert {learning for learning, _ in told[0]} == {True, False}
    assert all(4.7 < alpha < 5.001 if learning else alpha == 0 for learning, alpha in told[0])


def test_noise_by_the_length_of_a_row_is_not_for_packed_ones():
    with pytest.raises(SettingsError, match="`neftune_alpha` is a noise by the length of a row"):
        SFTSettings.load({"neftune_alpha": 5, "packing": True})


def test_as_many_checkpoints_stay_as_are_asked_for(training):
    names = {total: [path.name for path in checkpoints.numbered(training(f"total-{total}", save_total=total, save_steps=1)[0].path("checkpoints"))]
             for total in (1, 3)}  # fmt: skip
    assert names == {1: ["checkpoint-4"], 3: ["checkpoint-2", "checkpoint-3", "checkpoint-4"]}
    assert read_json(training("total-1", save_total=1)[0].path("checkpoints", "checkpoint-4", "trainer_state.json"))["global_step"] == 4  # fmt: skip
