"""Errors that users can cause and mend. Each class knows the exit code of the command line."""


def printable(text: str) -> str:
    r"""The text on one line, without what could drive a terminal: file names and class names are other people's.

    >>> printable("new\nline, \x1b[2J")
    'new\\nline, \\x1b[2J'
    """
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


class UnplantWarning(UserWarning):
    """Something about a model or data that a user should know; work goes on."""


class UnplantError(Exception):
    """Any error with a cause outside Unplant; its text is one line: what was expected, what came, what to do."""

    exit_code = 2

    def __init__(self, message: str = "") -> None:
        super().__init__(printable(message))


class UsageError(UnplantError):
    """An option or a setting is wrong."""

    exit_code = 2


class ModelFileError(UnplantError):
    """A model file is missing, damaged, unsafe, or doesn't fit the architecture."""

    exit_code = 3


class DataError(UnplantError):
    """A data set is missing, damaged, or doesn't fit the model."""

    exit_code = 4


class WriteError(UnplantError):
    """A result can't be written."""

    exit_code = 5


class NumericalError(UnplantError):
    """Training met NaN or infinity."""

    exit_code = 6


class InterruptedRunError(UnplantError):
    """The run was interrupted, and can go on."""

    exit_code = 130


class OutOfMemoryError(UnplantError):
    """There isn't enough memory, even after the batch was made smaller."""

    exit_code = 7
