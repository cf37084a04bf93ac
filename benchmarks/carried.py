"""How well transplants tell poisoned groups from natural ones: one JSON line a group, the poison in view.

    python benchmarks/carried.py cells.txt --data cifar10.zip/train --test cifar10.zip/test \
        --arch preact_resnet18:width=16 --set epochs=8 --suspect-images 20000 --out carried.jsonl

`everywhere` is the share of other classes' images that take on the group's label by its moments, `best` the same of the
class where it works best. Lines without a group are ordinary classes, on which the test abstains or not.
"""

import json
from typing import Any

from cells import attack_of, infected_by, parser, setting

from unplant.classifier import activations, logits
from unplant.detection.clusters import outweighing, split_classes
from unplant.detection.transplant import carried
from unplant.erasers.pbe import PBEConfig


def main() -> None:
    """Goes through the cells, and through the groups of each."""
    options = parser(__doc__)
    options.add_argument("--suspect-images", type=int)
    args = options.parse_args()
    here, config = setting(args), PBEConfig()
    for line in args.cells.read_text(encoding="utf-8").splitlines():
        name, spec, *recipe = line.split()
        it = infected_by(here, attack_of(spec, recipe), args.suspect_images)
        model, data, poisoned = it.model, it.data, it.poisoned
        outputs = logits(model, data)
        many = outweighing(data.labels, data.num_classes, config.outweighs)
        split, *_ = split_classes(activations(model, data), data.labels, many, least_gain=config.least_gain)
        for label in data.labels.unique().tolist():
            members = data.labels == label
            groups = {None: members}
            if split.count[label] > 1:
                groups |= {number: members & (split.group == number) for number in range(int(split.count[label]))}
            for number, group in groups.items():
                everywhere, best = carried(model, data, group, label, outputs, alike=number is not None)
                row: dict[str, Any] = {
                    "cell": name,
                    **here.to_json(),
                    "label": label,
                    "group": number,
                    "size": int(group.sum()),
                    "poisoned": round(float(poisoned[group].float().mean()), 3),
                    "everywhere": round(everywhere, 3),
                    "best": round(best, 3),
                }
                with args.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
