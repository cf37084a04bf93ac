"""The command line: the only part that prints, reads arguments, and picks device and seed."""

import os
import sys


def main(arguments: list[str] | None = None) -> None:
    """Runs a command and exits with its code; a user's mistake is one line on standard error."""
    import typer

    from unplant.cli.app import app
    from unplant.errors import UnplantError

    words = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in words
    try:
        code = app([word for word in words if word != "--debug"], prog_name="unplant", standalone_mode=False)
    except (typer.Abort, KeyboardInterrupt):
        code = _fail("interrupted; nothing was written", 130)
    except BrokenPipeError:
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
            code = _fail(str(error), error.exit_code)
        elif _out_of_memory(error):
            code = _fail("not enough memory; use a smaller batch (--set batch_size=32) or --max-images", 7)
        else:
            raise
    sys.exit(code if isinstance(code, int) else 0)


def _out_of_memory(error: BaseException) -> bool:
    text = str(error).lower()
    return isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text


def _fail(message: str, code: int) -> int:
    from unplant.errors import printable

    line = printable(" ".join(message.split()))
    print(f"unplant: {line}", file=sys.stderr)  # noqa: T201 (only the command line prints)
    return code
