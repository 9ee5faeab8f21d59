"""Every error that reshard raises on purpose.

Each message names the file and, if one is at fault, the tensor; then what was found, what was expected, what to do.
The command line prints it as one line after ``reshard: error:``.
"""


class ReshardError(Exception):
    """Base class: catch this to catch everything that reshard refuses."""


class CheckpointError(ReshardError):
    """The checkpoint is not valid: a file is missing or damaged, or two files contradict each other."""


class UnsupportedError(ReshardError):
    """The checkpoint may be sound, but reshard does not know that renumbering its experts is exact."""


class OutputError(ReshardError):
    """The output directory is refused, or cannot be written."""


class IntegrityError(ReshardError):
    """An output does not match its manifest."""


class TraceError(ReshardError):
    """A trace cannot be read, was recorded from another model, or lacks what was asked for."""
