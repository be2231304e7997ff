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


def test_the_tree_names_every_file_of_the_package():
    for path in (ROOT / "autosloth").glob("*.py"):
        assert path.name.startswith("__") or path.name in README, path.name
