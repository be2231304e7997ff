"""The settings of a road as a form in a notebook, which tells of model and dataset while they are typed."""

from .form import open_form
from .widgets import Maker

__all__ = ["Maker", "open_form"]
