"""What triggers look like: clean image, triggered image, ten times their difference; PSNR and SSIM."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unplant import metrics, pictures
from unplant.controlled import ControlsTraining
from unplant.errors import UsageError
from unplant.images import LabeledImages, to_pixels, to_stored
from unplant.planting import TrainConfig, plant, poison_only
from unplant.poisoning import Attack, triggered_test_set
from unplant.results import Progress
from unplant.triggers import LearnedTrigger

TRAINING = TrainConfig(epochs=10, batch_size=64)
"""For the attacks whose trigger is learnt along with a model."""


@dataclass(frozen=True, eq=False)
class Exhibit:
    """One attack's pictures: uint8 (n, C, H, W) each, and numbers.

    Attributes:
        attack: with all that its trigger has learnt.
        clean: images without the trigger.
        triggered: the same with the trigger of test time.
        training: what poisoned training images carry, of images that the attack may poison; None if it is the same.
        psnr: peak signal-to-noise ratio at test time, in dB.
        ssim: structural similarity at test time, in [-1, 1].
    """

    attack: Attack
    clean: Tensor
    triggered: Tensor
    training: tuple[Tensor, Tensor] | None
    psnr: float | None
    ssim: float | None

    def picture(self) -> bytes:
        """A PNG: rows of clean images, triggered images and ten times the difference."""
        rows = [*_three("With the trigger", self.clean, self.triggered)]
        if self.training is not None:
            rows += _three("In training", *self.training)
        return pictures.grid([(title, images, [""] * len(images)) for title, images in rows])

    def row(self) -> dict[str, Any]:
        """The numbers and the recipe, for a table."""
        return {
            "attack": self.attack.to_json(weights=False),
            "access": self.attack.trigger.access,
            "psnr": self.psnr,
            "ssim": self.ssim,
        }


def exhibit(
    data: LabeledImages, attack: Attack, *, count: int = 8, seed: int = 0, progress: Progress | None = None
) -> Exhibit:
    """Shows an attack on those images; a trigger that must be learnt, and isn't yet, is learnt on them first.

    PSNR and SSIM are means over at most 1,000 images.

    Raises:
        UsageError: there is no image on which the trigger shall work.
    """
    attack = _learnt(data, attack, seed, progress)
    few = data.sample(1000, torch.Generator().manual_seed(seed))
    clean, triggered = triggered_test_set(few, attack)
    shown = torch.linspace(0, len(clean) - 1, min(count, len(clean))).long()
    if not len(clean):
        raise UsageError(
            f"{attack.trigger.id}: none of the images can show it; its labels are the target's, or no source's"
        )
    targets = attack.wanted(few.labels, few.num_classes) == few.labels
    candidates = few.select(targets if attack.clean_label else attack.concerns(few.labels, few.num_classes))
    part = candidates.select(torch.linspace(0, len(candidates) - 1, min(count, len(candidates))).long())
    labels = attack.wanted(part.labels, part.num_classes)
    pixels = to_pixels(part.images)
    poisoned = to_stored(attack.trigger.on_poison(pixels, labels, torch.Generator().manual_seed(seed)))
    same = torch.equal(poisoned, attack.trigger.stamp(part.images))
    return Exhibit(
        attack=attack,
        clean=clean.images[shown],
        triggered=triggered.images[shown],
        training=None if same else (part.images, poisoned),
        psnr=metrics.psnr(clean.images, triggered.images),
        ssim=metrics.ssim(clean.images, triggered.images),
    )


def overview(exhibits: Sequence[Exhibit]) -> bytes:
    """A PNG with one column per attack: an image without the trigger, with it, and ten times the difference."""
    shown = [item for item in exhibits if len(item.clean)]
    three = [_three("With the trigger", item.clean[:1], item.triggered[:1]) for item in shown]
    names = [item.attack.trigger.id.replace("_", "\n") for item in shown]
    rows = []
    for place in range(3 if shown else 0):
        captions = names if place == 0 else [""] * len(shown)
        rows.append((three[0][place][0], torch.cat([parts[place][1] for parts in three]), captions))
    return pictures.grid(rows)


def page(exhibits: Sequence[Exhibit]) -> str:
    """One self-contained HTML page: the table, then the pictures."""
    lines, figures = [], []
    for place, item in enumerate(exhibits):
        trigger = item.attack.trigger
        anchor = f"{place:02d}-{html.escape(trigger.id)}"  # an attack may be shown twice, with other settings
        name, about = html.escape(trigger.id), html.escape((type(trigger).__doc__ or "").split("\n\n")[0])
        cells = (f'<a href="#{anchor}">{name}</a>', trigger.access, number(item.psnr, 1), number(item.ssim, 3))
        lines.append("<tr>" + "".join(f"<td>{cell}" for cell in cells))
        picture = "data:image/png;base64," + base64.b64encode(item.picture()).decode("ascii")
        settings = ", ".join(f"{key}={value}" for key, value in item.row()["attack"]["trigger"].items())
        figures.append(f'<h2 id="{anchor}">{name}</h2><p>{about}</p><p><code>{html.escape(settings)}</code></p>')
        figures.append(f'<img alt="{name}" src="{picture}">')
    return _PAGE.format(rows="\n".join(lines), figures="\n".join(figures))


def number(value: float | None, digits: int) -> str:
    """For people; a dash where it is unknown."""
    return "–" if value is None else f"{value:.{digits}f}"


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Triggers</title>
<style>body{{font-family:sans-serif;max-width:64em;margin:2em auto;padding:0 1em}}
td,th{{padding:.2em 1em;text-align:left}}
img{{max-width:100%}}</style>
<h1>Triggers</h1>
<p>Access: what the attacker must control. PSNR in dB and SSIM compare test images with and without the trigger, after
rounding to 8 bits; high is hard to see.</p>
<table><tr><th>attack<th>access<th>PSNR<th>SSIM
{rows}
</table>
{figures}
</html>
"""


def _three(title: str, before: Tensor, after: Tensor) -> list[tuple[str, Tensor]]:
    difference = (after.int() - before.int()).abs().mul(10).clamp(max=255).to(torch.uint8)
    return [("Clean", before), (title, after), ("Ten times the difference", difference)]


def _learnt(data: LabeledImages, attack: Attack, seed: int, progress: Progress | None) -> Attack:
    trigger = attack.trigger
    if not isinstance(trigger, LearnedTrigger) or trigger.weights:
        return attack
    if isinstance(trigger, ControlsTraining):
        return plant(data, attack, "small_cnn", TRAINING, seed=seed, progress=progress).attack
    return poison_only(data, attack, seed=seed, progress=progress)[1]
