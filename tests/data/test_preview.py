"""The preview shows what the model will read, counts what the trainer will do, and lets no row's text become markup."""

import json
import re
import subprocess
import sys

import pytest

from autosloth.data.preview import BINS, axis, histogram, plan, show_preview
from autosloth.data.stage import prepare_data
from autosloth.run import Run
from autosloth.settings import SFTSettings


@pytest.fixture
def previewed(engine, base, tmp_path, capsys):
    """A function that prepares and previews rows: the run, what was printed, and the page."""

    def preview(rows, **values):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"model": "demo", "dataset": str(tmp_path / "rows.jsonl"), "storage": str(tmp_path)}
        run = Run.create(SFTSettings.load(settings | values))
        prepare_data(run)
        capsys.readouterr()
        show_preview(run)
        return run, capsys.readouterr().out, run.path("data", "preview.html").read_text()

    return preview


ROWS = [{"question": f"What is <b>{i}</b> + 1?", "answer": f"It is {i + 1}, 十二."} for i in range(30)]


def spans_of(page, kind):
    """The text of the first row's tokens of a kind."""
    row = page.split('<div class="row">')[1]
    return "".join(re.findall(rf'<span class="{kind}(?: special)?">([^<]*)</span>', row))


def test_the_page_shows_each_token_as_given_or_learnt_with_the_special_ones_marked(previewed):
    run, _, page = previewed(ROWS)
    first = run.rows("train")[0]
    answer = first["messages"][1]["content"]
    assert spans_of(page, "learnt") == f"{answer}&lt;/s&gt;"
    assert spans_of(page, "given").startswith("&lt;s&gt;### Instruction:↵\nWhat is &lt;b&gt;")
    assert '<span class="learnt special">&lt;/s&gt;</span>' in page
    assert "<b>0</b> +" not in page and "<script" not in page


def test_the_terminal_shows_the_same_as_text(previewed):
    run, printed, _ = previewed(ROWS)
    facts = run.facts["data"]
    assert f"{facts['learnt_tokens']:,} of {facts['train_tokens']:,} tokens per epoch are learnt" in printed
    assert "given    | <s>### Instruction:" in printed and re.search(r"learnt   \| It is \d+, 十二\.</s>", printed)
    assert sum(int(line.rsplit(" ", 1)[1]) for line in printed.splitlines() if " to " in line and "#" in line) == 30


def test_what_lies_beyond_max_length_is_shown_as_cut_and_counted(previewed):
    rows = [{"question": "Go on?", "answer": "word " * 60 + str(i)} for i in range(10)]
    _, printed, page = previewed([*rows, *ROWS], max_length=64)
    assert "cut      |" in printed and "< max_length" in printed
    assert '<span class="cut">' in page and "25.0 %</b> cut at max_length" in page and 'class="limit' in page


def test_a_plan_is_what_the_trainer_does(tmp_path, engine):
    from transformers import Trainer, TrainingArguments

    for rows, batch, accumulation, epochs in ((7, 2, 4, 1.0), (100, 2, 4, 2.5), (33, 16, 1, 3.0), (5, 8, 2, 0.5)):
        arguments = TrainingArguments(
            str(tmp_path), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, num_train_epochs=epochs, report_to=[]
        )  # fmt: skip
        import torch

        trainer = Trainer(torch.nn.Linear(1, 1), arguments, train_dataset=list(range(rows)))
        *_, steps = trainer.set_initial_training_values(arguments, trainer.get_train_dataloader())
        settings = SFTSettings(batch_size=batch, gradient_accumulation=accumulation, epochs=epochs, max_steps=0)
        assert plan(rows, settings)["steps"] == steps, (rows, batch, accumulation, epochs)
    assert plan(80, SFTSettings(max_steps=60))["epochs"] == 6.0


def test_the_histogram_counts_every_row_and_marks_max_length_where_it_is():
    lengths = [10] * 90 + [100] * 9 + [5000]
    made = histogram(lengths, 64)
    assert sum(made["rows"]) == 100 and made["rows"][-1] >= 1
    drawn = axis({"histogram": made}, 64)
    *_, rows, height = next(bar for bar in drawn["bars"] if bar[0] <= 10 <= bar[1])
    assert (rows, height) == (90, 100) and drawn["limit"] == pytest.approx(100 * 64 / (made["width"] * BINS))
    assert axis({"histogram": histogram(lengths, 100_000)}, 100_000)["limit"] is None
    assert histogram([1, 1], 16)["width"] == 1


def test_changed_steps_are_shown_without_preparing_the_rows_again(previewed, capsys):
    run, _, _ = previewed(ROWS, max_steps=7)
    later = Run.create(run.settings.model_copy(update={"max_steps": 9}))
    prepare_data(later)
    show_preview(later)
    assert (
        "data: done already, skipped" in (printed := capsys.readouterr().out) and "9 steps of 16 rows follow" in printed
    )
    assert "<b>9</b><span>steps of 16 rows" in later.path("data", "preview.html").read_text()


def test_what_was_prepared_is_shown_again_without_loading_a_heavy_library(previewed):
    run, printed, _ = previewed(ROWS)
    again = "import sys; from autosloth.data import show_preview; from autosloth.run import Run; show_preview(Run.open(sys.argv[1]))"
    heavy = "; sys.exit(any(name in sys.modules for name in ('unsloth', 'torch', 'transformers', 'datasets')))"
    result = subprocess.run([sys.executable, "-c", again + heavy, run.folder], capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == printed, result.stderr


def test_other_rows_are_shown_once_the_file_holds_others(previewed):
    previewed(ROWS)
    _, printed, page = previewed([{"question": f"And {n}?", "answer": f"Other {n}."} for n in range(30)])
    assert "learnt   | Other " in printed and "It is" not in printed + page


def test_a_notebook_is_given_the_page_and_the_text(previewed, tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    run, _, _ = previewed(ROWS)
    code = f"from autosloth.data.preview import show_preview\nfrom autosloth.run import Run\nshow_preview(Run.open({str(run.folder)!r}))"
    nbformat.write(new_notebook(cells=[new_code_cell(code)]), tmp_path / "one.ipynb")
    command = [sys.executable, "-m", "autosloth.notebook", str(tmp_path / "one.ipynb")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "steps of 16 rows follow" in result.stdout and "<div" not in result.stdout


def test_what_a_notebook_prints_in_colours_is_plain_in_a_file(tmp_path):
    import nbformat
    from nbformat.v4 import new_code_cell, new_notebook

    code = 'from rich.console import Console\nprint("\\x1b[31mred\\x1b[0m")\nConsole().print("[bold]thick[/bold]")'
    nbformat.write(new_notebook(cells=[new_code_cell(code)]), tmp_path / "one.ipynb")
    command = [sys.executable, "-m", "autosloth.notebook", str(tmp_path / "one.ipynb")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["red", "thick"]


def test_several_processes_share_the_rows_of_an_epoch(monkeypatch):
    settings = SFTSettings(batch_size=2, gradient_accumulation=4, max_steps=0)
    alone = plan(160, settings)
    monkeypatch.setenv("WORLD_SIZE", "2")
    shared = plan(160, settings)
    assert (alone["per_step"], alone["per_epoch"]) == (8, 20) and (shared["per_step"], shared["per_epoch"]) == (16, 10)
