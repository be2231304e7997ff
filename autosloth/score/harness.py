"""The tuned model and its base on the tasks of EleutherAI's lm-evaluation-harness, by its public interface (`lm_eval.simple_evaluate`)."""

from __future__ import annotations

import importlib.util
from typing import Any

from ..errors import DataError, SettingsError
from ..models import answering, context_length
from ..output import counted, plus_minus, say
from ..run import Run, known_hash
from .compare import ANSWERS_AT_ONCE, load_tuned, refuse_unready, speaking

BENCHMARKS = "benchmarks"  # in facts.json
LONGEST = 4096  # tokens of a question with its examples, where the model takes as many
STDERR = "_stderr"


def score_tasks(run: Run, tasks: list[str], limit: int | None = None, chat_template: bool = False) -> None:
    """Take tasks of lm-eval with the run's model and with its base, and record what it measured of both.

    tasks: names of tasks, groups or tags, or YAML files of such; limit: the first so many questions of each task, which is for a look and
    not for a comparison with others; chat_template: put the questions into the template that was trained, which lm-eval leaves out by default.
    Raises SettingsError, DataError, ModelError.
    """
    refuse_missing()
    refuse_unready(run)
    manager, names = task_manager(), list(dict.fromkeys(tasks))
    refuse_unusable(manager, names)
    found = evaluated(run, manager, names, limit, chat_template)
    adapter = known_hash(run.path("adapter", "adapter_model.safetensors"))
    asked = {"limit": limit, "chat_template": chat_template, "adapter": adapter}
    entries = [entry | asked for entry in entries_of(found)]
    record(run, entries)
    for line in told(entries):
        say(line)


def refuse_missing() -> None:
    """Raises SettingsError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        todo = "Run `pip install lm-eval`, or compare the models on a file of your own with `--data` and `--metric`."
        raise SettingsError(
            "`--tasks` needs lm-eval (EleutherAI's lm-evaluation-harness), which is not installed.", todo
        )


def task_manager() -> Any:
    """lm-eval's, which knows its tasks by name."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def refuse_unusable(manager: Any, names: list[str]) -> None:
    """Raises SettingsError for a name that lm-eval does not know or a task that runs what a model wrote, DataError where questions cannot be had."""
    for name in names:
        try:
            loaded = manager.load([name])
        except KeyError:
            raise SettingsError(
                f"lm-eval knows no task {name!r}.",
                "`lm-eval ls tasks` lists those that it knows; a YAML file is one too.",
            ) from None
        except Exception as error:  # whatever the task's own code and the download of its questions raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            todo = "Its questions come from the Hub: see whether it is reached, or leave the task out."
            raise DataError(f"lm-eval cannot load the task {name!r} ({reason}).", todo) from None
        if any(getattr(task, "UNSAFE_CODE", False) for task in loaded["tasks"].values()):
            raise SettingsError(f"The task {name!r} runs code that the model wrote, on this machine.", "Leave it out.")


def evaluated(
    run: Run, manager: Any, names: list[str], limit: int | None, chat_template: bool
) -> dict[str, dict[str, Any]]:
    """What lm-eval tells of the `tuned` model and of the `base`, each asked the same."""
    import torch
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    longest = min(LONGEST, context_length(run.settings) or LONGEST)
    _, tokenizer, model = load_tuned(run, longest)
    at_once = "auto" if torch.cuda.is_available() else ANSWERS_AT_ONCE  # as many as there is room for
    found = {}
    with answering(model):
        lm = HFLM(model, tokenizer=tokenizer, max_length=longest, batch_size=at_once, max_batch_size=ANSWERS_AT_ONCE)
        for who in ("tuned", "base"):
            with speaking(model, who):
                found[who] = simple_evaluate(
                    lm, tasks=list(names), limit=limit, task_manager=manager, apply_chat_template=chat_template,
                    log_samples=False,
                )  # fmt: skip
    return found


def entries_of(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Each metric of each task, or of the group that it belongs to, with lm-eval's standard errors; what is no number is left out."""
    import lm_eval

    one = found["tuned"]
    inner = {name for names in one["group_subtasks"].values() for name in names}
    entries = []
    for task in (name for name in one["results"] if name not in inner):
        counts = one["n-samples"].get(task)
        for key, value in one["results"][task].items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith(STDERR) or isinstance(value, (bool, str)) or value is None:
                continue
            sides = {who: side(found[who]["results"][task], metric, kind) for who in ("base", "tuned")}
            entries.append({
                **{"task": task, "metric": metric, "filter": kind, **sides},
                "higher_is_better": one["higher_is_better"].get(task, {}).get(metric),
                "questions": one["results"][task].get("sample_len") or (counts or {}).get("effective"),
                **{"of": (counts or {}).get("original"), "shots": one["n-shot"].get(task)},
                **{"version": one["versions"].get(task), "lm_eval": lm_eval.__version__},
            })  # fmt: skip
    return entries


def side(results: dict[str, Any], metric: str, kind: str) -> dict[str, float | None]:
    """A metric's value, and its standard error where lm-eval gives one.

    >>> side({"acc,none": 0.5, "acc_stderr,none": 0.07071}, "acc", "none"), side({"f1,none": 0.5, "f1_stderr,none": "N/A"}, "f1", "none")
    ({'value': 0.5, 'stderr': 0.0707}, {'value': 0.5, 'stderr': None})
    """
    error = results.get(f"{metric}{STDERR},{kind}")
    return {
        "value": round(float(results[f"{metric},{kind}"]), 4),
        "stderr": round(float(error), 4) if isinstance(error, (int, float)) else None,
    }


def record(run: Run, entries: list[dict[str, Any]]) -> None:
    """Keep what was measured in facts.json, in place of what is there of the same tasks, and of what is there of an adapter that is no more."""
    adapter, measured = entries[0]["adapter"] if entries else None, {entry["task"] for entry in entries}
    kept = [
        other
        for other in run.facts.get(BENCHMARKS, [])
        if other["adapter"] == adapter and other["task"] not in measured
    ]
    run.put(BENCHMARKS, [*kept, *entries])


def told(entries: list[dict[str, Any]]) -> list[str]:
    """What lm-eval measured, a line for each metric."""
    lines = [
        f"score: lm-eval {entries[0]['lm_eval']}, standard errors behind ±"
        if entries
        else "score: lm-eval measured nothing"
    ]
    for entry in entries:
        base, tuned = (plus_minus(entry[who]) for who in ("base", "tuned"))
        change = entry["tuned"]["value"] - entry["base"]["value"]
        lines.append(f"  {named(entry)}: {base} base model, {tuned} tuned model, {change:+.4f} ({asked(entry)})")
    return lines


def named(entry: dict[str, Any]) -> str:
    """The task and its metric, with the filter where there is one.

    >>> named({"task": "gsm8k", "metric": "exact_match", "filter": "strict-match"})
    'gsm8k exact_match, strict-match'
    """
    return f"{entry['task']} {entry['metric']}" + (f", {entry['filter']}" if entry["filter"] != "none" else "")


def asked(entry: dict[str, Any]) -> str:
    """How the questions were asked.

    >>> asked({"questions": 50, "of": 1319, "limit": 50, "shots": 5, "chat_template": False})
    'the first 50 of 1,319 questions, 5 examples before each'
    """
    count, of = entry["questions"], entry["of"]
    first = (
        f"the first {count:,} of {of:,} questions"
        if count and of and count < of
        else counted(count or of or 0, "question")
    )
    shots = f", {counted(entry['shots'], 'example')} before each" if entry["shots"] else ""
    return first + shots + (", in the chat template" if entry["chat_template"] else "")
