"""`unplant methods`: what there is to choose from, from the declarations themselves."""

import inspect
from typing import Any

from rich.table import Table

import unplant.attacks  # noqa: F401 (registers the triggers)
from unplant.cli.output import emit, emit_text, show
from unplant.erasers import erasers
from unplant.models import architectures
from unplant.params import Config
from unplant.planting import TrainConfig
from unplant.poisoning import triggers


def run(*, json: bool) -> None:
    """Prints erasers, attacks and architectures."""
    methods = {
        "erasers": {
            name: {"needs": m.needs, "presets": ["default", *m.presets], "settings": settings(m.config)}
            for name, m in erasers.items()
        },
        "attacks": {
            name: {"presets": list(kind.presets), "settings": settings(kind)} for name, kind in triggers.items()
        },
        "architectures": {name: str(inspect.signature(build)) for name, build in architectures.items()},
        "training": settings(TrainConfig),
    }
    if json:
        emit(methods)
        return
    for kind in ("erasers", "attacks"):
        for name, about in methods[kind].items():
            needs = f", needs {about['needs']} data" if "needs" in about else ""
            emit_text(f"\n{kind[:-1]} {name}{needs}; presets: {', '.join(about['presets']) or 'none'}")
            show(_table(about["settings"]))
    emit_text("\ntraining (plant --set)")
    show(_table(methods["training"]))
    for name, signature in methods["architectures"].items():
        emit_text(f"architecture {name}{signature}")


def settings(config: type[Config]) -> dict[str, dict[str, Any]]:
    """Default and meaning of every setting."""
    schema = config.model_json_schema()["properties"]
    return {
        name: {"default": field.get_default(call_default_factory=True), "meaning": schema[name].get("description", "")}
        for name, field in config.model_fields.items()
    }


def _table(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table("setting", "default", "meaning", box=None)
    for name, about in rows.items():
        default = about["default"]
        table.add_row(name, f"{default:.4g}" if isinstance(default, float) else str(default), about["meaning"])
    return table
