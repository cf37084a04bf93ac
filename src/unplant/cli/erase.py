"""`unplant erase`: PBE on suspect data, AFT on clean data, from files to a folder of results."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from unplant.behaviour import blamed_on_the_model, check_behaviour, check_knows, check_purified, usual_scale
from unplant.cli.common import (
    check_apart,
    open_journal,
    parse_limits,
    parse_numbers,
    read,
    read_attack,
    save_pictures,
    set_threads,
)
from unplant.cli.evaluate import most_lost, scores_table
from unplant.cli.output import emit, progress_bar, say, say_warnings, show, verdict
from unplant.data import check_data
from unplant.devices import check_precision, global_state_kept, pick_device, pick_precision
from unplant.erasers import erasers
from unplant.errors import UsageError
from unplant.evaluation import evaluate
from unplant.files import OutputFolder
from unplant.params import parse_settings
from unplant.runs import open_classifier, save_erasure


@global_state_kept()
def run(
    *, model: Path, out: Path, suspect: str | None, clean: str | None, arch: str | None, method: str | None,
    preset: str, settings: list[str] | None, eps: str | None, test: str | None, attack: str | None, target: int,
    all_to_all: bool, max_images: int | None, seed: int, mean: str | None, std: str | None, image_size: str | None,
    skip_bad_images: bool, device: str, precision: str, threads: int | None, save_every: float,
    limit: list[str] | None, force: bool, json: bool,
) -> None:  # fmt: skip
    """Checks every option before it reads data, and everything else before it trains."""
    if (suspect is None) == (clean is None):
        raise UsageError("pass exactly one: --suspect DATA (may be poisoned: PBE) or --clean DATA (you trust it: AFT)")
    if attack is not None and test is None:
        raise UsageError("--attack is for measuring: pass --test DATA too")
    source = suspect or clean or ""
    chosen = erasers[method or ("pbe" if suspect else "aft")]
    if chosen.needs != ("suspect" if suspect else "clean"):
        raise UsageError(f"{chosen.name} needs --{chosen.needs} DATA")
    if out.absolute() == model.absolute() or out.absolute() in model.absolute().parents:
        raise UsageError(f"-o {out} would replace the model itself; choose another folder")
    check_apart(out, source, test)
    set_threads(threads)
    where = pick_device(device)
    wishes = {"precision": pick_precision(precision, where), **parse_settings(settings or [])}
    if eps is not None:
        wishes["eps"] = parse_settings([f"eps={eps}"])["eps"]
    config = chosen.configure(preset, **wishes)
    limits = parse_limits(limit)
    known = read_attack(attack, target=target, all_to_all=all_to_all)

    output = OutputFolder(out, force=force)
    with output as folder:
        how: dict[str, Any] = {"image_size": image_size, "skip_bad": skip_bad_images, "limits": limits}
        data = read(source, max_images=max_images, seed=seed, **how)
        test_data = read(test, **how) if test else None
        warnings = check_precision(config.precision, where)
        warnings += check_data(data, test_data, batch_size=config.batch_size)
        means, stds = parse_numbers("mean", mean), parse_numbers("std", std)
        infected, card = open_classifier(model, data, arch=arch, mean=means, std=stds, limits=limits)
        infected.to(where, memory_format=torch.channels_last)  # type: ignore[call-overload]
        data = data.with_classes(card.classes)
        test_data = test_data.with_classes(card.classes) if test_data is not None else None
        infected.scale = usual_scale(infected, data)  # by labels, so after the classes are in the model's order
        warnings += check_behaviour(infected, data)
        check_knows(infected, data)
        say_warnings(warnings)
        own_code = ".py" in (card.arch or "")
        blame = blamed_on_the_model("be purified") if own_code else nullcontext()
        with progress_bar() as progress, blame:
            generator = torch.Generator().manual_seed(seed)
            around = {"progress": progress, "journal": open_journal(output, card, save_every)}
            erasure = chosen.run(infected, data, config, generator=generator, **around)
            accuracy, harm = check_purified(infected, erasure.model, data, erasure.suspects)
        say_warnings(harm)
        about: dict[str, Any] = {
            "method": chosen.name,
            "preset": preset,
            "seed": seed,
            "model": str(model),
            "data": source,
            "warnings": warnings + harm,
            "accuracy_on_data": accuracy,
        }
        before = evaluate(infected, test_data, known) if test_data is not None else None
        after = evaluate(erasure.model, test_data, known) if test_data is not None else None
        scores = {"before": before.to_json() if before else None, "after": after.to_json() if after else None}
        result = save_erasure(folder, erasure, data, card, config, {"command": "erase", **about, **scores})
        shown = save_pictures(folder, data, erasure)
    if clean and not test:
        say("What it cost in accuracy the clean images can't tell, as they were learnt: keep some back, for --test")
    if json:
        emit(result)
        return
    if before and after:
        show(scores_table({"infected": before, "purified": after}))
        lost = most_lost(before, after, card.classes)
        if lost:
            say(lost)
    if erasure.findings is not None:
        for line in verdict(erasure.findings, card.classes):
            say(line)
    if erasure.suspects is not None:
        say(f"{result['suspects']} of {len(data)} training images look poisoned: {out / 'suspects.csv'}")
    if result["in_doubt"]:
        say(f"{result['in_doubt']} are in doubt: {out / 'in_doubt.csv'}")
    if shown:
        say(f"Pictures in {out}: {', '.join(shown)}")
    say(f"Purified model: {out / 'model.safetensors'}")
