"""The error tree. Every error says in one sentence what is wrong and in one what to do.

AutoSlothError
├── SettingsError   a value, a key or a settings file is wrong
├── StorageError    a folder cannot be written, or the disk is full
├── DataError       the dataset is missing, empty or not recognised
├── ModelError      the model is missing or does not suit
├── ExportError     merging or converting failed
├── VerifyError     the GGUF does not answer like the trained model
├── HubError        the Hugging Face Hub refused or returned something else
├── DemoError       the embedded demo model could not be made
├── InstallError    a notebook's libraries could not be brought to their versions
└── Interrupted     the user stopped it; what is done is kept
"""

INTERRUPTED = "Interrupted. The same command goes on from the last checkpoint."


class AutoSlothError(Exception):
    """A problem with a name.

    what: one sentence that says what is wrong, with the value.
    todo: one sentence that says what to do next.
    """

    def __init__(self, what: str, todo: str = ""):
        self.what, self.todo = what, todo
        super().__init__(f"{what} {todo}".strip())

    def _render_traceback_(self) -> list[str]:
        """IPython shows these lines in place of a traceback."""
        return [f"{self.what}\n{self.todo}".strip()]


class SettingsError(AutoSlothError):
    """A value, a key or a settings file is wrong."""


class StorageError(AutoSlothError):
    """A folder cannot be written, or the disk is full."""


class DataError(AutoSlothError):
    """The dataset is missing, empty or not recognised."""


class ModelError(AutoSlothError):
    """The model is missing or does not suit."""


class ExportError(AutoSlothError):
    """Merging or converting failed."""


class VerifyError(AutoSlothError):
    """The GGUF does not answer like the trained model."""


class InstallError(AutoSlothError):
    """A notebook's libraries could not be brought to their versions."""


class HubError(AutoSlothError):
    """The Hugging Face Hub refused or returned something else."""


class DemoError(AutoSlothError):
    """The embedded demo model could not be made."""


class Interrupted(AutoSlothError):
    """The user stopped it; what is done is kept."""
