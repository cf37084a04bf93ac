"""Pictures for people: grids of images, without pyplot and without a display."""

import io
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from unplant.images import LabeledImages, to_pixels, to_stored


def grid(rows: Sequence[tuple[str, Tensor, Sequence[str]]], *, scale: float = 0.9) -> bytes:
    """A PNG with one row of pictures per (title, uint8 images (n, C, H, W), captions).

    Bytes, so that the caller writes them atomically.
    """
    from matplotlib.figure import Figure

    columns = max((len(images) for _, images, _ in rows), default=1)
    height = (scale + 0.45) * len(rows) + 0.2
    figure = Figure(figsize=(scale * columns + 0.4, height))
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (title, images, captions) in zip(axes, rows, strict=True):
        for axis in line:
            axis.set_axis_off()
        for axis, image, caption in zip(line, images, captions, strict=False):
            picture = image.permute(1, 2, 0).numpy()
            axis.imshow(picture[..., 0] if picture.shape[2] == 1 else picture, cmap="gray", vmin=0, vmax=255)
            axis.set_title(caption, fontsize=7, pad=2)
        line[0].text(0, 1.35, title, transform=line[0].transAxes, fontsize=9, fontweight="bold", va="bottom")
    figure.subplots_adjust(left=0.02, right=0.98, top=1 - 0.6 / height, bottom=0.02, hspace=0.75, wspace=0.08)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()


def suspects(
    data: LabeledImages, ranked: Tensor, suspicion: Tensor, count: int = 24, title: str = "Top suspects"
) -> bytes:
    """The most suspicious images with the labels they came with, at most 12 in a row."""
    chosen = ranked[:count]
    rows = []
    for start in range(0, max(1, len(chosen)), 12):
        part = chosen[start : start + 12]
        captions = [f"{data.classes[int(data.labels[i])]} ({float(suspicion[i]):.2f})" for i in part]
        over = f"{title}: label in the training set (suspicion)" if start == 0 else ""
        rows.append((over, data.images[part], captions))
    return grid(rows)


def recovered_trigger(data: LabeledImages, suspects: Tensor | None, trigger: Callable[[Tensor], Tensor]) -> bytes:
    """Twelve images that aren't suspects, the same with the recovered trigger, and the difference around mid-grey.

    Without suspects all images are clean, and the trigger was inverted from the model.
    """
    places = torch.arange(len(data)) if suspects is None else (~suspects).nonzero().flatten()
    places = places[torch.linspace(0, len(places) - 1, min(12, len(places))).long()]
    images = data.images[places]
    changed = to_stored(trigger(to_pixels(images)))
    difference = (128 + 2 * (changed.int() - images.int())).clamp(0, 255).to(torch.uint8)
    names = [data.classes[label] for label in data.labels[places].tolist()]
    source = "inverted from the model" if suspects is None else "recovered from the suspects"
    rows = (
        ("Clean images" if suspects is None else "Training images that are no suspects", images, names),
        (f"With the trigger that was {source}", changed, [""] * len(places)),
        ("Twice the difference, around grey", difference, [""] * len(places)),
    )
    return grid(rows)
