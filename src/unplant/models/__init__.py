"""Architectures by id: `preact_resnet18`, `preact_resnet18:width=16`, `small_cnn`, or `path/to/file.py:factory`."""

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from torch import nn

from unplant.errors import ModelFileError, UsageError
from unplant.models.preact_resnet import preact_resnet18
from unplant.models.small_cnn import small_cnn
from unplant.params import parse_spec
from unplant.registry import Registry

architectures: Registry[Callable[..., nn.Module]] = Registry("architecture")
architectures.add("preact_resnet18", preact_resnet18)
architectures.add("small_cnn", small_cnn)


def build(spec: str, *, num_classes: int, channels: int) -> nn.Module:
    """A new network. A file's factory gets `num_classes` and `channels` if it has parameters of these names.

    Naming a Python file runs that file: it is the user's own program, as trusted as Unplant's call itself.

    Raises:
        UsageError: the id or one of its settings is unknown, or the file has no such factory.
        ModelFileError: the factory fails or returns something else than a module.
    """
    path, _, name = spec.rpartition(":")
    factory, settings = _from_file(Path(path), name) if path.endswith(".py") else _from_registry(spec)
    known = inspect.signature(factory).parameters
    given = {"num_classes": num_classes, "channels": channels}
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())
    settings = {key: value for key, value in given.items() if key in known or takes_all} | settings
    unknown = set() if takes_all else settings.keys() - known.keys()
    if unknown:
        raise UsageError(f"architecture {spec!r}: no setting {sorted(unknown)[0]!r}; there are: {', '.join(known)}")
    try:
        network = factory(**settings)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelFileError(f"architecture {spec!r} can't be built: {str(error).splitlines()[0]}") from error
    if not isinstance(network, nn.Module):
        raise ModelFileError(f"architecture {spec!r} must return a torch.nn.Module, got {type(network).__name__}")
    return network


def code_of(spec: str) -> str | None:
    """SHA-256 of the Python file that an architecture comes from; None if it is a registered one."""
    file = Path(spec.rpartition(":")[0])
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.suffix == ".py" and file.is_file() else None


def _from_registry(spec: str) -> tuple[Callable[..., nn.Module], dict[str, object]]:
    if spec.endswith(".py"):
        raise UsageError(f"name the factory after the file: {spec}:factory")
    name, settings = parse_spec(spec)
    return architectures[name], settings


def _from_file(path: Path, name: str) -> tuple[Callable[..., nn.Module], dict[str, object]]:
    if not path.is_file():
        raise UsageError(f"there is no architecture file {path}")
    module_spec = importlib.util.spec_from_file_location(f"unplant_user_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UsageError(f"{path} can't be imported as Python")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module  # dataclasses and pickles look their module up there
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        raise UsageError(f"{path} can't be imported: {type(error).__name__}: {error}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise UsageError(f"{path} has no factory {name!r}")
    return cast(Callable[..., nn.Module], factory), {}
