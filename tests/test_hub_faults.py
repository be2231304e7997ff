"""A Hub that misbehaves: every fault of the table in support/faults.py against uploads and checkpoints, and against downloads of bases, shards, datasets and addresses."""

import pytest
from support.faults import FAULTS, Misbehaving

from autosloth.retries import cause_of, in_words, is_passing


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


# As hf_xet 1.8 raised them against a server on loopback that answers so; the Hub here plays none.
XET = "Task error: File reconstruction error: CAS Client Error: {}"
OF_XET = {
    "Request error: HTTP status server error (503 Service Unavailable), domain: http://127.0.0.1:1/v2/reconstructions/ab": (
        True,
        "the server answered with status 503",
    ),
    "Request error: HTTP status client error (404 Not Found), domain: http://127.0.0.1:1/v2/reconstructions/ab": (
        False,
        "the server answered with status 404",
    ),
    "Request middleware error: error sending request for url (http://127.0.0.1:9/v2/reconstructions/ab)": (
        True,
        "the Hub's storage did not answer",
    ),
}


@pytest.mark.parametrize("said, passes, words", [(said, *known) for said, known in OF_XET.items()])
def test_an_error_of_the_hub_s_other_protocol_is_told_by_its_text(said, passes, words):
    cause = cause_of(RuntimeError(XET.format(said)))
    assert (is_passing(cause), in_words(cause)) == (passes, words)


def test_an_error_of_another_kind_has_no_cause_that_passes():
    assert cause_of(RuntimeError("CUDA out of memory")) is None


def test_the_names_of_the_faults_of_an_operation_differ():
    for faults in FAULTS.values():
        names = [fault.name for fault in faults]
        assert len(set(names)) == len(names)
