"""`unplant evaluate`: scores of a model on test images."""

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from unplant.cli.common import parse_limits, parse_numbers, read, read_attack, set_threads
from unplant.cli.output import emit, percent, say_warnings, show
from unplant.data import check_data
from unplant.devices import pick_device
from unplant.evaluation import evaluate, largest_fall
from unplant.results import Scores
from unplant.runs import environment, open_classifier


def run(
    *, model: Path, test: str, arch: str | None, attack: str | None, target: int, all_to_all: bool,
    max_images: int | None, seed: int, mean: str | None, std: str | None, image_size: str | None,
    skip_bad_images: bool, device: str, threads: int | None, limit: list[str] | None, json: bool,
) -> None:  # fmt: skip
    """Prints ACC, ASR, RA and the natural target rate."""
    set_threads(threads)
    where = pick_device(device)
    limits = parse_limits(limit)
    known = read_attack(attack, target=target, all_to_all=all_to_all)
    data = read(test, image_size=image_size, skip_bad=skip_bad_images, max_images=max_images, seed=seed, limits=limits)
    warnings = check_data(data)
    means, stds = parse_numbers("mean", mean), parse_numbers("std", std)
    classifier, card = open_classifier(model, data, arch=arch, mean=means, std=stds, limits=limits)
    data = data.with_classes(card.classes)
    say_warnings(warnings)
    scores = evaluate(classifier.to(where), data, known)
    if json:
        about = {"model": str(model), "arch": card.arch, "test": data.fingerprint(), "environment": environment()}
        emit({"command": "evaluate", **about, "warnings": warnings, "scores": scores.to_json()})
        return
    show(scores_table({str(model): scores}))


def scores_table(rows: dict[str, Scores]) -> Table:
    """A table of scores for people, one row a model."""
    table = Table()
    for name in ("model", "ACC", "worst class", "ASR", "RA", "natural target rate", "images"):
        table.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    for name, s in rows.items():
        table.add_row(
            name,
            percent(s.acc),
            percent(s.worst_class_acc),
            percent(s.asr),
            percent(s.ra),
            percent(s.natural_target_rate),
            f"{s.clean_images}/{s.triggered_images}",
        )
    return table


def most_lost(before: Scores, after: Scores, classes: Sequence[str]) -> str | None:
    """One line on the class that loses most of its accuracy; None if none does."""
    fall = largest_fall(before, after)
    if fall is None or fall[1] <= 0:
        return None
    was, now = percent(before.class_acc[fall[0]]), percent(after.class_acc[fall[0]])
    return f"The class that loses most is {classes[fall[0]]}: {was} of its test images are right before, {now} after"
