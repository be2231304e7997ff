"""A Hub that misbehaves: every fault of the table in support/faults.py against uploads and checkpoints, and against downloads of bases, shards, datasets and addresses."""

import pytest
from support.faults import FAULTS, Misbehaving


def is_slow(operation, fault):
    """Loading imports Unsloth; a stall takes as long as the shortest limit that can be set, a second, so of each operation one is fast enough."""
    return operation == "loading" or ("stalls" in fault.name and "the file" not in fault.name)


TRIED = [
    pytest.param(
        operation, fault, id=f"{operation}: {fault.name}", marks=[pytest.mark.slow] * is_slow(operation, fault)
    )
    for operation, faults in FAULTS.items()
    for fault in faults
]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    with Misbehaving(tmp_path_factory.mktemp("faults")) as hub:
        yield hub


@pytest.fixture
def quiet(hub):
    """The same Hub, which has forgotten what was planned before, and knows the token."""
    hub.forget_faults()
    hub.allow("")
    return hub


@pytest.mark.hub_fault
@pytest.mark.parametrize("operation, fault", TRIED)
def test_a_fault_is_survived(quiet, base, operation, fault):
    quiet.survive(operation, fault)


def test_the_names_of_the_faults_of_an_operation_differ():
    for faults in FAULTS.values():
        names = [fault.name for fault in faults]
        assert len(set(names)) == len(names)
