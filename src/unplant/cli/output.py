"""How the commands talk: results on standard output, everything else on standard error."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from unplant.errors import printable
from unplant.results import Findings
from unplant.results import Progress as Callback

console = Console(stderr=True, highlight=False)


def say(text: str) -> None:
    """One line for people; texts from files in it can't control the terminal."""
    console.print(printable(text), markup=False, soft_wrap=True)


def say_warnings(lines: Sequence[str]) -> None:
    """One line each, on standard error."""
    for line in lines:
        say(f"warning: {line}")


def show(table: Table) -> None:
    """A table for people, on standard output."""
    Console(highlight=False).print(table)


def emit(values: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    text = json.dumps(values, ensure_ascii=False)
    # A path's undecodable bytes are lone surrogates, which no stream takes; as an escape they are JSON too.
    sys.stdout.write(text.encode(errors="backslashreplace").decode() + "\n")
    sys.stdout.flush()


def emit_text(text: str) -> None:
    """One line on standard output."""
    sys.stdout.write(text + "\n")


@contextmanager
def progress_bar() -> Iterator[Callback]:
    """A callback that draws one bar per title; on a terminal only."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def advance(title: str, done: float) -> None:
            if title not in tasks:
                tasks[title] = bars.add_task(title, total=1.0)
            bars.update(tasks[title], completed=done)

        yield advance


def percent(value: float | None) -> str:
    """A fraction for people."""
    return "unknown" if value is None else f"{100 * value:.1f} %"


def listed(labels: Sequence[int], classes: Sequence[str], images: Sequence[int] = ()) -> str:
    """Names of classes, ten at most, with how many images of each are meant, if that is known."""
    more = f" and {len(labels) - 10} more" if len(labels) > 10 else ""
    counts = [f" ({count:,} image{'' if count == 1 else 's'})" for count in images] or [""] * len(labels)
    return ", ".join(classes[label] + count for label, count in list(zip(labels, counts, strict=True))[:10]) + more


def verdict(found: Findings, classes: Sequence[str]) -> list[str]:
    """What a run found out about the backdoor, in sentences."""
    if not found.infected and found.by == "inversion":
        return [
            "Verdict: no trigger found. No patch, shift, warp or plane wave takes most images to one class; triggers "
            "of another kind, or of each image's own, would look the same, so the model was fine-tuned all the same."
        ]
    doubt = [
        f"In doubt: {listed(found.in_doubt, classes)}. Some images there stand apart from their class, or hang on "
        "their label, as poisoned ones do; if they are poisoned, that backdoor is left, and no estimate covers it."
    ]
    if not found.infected:
        return [
            "Verdict: no backdoor found. No class holds a group of images that hang on their label by a trigger; "
            "an attack made to leave no such group would look the same.",
            *(doubt if found.in_doubt else []),
        ]
    targets = listed(found.targets, classes, found.flagged)
    rate = f"estimated poisoning rate {percent(found.poisoning_rate)}, " if found.poisoning_rate is not None else ""
    lines = [
        f"Verdict: infected. Target {'label' if len(found.targets) == 1 else 'labels'}: {targets}; "
        f"{rate}estimated ASR that is left {percent(found.asr_estimate)}."
    ]
    if found.by == "inversion":
        return [
            *lines,
            "A trigger found in the infected model changes its mind on "
            f"{percent(found.trigger_before)} of other images, the purified model's on {percent(found.trigger_after)}.",
        ]
    if found.trigger_before is not None:
        alone = f" It works on images of {listed(found.sources, classes)} alone." if found.sources else ""
        lines.append(
            "A trigger recovered from the suspects changes the infected model's mind on "
            f"{percent(found.trigger_before)} of other images, the purified model's on {percent(found.trigger_after)}."
            f"{alone}"
        )
    if found.witnesses:
        lines.append(
            f"Of {found.witnesses} suspects that were never trained on, the purified model still gives "
            f"{percent(found.asr_left)} their suspicious label (at most {percent(found.asr_left_upper)}); "
            "images whose label is right after all may keep it."
        )
    return lines + (doubt if found.in_doubt else [])
