"""Each bad input gets its exit code and one clear line, nothing is run, nothing is written, no input changes.

`python tests/test_bad_inputs.py` writes the table in docs/security.md anew.
"""

import contextlib
import io
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from bad_inputs import ROWS, Row, workspace

from unplant.cli import main
from unplant.data import digits
from unplant.planting import TrainConfig, train

PAGE = Path(__file__).resolve().parents[1] / "docs" / "security.md"
MARKS = "<!-- bad inputs: python tests/test_bad_inputs.py -->", "<!-- end of bad inputs -->"
TITLES = {"checkpoint": "Model files", "model": "Networks", "data": "Images", "command": "Commands"}


@dataclass(frozen=True)
class Answer:
    """What the command line did.

    Attributes:
        code: exit code.
        lines: standard error, with the workspace's place as `…`.
        changed: files below the workspace that are new, gone or changed, but for the output.
        written: whether there is an output.
        ran: whether a payload was run.
        reseeded: whether the global random state is another.
    """

    code: int
    lines: list[str]
    changed: list[str]
    written: bool
    ran: bool
    reseeded: bool


@cache
def base() -> Path:
    """The honest model and data that all rows start from."""
    root = Path(tempfile.mkdtemp(prefix="unplant-bad-"))
    model = train("small_cnn:width=8", digits("train"), TrainConfig(epochs=3, batch_size=32), seed=0)
    return workspace(root, model)


def state(folder: Path) -> dict[str, bytes | str]:
    """Every file and link below."""
    found: dict[str, bytes | str] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = str(path.readlink())
        elif path.is_file() and path.stat().st_size < 2**30:
            found[name] = path.read_bytes()
        else:
            found[name] = "there"
    return found


@cache
def answer(row: Row) -> Answer:
    """Makes the bad thing in a workspace of its own, calls the command line, looks at what it did."""
    with tempfile.TemporaryDirectory(prefix="unplant-bad-") as folder:
        w = Path(folder) / "w"
        shutil.copytree(base(), w)
        words = [part.replace("{w}", str(w)).replace("{out}", str(w / "out")) for part in row.make(w)]
        before, random = state(w), torch.get_rng_state()
        said, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(said), pytest.raises(SystemExit) as stop:
            main(words)
        after = state(w)
        own = {name for name in after if name == "out" or name.startswith("out/")}
        kept = {name for name in after if name.startswith(".out.part") and row.code == 6}  # the last finite state
        changed = sorted(
            name for name in (before.keys() | after.keys()) - own - kept if before.get(name) != after.get(name)
        )
        text = err.getvalue().replace(str(w), "…")
        code = stop.value.code
        assert isinstance(code, int)
        ran = (w / "ran").exists()
        return Answer(code, text.splitlines(), changed, bool(own), ran, not torch.equal(random, torch.get_rng_state()))


@pytest.mark.timeout(120)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.group}: {row.what}")
def test_a_bad_input_gets_its_code_and_one_line_and_does_no_harm(row):
    got = answer(row)
    assert got.code == row.code, got.lines
    assert not got.changed, "inputs were changed, or something was left behind"
    assert not got.ran, "a payload was run"
    assert not got.reseeded
    assert got.written == (row.code == 0)
    words = row.words.replace("{w}", "…")
    if row.code:
        assert all(line.startswith("warning: ") for line in got.lines[:-1]), got.lines
        assert got.lines[-1].startswith("unplant: ")
        assert re.search(words, got.lines[-1]), got.lines[-1]
        assert len(got.lines[-1]) < 700
    elif words:
        assert any(re.search(words, line) for line in got.lines), got.lines
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", "".join(got.lines)), "control characters reach the terminal"


def table() -> str:
    """Markdown, one table a group."""
    parts = []
    for group, title in TITLES.items():
        parts += [f"### {title}", "", "| what comes | exit code | what Unplant says |", "|---|---|---|"]
        for row in (row for row in ROWS if row.group == group):
            got = answer(row)
            chosen = [line for line in got.lines if row.words and re.search(row.words.replace("{w}", "…"), line)]
            line = (chosen[-1] if chosen else "goes on").removeprefix("unplant: ").replace("|", "\\|")
            parts.append(f"| {row.what} | {got.code} | {line if len(line) <= 240 else line[:239] + '…'} |")
        parts.append("")
    return "\n".join(parts)


MEASURED = re.compile(r"gets (\d+\.\d)% of the data's labels right")
"""The accuracy of a trained model: its last digits change with the processor that trained it."""


def beginnings(text: str) -> list[list[str]]:
    """Cells of each line, cut to 50 characters: what libraries say at the end may change with their versions."""
    text = MEASURED.sub("gets …% of the data's labels right", text)
    return [[cell.strip()[:50] for cell in line.split(" | ")] for line in text.strip().splitlines()]


def test_the_table_of_the_security_page_is_what_happens():
    page = PAGE.read_text(encoding="utf-8")
    start, end = (page.index(mark) for mark in MARKS)
    told, made = page[start + len(MARKS[0]) : end], table()
    assert beginnings(told) == beginnings(made), "run: python tests/test_bad_inputs.py"
    numbers = [[float(number) for number in MEASURED.findall(text)] for text in (told, made)]
    assert numbers[0] == pytest.approx(numbers[1], abs=1.0)  # points; 18.3 and 18.1 on two processors


def test_every_group_is_on_the_page_and_rows_differ():
    assert {row.group for row in ROWS} == set(TITLES)
    assert len({(row.group, row.what) for row in ROWS}) == len(ROWS) >= 100


def test_a_closed_output_is_no_traceback():
    """As in `unplant methods | head -1`."""
    command = [sys.executable, "-m", "unplant", "methods"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(60) == 5
    assert b"Traceback" not in error


if __name__ == "__main__":
    torch.set_num_threads(1)
    text = PAGE.read_text(encoding="utf-8")
    head, tail = text.index(MARKS[0]) + len(MARKS[0]), text.index(MARKS[1])
    PAGE.write_text(f"{text[:head]}\n\n{table()}\n{text[tail:]}", encoding="utf-8")
