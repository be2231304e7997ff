"""What libraries say of a machine's missing kernels is kept back where there is no GPU that could run them."""

import logging
from importlib.util import find_spec
from pathlib import Path

import pytest

from autosloth.output import hush_libraries


@pytest.mark.parametrize("gpu", [False, True])
def test_kernels_that_a_cpu_cannot_run_are_not_missed(monkeypatch, gpu):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    logger, said = logging.getLogger("transformers.integrations.hub_kernels"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    hush_libraries()
    logger.addHandler(handler)
    logger.warning("`causal_conv1d_fn` is falling back to its reference PyTorch implementation because ...")
    logger.warning("something else")
    logger.removeHandler(handler)
    assert "something else" in said and len(said) == 1 + gpu


def test_the_line_is_the_one_that_transformers_has():
    file = Path(find_spec("transformers").origin).parent / "integrations" / "hub_kernels.py"
    assert "is falling back to its reference PyTorch implementation" in file.read_text()
    assert "logger = logging.get_logger(__name__)" in file.read_text()
