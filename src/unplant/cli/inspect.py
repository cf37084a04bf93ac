"""`unplant inspect`: what is in a model file, and whether it would be loaded; runs nothing that is in it."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from unplant.cli.common import parse_limits
from unplant.cli.output import emit, emit_text
from unplant.errors import ModelFileError, UsageError, printable, shown
from unplant.files import load_checkpoint, salvage, save_tensors
from unplant.files.archives import open_pickled
from unplant.files.checkpoints import format_of, regular_file, views_of
from unplant.files.names import by_kind
from unplant.files.safe import read_safetensors
from unplant.files.skeletons import candidates, find_weights
from unplant.files.weights import check_finite
from unplant.limits import Limits
from unplant.runs import card_of

_MOST_NAMES = 100


@dataclass
class Report:
    """What was found, as far as the file could be read; its texts are the file's, and can be anything.

    Attributes:
        cause: why `erase` would refuse the file; None: it would load it.
        tensors: dtype and shape by key.
        problem: what kept the report from going on, often the cause itself.
    """

    path: Path
    cause: str | None
    format: str = "unknown"
    size: int | None = None
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    candidates: list[str] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)
    checksums: str = "not reached"
    problem: str | None = None


def run(*, model: Path, weights: Path | None, key: str | None, limit: list[str] | None, json: bool) -> None:
    """Prints the report, then raises the cause for which the file is refused, unless its tensors were written."""
    if weights is not None and weights.suffix != ".safetensors":
        raise UsageError(f"--weights writes a safetensors file: name it so, got {weights}")
    limits = parse_limits(limit)
    report = examine(model, key, limits)
    failed: ModelFileError | None = None
    if weights is not None:
        try:
            save_tensors(weights, salvage(model, key, limits))
        except ModelFileError as error:
            failed = error
    written = str(weights) if weights is not None and failed is None else None
    if json:
        emit({**to_json(report), "written": written})
    else:
        for title, text in lines(report):
            emit_text(f"{title:<12}{text}")
        if written is not None:
            emit_text(f"{'written':<12}{printable(written)}")
    if failed is not None:
        raise failed
    if report.cause is not None and written is None:
        raise ModelFileError(report.cause)


def examine(path: Path, key: str | None, limits: Limits) -> Report:
    """Finds out as much as can be read; what refuses the file is the report's cause."""
    report = Report(path, _cause(path, limits))
    try:
        path = regular_file(path, limits)
        report.size = path.stat().st_size
        report.format = format_of(path)
        if report.format == "safetensors":
            _add_safetensors(report, path, limits)
        else:
            _add_pickled(report, path, key, limits)
    except ModelFileError as error:
        report.problem = str(error)
    return report


def _cause(path: Path, limits: Limits) -> str | None:
    try:
        checkpoint = load_checkpoint(path, limits)
        card_of(checkpoint)
        check_finite(checkpoint.path, checkpoint.weights)
    except ModelFileError as error:
        return str(error)
    return None


def _add_safetensors(report: Report, path: Path, limits: Limits) -> None:
    weights, report.card = read_safetensors(path, limits)
    report.tensors = {name: (_dtype(value), tuple(value.shape)) for name, value in weights.items()}
    report.checksums = "none in this format"


def _add_pickled(report: Report, path: Path, key: str | None, limits: Limits) -> None:
    with open_pickled(path, limits) as pickled:
        report.names = {kind: names for kind, names in by_kind(pickled.names).items() if names}
        report.candidates = candidates(pickled.root)
        try:
            pickled.check()
            report.checksums = "all right" if report.format == "torch zip" else "none in this format"
        except ModelFileError as error:
            report.checksums = str(error)
        views = views_of(path, find_weights(path, pickled.root, key, limits))
        report.tensors = {name: (_dtype(found), found.shape) for name, found in views.items()}


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.")


def guessed_classes(report: Report) -> tuple[int, str] | None:
    """The rows of the last matrix, and its key: usually the last layer has one for each class."""
    matrices = [(shape[0], name) for name, (_, shape) in report.tensors.items() if len(shape) == 2]
    return matrices[-1] if matrices else None


def to_json(report: Report) -> dict[str, Any]:
    """The report as one object; texts from the file are escaped and cut."""
    guess = guessed_classes(report)
    return {
        "command": "inspect",
        "path": str(report.path),
        "format": report.format,
        "bytes": report.size,
        "loads": report.cause is None,
        "cause": report.cause,
        "problem": report.problem,
        "tensors": len(report.tensors),
        "numbers": sum(math.prod(shape) for _, shape in report.tensors.values()),
        "dtypes": dict(Counter(dtype for dtype, _ in report.tensors.values())),
        "first": [
            {"key": shown(name), "dtype": dtype, "shape": list(shape)}
            for name, (dtype, shape) in list(report.tensors.items())[:10]
        ],
        "guessed_classes": guess[0] if guess else None,
        "card": _card(report.card),
        "candidates": report.candidates,
        "names": {kind: [shown(name) for name in names[:_MOST_NAMES]] for kind, names in report.names.items()},
        "checksums": report.checksums,
    }


def _card(card: dict[str, Any]) -> dict[str, Any]:
    """What an unplant card says of itself, if it says it in the usual form."""
    arch, classes = card.get("arch"), card.get("classes")
    found: dict[str, Any] = {"arch": shown(arch)} if isinstance(arch, str) else {}
    if isinstance(classes, list):
        found["classes"] = [shown(name) for name in classes[:_MOST_NAMES]]
    return found


def lines(report: Report) -> Iterator[tuple[str, str]]:
    """The report for people: titles and texts, each fit for a terminal."""
    values = to_json(report)
    yield "file", printable(values["path"])
    size = f", {values['bytes']:,} bytes" if values["bytes"] is not None else ""
    yield "format", f"{values['format']}{size}"
    if report.tensors:
        kinds = ", ".join(f"{count} {dtype}" for dtype, count in values["dtypes"].items())
        yield "tensors", f"{values['tensors']:,} of {values['numbers']:,} numbers ({kinds})"
        for place, one in enumerate(values["first"]):
            yield "first keys" if place == 0 else "", f"{one['key']} {one['dtype']} {tuple(one['shape'])}"
        if guess := guessed_classes(report):
            yield "classes", f"{guess[0]}? (a guess: the rows of the last matrix, {shown(guess[1])})"
    elif report.problem is not None and report.problem != report.cause:
        yield "tensors", f"none: {report.problem}"
    if "arch" in values["card"]:
        yield "card", f"architecture {values['card']['arch']}"
    if classes := values["card"].get("classes"):
        yield "", f"classes {', '.join(classes[:10])}{', …' if len(classes) > 10 else ''}"
    if report.candidates:
        yield "wrappers", ", ".join(report.candidates)
    for kind, names in report.names.items():
        more = f" and {len(names) - 10} more" if len(names) > 10 else ""
        yield "names", f"{kind}: {', '.join(values['names'][kind][:10])}{more}"
    yield "checksums", report.checksums
    yield "verdict", "loads" if report.cause is None else f"refused: {report.cause}"
