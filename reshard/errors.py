"""Every error that reshard raises on purpose.

Each message names the file, the tensor where one is concerned, what was found, what was expected and what to do.
The command line prints it as one line after ``reshard: error:``.
"""


class ReshardError(Exception):
    """Base of the family: catch this to catch everything that reshard refuses."""


class CheckpointError(ReshardError):
    """The checkpoint is not sound: a file is absent, damaged, or at odds with another."""


class UnsupportedError(ReshardError):
    """The checkpoint may be sound, but reshard does not know that renumbering its experts is exact."""


class OutputError(ReshardError):
    """The output directory is refused, or cannot be written."""


class IntegrityError(ReshardError):
    """An output is not what its manifest says."""


class TraceError(ReshardError):
    """A trace cannot be read, is of another model, or does not hold what is asked of it."""
