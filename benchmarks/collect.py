"""Collects the `result.json` of finished `unplant erase --test` runs into JSON lines, and prints them as a table.

    python benchmarks/collect.py docs/research/results/cifar10.jsonl badnets-erased badnets-released …

Folders that the file holds already are replaced; without folders it only prints the table.
"""

import argparse
import csv
import json
from pathlib import Path
from typing import Any


def main() -> None:
    """Reads, merges, writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("folders", type=Path, nargs="*")
    wanted = parser.parse_args()
    rows = {}
    if wanted.results.exists():
        rows = {row["run"]: row for row in map(json.loads, wanted.results.read_text(encoding="utf-8").splitlines())}
    for folder in wanted.folders:
        rows[folder.name] = row_of(folder)
    if wanted.folders:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows.values()]
        wanted.results.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(table(list(rows.values()))))


def row_of(folder: Path) -> dict[str, Any]:
    """One run; with the quality of its suspects where `plant` left the truth beside the model."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    row = {"run": folder.name, **result, "config": config["eraser"]}
    row["model"], row["data"] = Path(result["model"]).name, "/".join(Path(result["data"]).parts[-2:])
    truth = folder.parent / Path(result["model"]).name / "truth" / "poison.csv"
    if truth.is_file() and result["suspects"] is not None:
        with truth.open(encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        poisoned = {line["file"] for line in lines if line["poisoned"] == "1"}
        whole = result["images"] == len(lines)  # of a part it isn't known which poisoned images were in it
        with (folder / "suspects.csv").open(encoding="utf-8") as file:
            flagged = {line["file"] for line in csv.DictReader(file)}
        hits = len(flagged & poisoned)
        row["quality"] = {"precision": hits / max(1, len(flagged)), "recall": hits / len(poisoned) if whole else None}
    return row


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines."""
    lines = [
        "| run | method | ACC before → after | ASR before → after (upper 95 %) | natural | RA | worst class"
        " | suspects P / R | passes |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        b, a, quality = row["before"], row["after"], row.get("quality")
        found = " / ".join("–" if v is None else f"{100 * v:.1f}" for v in quality.values()) if quality else "–"
        passes = sum(step.get("passes", 0) for step in row["rounds"])
        cells = [
            row["run"],
            row["method"] + ("" if row["preset"] == "default" else f" ({row['preset']})"),
            f"{100 * b['acc']:.1f} → {100 * a['acc']:.1f}",
            f"{100 * b['asr']:.1f} → {100 * a['asr']:.1f} ({100 * a['asr_upper']:.1f})",
            f"{100 * a['natural_target_rate']:.1f}",
            f"{100 * a['ra']:.1f}",
            f"{100 * b['worst_class_acc']:.1f} → {100 * a['worst_class_acc']:.1f}",
            found,
            f"{passes:.1f}" if passes else "–",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()
