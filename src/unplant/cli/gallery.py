"""`unplant gallery`: a page that shows what triggers look like."""

from pathlib import Path

from rich.table import Table

from unplant.cli.common import check_apart, parse_limits, read, read_attack, set_threads
from unplant.cli.output import emit, progress_bar, say, show
from unplant.files import OutputFolder, write_atomically
from unplant.gallery import exhibit, number, overview, page
from unplant.runs import environment, write_json
from unplant.triggers import triggers


def run(
    *, data: str, out: Path, attack: list[str] | None, target: int, max_images: int | None, seed: int,
    image_size: str | None, threads: int | None, limit: list[str] | None, force: bool, json: bool,
) -> None:  # fmt: skip
    """Writes `index.html`, one picture an attack and one of all."""
    check_apart(out, data)
    set_threads(threads)
    limits = parse_limits(limit)
    planned = [read_attack(spec, target=target, all_to_all=False) for spec in attack or sorted(triggers)]
    with OutputFolder(out, force=force) as folder:
        images = read(data, image_size=image_size, skip_bad=False, max_images=max_images, seed=seed, limits=limits)
        exhibits = []
        with progress_bar() as progress:
            for place, one in enumerate(planned):
                if one is not None:
                    exhibits.append(exhibit(images, one, seed=seed))
                    progress("triggers", (place + 1) / len(planned))
        names = [f"{place:02d}-{item.attack.trigger.id}.png" for place, item in enumerate(exhibits)]
        for name, item in zip(names, exhibits, strict=True):
            write_atomically(folder / name, item.picture())
        write_atomically(folder / "overview.png", overview(exhibits))
        write_atomically(folder / "index.html", page(exhibits))
        rows = [{**item.row(), "picture": name} for name, item in zip(names, exhibits, strict=True)]
        result = {
            "command": "gallery",
            "data": images.fingerprint(),
            "seed": seed,
            "attacks": rows,
            "environment": environment(),
        }
        write_json(folder / "result.json", result)
    if json:
        emit(result)
        return
    table = Table("attack", "access", "PSNR", "SSIM")
    for item in exhibits:
        table.add_row(item.attack.trigger.id, item.attack.trigger.access, number(item.psnr, 1), number(item.ssim, 3))
    show(table)
    say(f"Page: {out / 'index.html'}")
