"""`unplant methods`: what there is to choose from, from the declarations themselves."""

import inspect
from typing import Any

from rich.table import Table

import unplant.attacks  # noqa: F401 (registers the triggers)
from unplant.cli.output import emit, emit_text, show
from unplant.erasers import erasers
from unplant.limits import Limits
from unplant.models import architectures
from unplant.params import Config
from unplant.planting import TrainConfig
from unplant.triggers import triggers

CONTROLS = {
    "data": "controls the data",
    "surrogate": "controls the data, with a model of its own",
    "training": "controls the training",
}


def run(*, json: bool) -> None:
    """Prints erasers, attacks and architectures."""
    methods = {
        "erasers": {
            name: {"needs": m.needs, "presets": ["default", *m.presets], "settings": settings(m.config)}
            for name, m in erasers.items()
        },
        "attacks": {
            name: {
                "access": kind.access,
                "presets": list(kind.presets),
                "recipe": {**kind.recipe, **({"cover_ratio": kind.cover_ratio} if kind.cover_ratio else {})},
                "settings": settings(kind),
            }
            for name, kind in sorted(triggers.items())
        },
        "architectures": {name: str(inspect.signature(build)) for name, build in architectures.items()},
        "training": settings(TrainConfig),
        "limits": settings(Limits),
    }
    if json:
        emit(methods)
        return
    for kind in ("erasers", "attacks"):
        for name, about in methods[kind].items():
            needs = f"needs {about['needs']} data" if "needs" in about else CONTROLS[about["access"]]
            recipe = "".join(f"; {key} {value}" for key, value in about.get("recipe", {}).items())
            emit_text(f"\n{kind[:-1]} {name}, {needs}; presets: {', '.join(about['presets']) or 'none'}{recipe}")
            show(_table(about["settings"]))
    emit_text("\ntraining (plant --set)")
    show(_table(methods["training"]))
    emit_text("\nlimits on untrusted files (--limit)")
    show(_table(methods["limits"]))
    for name, signature in methods["architectures"].items():
        emit_text(f"architecture {name}{signature}")


def settings(config: type[Config]) -> dict[str, dict[str, Any]]:
    """Default and meaning of every setting."""
    schema = config.model_json_schema()["properties"]
    return {
        name: {"default": field.get_default(call_default_factory=True), "meaning": schema[name].get("description", "")}
        for name, field in config.model_fields.items()
        if field.repr  # what a trigger has learnt is no setting
    }


def _table(rows: dict[str, dict[str, Any]]) -> Table:
    table = Table("setting", "default", "meaning", box=None)
    for name, about in rows.items():
        default = about["default"]
        table.add_row(name, f"{default:.4g}" if isinstance(default, float) else str(default), about["meaning"])
    return table
