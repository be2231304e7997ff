"""Waiting for a thing itself, however slow the machine is: only what never comes takes as long as HUNG."""

import time

HUNG = 1800  # seconds
AT_ANY_SPEED = {f"{of}timeout": HUNG for of in ("", "startup_", "iopub_")}  # of a NotebookClient


def until(condition, what):
    """What the condition gives once it is true."""
    end = time.monotonic() + HUNG
    while not (found := condition()):
        assert time.monotonic() < end, f"{what} never came"
        time.sleep(0.05)
    return found
