"""A disk that fills up in any stage ends a run with a sentence, leaves nothing half there, and the run goes on when there is room."""

import re
import subprocess

import pytest
from support.kills import Lives, compared, live_to_the_end, settings_of_few

pytestmark = pytest.mark.slow
STEP = 700  # KB by which the disk grows
FULL = r"autosloth: (No space is left for|The GGUF takes \S+ GB, and \S+ GB are free in) "


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of its own, and what sets its size in KB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")

    def resize(size):
        subprocess.run(["mount", "-o", f"remount,size={size}k", folder], check=True)

    yield folder, resize
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("road", ["sft", "spin"])
def test_a_run_whose_disk_fills_up_again_and_again_goes_on_to_the_same_end(base, tmp_path, small_disk, road):
    folder, resize = small_disk
    told, said = {"temporary": tmp_path}, []
    with Lives() as live:
        live_to_the_end(live, tmp_path / "whole", road, told)
        for size in range(16, 100_000, STEP):
            resize(size)
            log = tmp_path / f"log-{size}"
            became = live(arguments=[road, *settings_of_few(road, folder)], log=log, **told)
            if became["codes"] == [0]:
                break
            said.append(log.read_text().splitlines()[-2])
            assert became["codes"] == [1] and re.match(FULL, said[-1]), log.read_text()
            assert not [path for path in folder.rglob(".*") if path.name.endswith(".partial")]
    print(len(said), set(said))
    assert compared(folder) == compared(tmp_path / "whole") and len(said) > 5
