"""Errors that users can cause and mend. Each class knows the exit code of the command line."""


def printable(text: str) -> str:
    r"""The text with everything escaped that isn't seen when printed: terminals obey what hostile files say.

    >>> printable("net\x1b[31m.weight\u202e\n")
    'net\\x1b[31m.weight\\u202e\\n'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: object, length: int = 80) -> str:
    """A text from a file (or the message of an error on one) as it may stand in a message: one line, cut, escaped."""
    text = " ".join(str(value)[: 4 * length].split()) if isinstance(value, (str, BaseException)) else ""
    text = printable(text or type(value).__name__)
    return text if len(text) <= length else text[: length - 1] + "…"


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
