"""The command line: the only part that prints, reads arguments, and picks device and seed."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits with its code; a user's mistake is one line on standard error."""
    import typer

    from unplant.cli.app import app
    from unplant.errors import UnplantError

    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    try:
        with orderly_stops():
            code = app([word for word in words if word != "--debug"], prog_name="unplant", standalone_mode=False)
        if code == 130:  # some versions of typer catch the interrupt themselves
            raise KeyboardInterrupt
    except (typer.Abort, KeyboardInterrupt):
        code = _fail("interrupted; nothing was written", 130)
    except (BrokenPipeError, SystemExit) as error:  # the latter is also what typer makes of the former
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            sys.exit(_fail("stopped by code of the model's own (it calls sys.exit); take that out", 3))
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 5
    except Exception as error:
        message = getattr(
            error, "format_message", None
        )  # the usage errors of typer, and of click in its older versions
        if message is not None:
            code = _fail(message() or "no command given; try unplant --help", 2)
        elif debug:
            raise
        elif isinstance(error, UnplantError):
            code = _fail("".join([str(error), *getattr(error, "__notes__", [])]), error.exit_code)
        elif _out_of_memory(error):
            code = _fail("not enough memory; use a smaller batch (--set batch_size=32) or --max-images", 7)
        else:
            raise
    sys.exit(code if isinstance(code, int) else 0)


@contextmanager
def orderly_stops() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM end the run in order; a second one ends it at once.

    What is on disk is sound at every instant, as it is after a kill: files are written whole, pages of a journal are
    replaced in one step.
    """
    signals = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()

    def at_once(number: int, frame: FrameType | None) -> None:
        os._exit(130)

    def in_order(number: int, frame: FrameType | None) -> None:
        for each in signals:
            signal.signal(each, at_once)
        raise KeyboardInterrupt

    before = [signal.signal(each, in_order) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


def _out_of_memory(error: Exception) -> bool:
    from unplant.devices import is_out_of_memory  # imports torch

    return is_out_of_memory(error)


def _fail(message: str, code: int) -> int:
    from unplant.errors import printable

    line = printable(" ".join(message.split()))
    print(f"unplant: {line}", file=sys.stderr)  # noqa: T201 (only the command line prints)
    return code
