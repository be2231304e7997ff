"""What the README tells a newcomer to type works, and its settings file is one."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from autosloth.settings import SFTSettings

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
]
SETTINGS = re.search(r"```yaml\n(.*?)```", README, re.S).group(1)
# The same road with other numbers: a file's values give way to the environment's.
SMALL = {
    "MODEL": "demo",
    "DATASET": "demo",
    "SPLIT": "train",
    "MAX_STEPS": "3",
    "EVAL_ANSWERS": "2",
    "PUBLISH_TO_HUB": "false",
    "LOAD_IN_4BIT": "false",
}
SMALL |= {"BATCH_SIZE": "8", "GRADIENT_ACCUMULATION": "1", "MAX_NEW_TOKENS": "16", "MAX_LENGTH": "256"}


def test_every_command_is_known_to_this_test():
    assert {command.split()[0] for command in COMMANDS} == {"make", ".venv/bin/autosloth"}


@pytest.mark.parametrize("target", [command.split()[1] for command in COMMANDS if command.startswith("make")])
def test_make_targets_exist(target):
    """What they do is run by continuous integration itself."""
    assert subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.slow
def test_the_commands_work_in_their_order(tmp_path, base):
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    environment = os.environ | {f"AUTOSLOTH_{name}": value for name, value in SMALL.items()}
    for command in COMMANDS:
        if command.startswith(".venv"):
            arguments = shlex.split(command.replace("mistralai/Mistral-7B-v0.1", "demo"))[1:]
            result = subprocess.run(
                [sys.executable, "-m", "autosloth", *arguments],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
            )
            assert result.returncode == 0, (command, result.stdout, result.stderr)
    assert (tmp_path / "runs" / "my-first-run" / "publish" / "README.md").is_file()


def test_the_settings_file_is_one():
    settings = SFTSettings.load(yaml.safe_load(SETTINGS))
    assert settings.learning_rate == 2e-4 and settings.publish_to_hub


def test_the_tree_names_every_wing():
    for door in (ROOT / "autosloth").glob("*/__init__.py"):
        assert f"\n  {door.parent.name}/ " in README, door


def test_the_architecture_names_every_file_of_the_package():
    told = (ROOT / "docs" / "architecture.md").read_text()
    rows = dict(re.findall(r"^\| `?([\w ]+?)/?`? \| (.*) \|$", told, re.M))
    for path in (ROOT / "autosloth").rglob("*.py"):
        if not path.name.startswith("__"):
            wing = path.parent.name if path.parent.name != "autosloth" else "on top"
            assert f"`{path.stem}`" in rows[wing], path


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "docs/architecture.md",
        "docs/spin.md",
        "docs/gpu.md",
        "docs/publishing.md",
    ],
)
def test_what_the_pages_name_is_there(name):
    """Files of the repository and names in them, as `bad_rows` in `autosloth/data/clean.py`, and the targets of links."""
    page = ROOT / name
    text = page.read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:autosloth|tests|docs|benchmarks|notebooks)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_examples_for_contributors_stand_where_it_is_said():
    examples = re.findall(r"`(\w+)`(?: in| \() ?`([\w./]+\.py)`", CONTRIBUTING)
    assert len(examples) == 10
    for name, path in examples:
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), (name, path)
