"""`unplant demo`: plants, erases, and shows before and after."""

from pathlib import Path

from unplant.cli.common import save_pictures, set_threads
from unplant.cli.evaluate import scores_table
from unplant.cli.output import emit, percent, progress_bar, say, show, verdict
from unplant.demo import ERASING, run_demo, triggered_picture
from unplant.files import OutputFolder, write_atomically
from unplant.runs import ModelCard, save_erasure
from unplant.triggers import triggers


def run(*, attack: str, seed: int, out: Path, force: bool, json: bool, threads: int | None) -> None:
    """Writes the run's folder with two pictures, and prints the scores."""
    set_threads(threads)
    triggers[attack.partition(":")[0]]
    with OutputFolder(out, force=force) as folder:
        say(f"Planting {attack} in a small net on scikit-learn's digits, then erasing it without clean data.")
        with progress_bar() as progress:
            demo = run_demo(attack, seed, progress)
        model, data = demo.planted.model, demo.planted.training_set.data
        card = ModelCard.of(model, "small_cnn", data)
        scores = {"before": demo.before.to_json(), "after": demo.after.to_json()}
        about = {"command": "demo", "attack": demo.planted.attack.to_json(), "seed": seed, **scores}
        result = save_erasure(folder, demo.erasure, data, card, ERASING, about)
        write_atomically(folder / "triggered.png", triggered_picture(demo))
        shown = ["triggered.png", *save_pictures(folder, data, demo.erasure)]
    if json:
        emit({**result, "suspects": demo.suspects})
        return
    show(scores_table({"infected": demo.before, "purified": demo.after}))
    found = demo.suspects
    if demo.erasure.findings is not None:
        for line in verdict(demo.erasure.findings, data.classes):
            say(line)
    say(
        f"Suspects: {found['flagged']} of {len(data)} training images flagged, "
        f"precision {percent(found['precision'])}, recall {percent(found['recall'])}, AUROC {found['auroc'] or 0:.3f}"
    )
    say(f"Pictures in {out}: {', '.join(shown)}; the purified model: {out / 'model.safetensors'}")
