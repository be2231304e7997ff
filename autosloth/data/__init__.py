"""Rows are read, their form is recognised, and what nothing can be learnt from is dropped and counted.

What is left is tokenised, labelled, shown and written as the trainer takes it.
"""

from .clean import FORMS_OF, Findings, look_through, report_readings, streams
from .encode import IGNORED
from .load import look_up
from .preview import show_preview
from .recognise import recognise_columns
from .stage import prepare_data, refuse_full_disk

__all__ = [
    "FORMS_OF",
    "IGNORED",
    "Findings",
    "look_through",
    "look_up",
    "prepare_data",
    "recognise_columns",
    "refuse_full_disk",
    "report_readings",
    "show_preview",
    "streams",
]
