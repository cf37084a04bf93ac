"""Is the model infected? Clean images tell, where a trigger is one perturbation that works on many of them.

For each class and each kind a perturbation is inverted from the model and tried on images that the inversion hasn't
seen. A backdoor's target gives in, the others don't. The idea is that of Neural Cleanse (Wang et al., IEEE S&P 2019),
which compares sizes of masks that all work; here all have one size, and how often they work is compared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from unplant.classifier import device_of, frozen
from unplant.detection.waves import leading_waves
from unplant.devices import Precision, autocast
from unplant.images import EndlessBatches, LabeledImages
from unplant.inversion import USUAL_AREA, Patches, Shared, choose_targets
from unplant.metrics import lower_bound
from unplant.results import Findings, Progress

WORKS = 0.6
"""Share of the images that a standing-out class's perturbation takes there, at least; `SURE` for patches that cover
much more than usual: on 16×16 digits they took up to 0.81 of a clean model's images to a class."""

ODDS = 10.0
"""How many times its odds to do so are those of the median of the other classes' perturbations, at least; where it must
be certain, those of all but one in ten."""

SURE = 0.9
"""Share of the images from which a perturbation imitates the trigger well enough to fine-tune against it alone, and
beside which weaker ones to other classes don't count; and the share that the second look and waves are asked
for, by its lower 95 % bound: few images could all have gone by chance."""

TALL = 30 / 255
"""Height of the waves that are tried, in pixel units: at 40/255 one led a WaNet model to a wrong class, at 20/255
none led nine images in ten to clean-label SIG's target."""

FEWEST = 20
"""With fewer images nothing is tried."""

TRIED = 200
"""So many images each perturbation is tried on, at most; with more than forty classes on fewer at first."""


@dataclass(frozen=True, eq=False)
class Inverted:
    """Perturbations of each kind, and how they work on images that they weren't made with.

    Attributes:
        kinds: the perturbations, one a class of each kind.
        rates: float (K,) of each kind, share of images of other classes that each class's perturbation takes there,
            see `obedience`.
        held_out: the images that they were tried on.
    """

    kinds: Mapping[str, Shared]
    rates: Mapping[str, Tensor]
    held_out: LabeledImages

    @property
    def standing_out(self) -> list[tuple[str, int]]:
        """Kind and class of what takes most images to one class, and few to others: the strongest first.

        Beside a class to which something takes nearly all images, others count only if something does so to them too.
        Waves, which clean models obey, too, count only where that is beyond chance, and patches that cover much more
        than usual, as they do on small images, only where they take nearly all.
        """
        found = [
            (rate, kind, target)
            for kind, rates in self.rates.items()
            for target, rate in enumerate(rates.tolist())
            if rate >= self.least(kind)
            and self.outdoes(kind, target)
            and (kind != "wave" or self.beyond_chance(kind, target))
        ]
        sure = {target for rate, _, target in found if rate >= SURE}
        found = [entry for entry in found if not sure or entry[2] in sure]
        return [(kind, target) for _, kind, target in sorted(found, key=lambda entry: -entry[0])]

    def least(self, kind: str) -> float:
        """Share of the images that a standing-out class's perturbation of that kind takes there, at least."""
        shared = self.kinds.get(kind)
        large = isinstance(shared, Patches) and shared.area > 1.5 * USUAL_AREA
        return SURE if large else WORKS

    @property
    def sure(self) -> bool:
        """Whether the strongest of these takes nearly all images there."""
        pairs = self.standing_out
        return bool(pairs) and float(self.rates[pairs[0][0]][pairs[0][1]]) >= SURE

    @property
    def certain(self) -> bool:
        """Whether that is true beyond chance, and of that class alone.

        Beyond the chance of so few images: of the rate's lower 95 % bound. Alone: beside all other classes but one
        in ten, not only beside half of them, as a clean model that knows its images by heart gives in to several.
        """
        if not self.sure:
            return False
        strongest = self.standing_out[0]
        return self.beyond_chance(*strongest) and self.outdoes(*strongest, but=10)

    def outdoes(self, kind: str, target: int, *, but: int = 2) -> bool:
        """Whether the odds of that class's perturbation are `ODDS` times those of all others but one in so many.

        One in two is left aside: the median is what is asked then; one in ten: of up to ten classes none.
        """
        count, rates = len(self.held_out), self.rates[kind]
        odds = (rates * count + 0.5) / ((1 - rates) * count + 0.5)  # half an image more on both sides
        others = torch.cat([odds[:target], odds[target + 1 :]]).sort().values
        return len(others) > 0 and bool(odds[target] >= ODDS * others[-1 - len(others) // but])

    def beyond_chance(self, kind: str, target: int) -> bool:
        """Whether that perturbation takes nearly all images there, by the lower 95 % bound."""
        count = len(self.held_out)
        bound = lower_bound(round(float(self.rates[kind][target]) * count), count)
        return bound is not None and bound >= SURE

    def only(self, kinds: Sequence[str]) -> "Inverted":
        """The same without the other kinds."""
        kept = {kind: shared for kind, shared in self.kinds.items() if kind in kinds}
        return replace(self, kinds=kept, rates={kind: rates for kind, rates in self.rates.items() if kind in kinds})

    def tried(self, model: nn.Module, precision: Precision = "float32") -> "Inverted":
        """The same perturbations, with their rates in that model."""
        classes, rates = range(self.held_out.num_classes), {}
        first = tried_first(len(classes))
        for kind in self.kinds:
            rates[kind] = self.obedience(model, kind, classes, precision, first)
            again = (rates[kind] >= WORKS / 2).nonzero().flatten()
            if first < len(self.held_out) and len(again):
                rates[kind][again] = self.obedience(model, kind, again.tolist(), precision)
        return replace(self, rates=rates)

    def lost(self, purified: nn.Module, precision: Precision = "float32") -> "Inverted":
        """The same perturbations, with the share that each takes in the infected model but not in the purified one."""
        left = self.tried(purified, precision).rates
        return replace(self, rates={kind: (rates - left[kind]).clamp(min=0) for kind, rates in self.rates.items()})

    def obedience(
        self,
        model: nn.Module,
        kind: str,
        targets: Sequence[int],
        precision: Precision = "float32",
        images: int = TRIED,
    ) -> Tensor:
        """Share of so many held-out images that each target's perturbation takes there in that model, float (targets,).

        Images that have the target's label already don't count, nor do those that the model gives it as they are: a
        model that says the same of all images obeys nobody.
        """
        held_out = self.held_out.select(torch.arange(len(self.held_out))[:images])
        pixels, device = held_out.pixels(slice(None)), device_of(model)
        pairs = torch.cartesian_prod(torch.tensor(targets), torch.arange(len(held_out)))
        with frozen(model), torch.no_grad(), autocast(device, precision):
            said = torch.cat([model(part.to(device)).argmax(1).cpu() for part in pixels.split(TRIED)])
            there = torch.stack([held_out.labels, said])[:, pairs[:, 1]] == pairs[:, 0]
            pairs = pairs[~there.any(0)]
            took = [
                model(self.kinds[kind].apply(pixels[part[:, 1]].to(device), part[:, 0].to(device))).argmax(1).cpu()
                == part[:, 0]
                for part in pairs.split(TRIED)
            ]
        hits = torch.cat(took).double() if took else torch.zeros(0)
        return torch.stack([hits[pairs[:, 0] == target].mean() for target in targets]).nan_to_num().float()


def examination_steps(steps: int, classes: int) -> int:
    """Steps of each kind: as said for up to ten classes, with more as many times more, at most four.

    >>> examination_steps(60, 2), examination_steps(60, 43), examination_steps(60, 1000)
    (60, 240, 240)
    >>> examination_steps(60, 25)
    150
    """
    return round(steps * min(4.0, max(1.0, classes / 10)))


def tried_first(classes: int) -> int:
    """Images that each perturbation is tried on at first; those that do well there are tried on all.

    >>> tried_first(10), tried_first(100), tried_first(1000)
    (200, 80, 20)
    """
    return max(20, min(TRIED, 8000 // classes))


def invert(
    infected: nn.Module,
    data: LabeledImages,
    kinds: Mapping[str, Shared],
    *,
    steps: int,
    step_size: float,
    batch_size: int,
    precision: Precision,
    generator: torch.Generator,
    waves: int = 0,
    progress: Progress | None = None,
    title: str = "looking for a trigger",
) -> Inverted | None:
    """Inverts the perturbations from the model on half of the images and tries them on the others.

    Args:
        infected: pixels in [0, 1] → logits; not modified.
        data: clean images.
        kinds: fresh perturbations by their kind; improved in place.
        steps: gradient steps of each kind for up to ten classes; with more classes as many times more, at most four.
        step_size: length of a step, see `Shared.improve`.
        batch_size: images a step.
        precision: of convolutions and matrix products.
        generator: CPU generator of the halves, batches, targets and waves.
        waves: so many are tried as a further kind, `wave`, where none of the others is sure.
        progress: told the share of steps done.
        title: under which name.

    Returns:
        What was found; None for fewer than 20 images.
    """
    if len(data) < FEWEST:
        return None
    order = torch.randperm(len(data), generator=generator)
    known, held_out = data.select(order[: len(data) // 2]), data.select(order[len(data) // 2 :][:TRIED])
    steps = examination_steps(steps, data.num_classes)
    device, batches = device_of(infected), EndlessBatches(known, min(batch_size, len(known)), generator)
    with autocast(device, precision):
        for step in range(steps):
            for shared in kinds.values():
                indices = next(batches)
                pixels, labels = known.pixels(indices).to(device), known.labels[indices].to(device)
                targets = choose_targets(shared.rates, labels, 0.0, generator)
                shared.improve(infected, pixels, targets, steps=1, step_size=step_size)
            if progress is not None:
                progress(title, (step + 1) / steps)
    found = Inverted(kinds, {}, held_out).tried(infected, precision)
    if not waves or found.sure:
        return found
    around = {"precision": precision, "generator": generator, "progress": progress}
    tried = {"wave": leading_waves(infected, known, waves=waves, height=TALL, **around)}
    led = Inverted(tried, {}, held_out).tried(infected, precision)
    return replace(found, kinds={**found.kinds, **led.kinds}, rates={**found.rates, **led.rates})


def verdict(
    found: Inverted, infected: nn.Module, purified: nn.Module, precision: Precision
) -> tuple[Findings, Callable[[Tensor], Tensor] | None]:
    """What stands out as findings, and the strongest perturbation as the trigger.

    What is left of the backdoor is that of what stands out which the purified model obeys most.
    """
    pairs = found.standing_out
    if not pairs:
        return Findings(infected=False, targets=(), by="inversion"), None
    kind, target = pairs[0]

    def trigger(pixels: Tensor) -> Tensor:
        return found.kinds[kind].apply(pixels, torch.full((len(pixels),), target, device=pixels.device))

    said = Findings(
        infected=True,
        targets=tuple(dict.fromkeys(target for _, target in pairs)),
        by="inversion",
        trigger_before=float(found.obedience(infected, kind, [target], precision)),
        trigger_after=max(float(found.obedience(purified, kind, [k], precision)) for kind, k in pairs),
    )
    return said, trigger
