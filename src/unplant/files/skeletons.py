"""Where the weights are in what a pickle would have made: in a dictionary, under a wrapper's key, or in a module."""

from collections.abc import Iterator
from pathlib import Path
from shlex import quote
from typing import Any

from unplant.errors import ModelFileError, shown
from unplant.files.nodes import Call, Dict, Name
from unplant.files.tensors import is_tensor
from unplant.limits import DEFAULT, Limits

WRAPPERS = ("net", "state_dict", "model", "model_state_dict", "netC", "network", "weights")
"""Keys under which training scripts store the weights."""

_DICTIONARIES = {"collections.OrderedDict", "collections.defaultdict", "builtins.dict", "__builtin__.dict"}
_LONGEST_KEY = 1000


def find_weights(path: Path, root: Any, key: str | None = None, limits: Limits = DEFAULT) -> dict[str, Any]:
    """The nodes of the tensors by their keys, as the saved network's state_dict has them.

    Args:
        path: for errors.
        root: what was saved.
        key: of the dictionary that was saved, where the weights are; default: itself, or the one known wrapper in it.
        limits: on the number of tensors.

    Raises:
        ModelFileError: no weights, or several candidates.
    """
    node = root if key is None else _chosen(path, root, key)
    for _ in range(4):
        if is_module(node):
            return _counted(path, _of_module(path, node, limits), limits)
        pairs = entries(node)
        if pairs is None:
            raise ModelFileError(f"{path} holds a {kind_of(node)}, not a dictionary of tensors")
        if pairs and all(is_tensor(value) for _, value in pairs):
            if not all(isinstance(name, str) for name, _ in pairs):
                raise ModelFileError(f"{path} has keys that aren't text")
            return _counted(path, dict(pairs), limits)
        named = _named(node)
        found = candidates(node)
        if len(found) > 1:
            raise ModelFileError(
                f"{path} holds several models ({', '.join(found)}); save the one you mean by itself: "
                f"unplant inspect {quote(str(path))} --key {found[0]} --weights OUT.safetensors"
            )
        if not found:
            raise ModelFileError(f"{path} has no weights that unplant recognises; its keys are: {_keys(pairs)}")
        node = named[found[0]]
    raise ModelFileError(f"{path} wraps its weights more than four times")


def candidates(node: Any) -> list[str]:
    """The known wrappers' keys that a dictionary has."""
    named = _named(node)
    return [key for key in WRAPPERS if key in named and (is_module(named[key]) or entries(named[key]) is not None)]


def entries(node: Any) -> list[tuple[Any, Any]] | None:
    """Keys and values, if the node would be a dictionary of any usual kind; else None."""
    if isinstance(node, Dict):
        return node.pairs
    if not isinstance(node, Call) or not isinstance(node.function, Name) or str(node.function) not in _DICTIONARIES:
        return None
    first = node.args[0] if isinstance(node.args, tuple) and node.args else None
    early = [tuple(pair) for pair in first if _is_pair(pair)] if isinstance(first, list) else []  # as Python 2 wrote it
    return [*early, *(node.pairs or [])]


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2


def is_module(node: Any) -> bool:
    """Whether the node would be a `torch.nn.Module`, by what it would hold."""
    return isinstance(node, Call) and {"_parameters", "_modules"} <= _state(node).keys()


def kind_of(node: Any) -> str:
    """What the node would be, in a word for messages."""
    if is_tensor(node):
        return "Tensor"
    if isinstance(node, Call):
        return f"{shown(str(node.function))} object" if isinstance(node.function, Name) else "made-up object"
    return {"Dict": "dict"}.get(type(node).__name__, type(node).__name__)


def _named(node: Any) -> dict[str, Any]:
    """The entries whose keys are text; of equal keys the last one, as in Python."""
    return {key: value for key, value in entries(node) or [] if isinstance(key, str)}


def _chosen(path: Path, root: Any, key: str) -> Any:
    named = _state(root) if is_module(root) else _named(root)
    if key not in named:
        raise ModelFileError(f"{path} has no key {key!r}; its keys are: {_keys(list(named.items()))}")
    return named[key]


def _keys(pairs: list[tuple[Any, Any]]) -> str:
    return ", ".join(shown(key, 40) if isinstance(key, str) else kind_of(key) for key, _ in pairs[:10]) or "none"


def _counted(path: Path, weights: dict[str, Any], limits: Limits) -> dict[str, Any]:
    if not weights:
        raise ModelFileError(f"{path} holds a module without weights")
    if len(weights) > limits.tensors:
        raise ModelFileError(
            f"{path} has {len(weights):,} tensors, more than the limit of {limits.tensors:,}; "
            "raise --limit tensors=N if you trust it"
        )
    return weights


def _state(node: Any) -> dict[str, Any]:
    """An object's `__dict__`, as it would be set."""
    state = node.state if isinstance(node, Call) else None
    if isinstance(state, tuple) and state:  # with slots
        state = state[0]
    return _named(state)


def _of_module(path: Path, root: Any, limits: Limits) -> dict[str, Any]:
    """The state_dict of a module: its parameters, then its persistent buffers, then its children's, in order."""
    found: dict[str, Any] = {}
    waiting, seen = [("", root)], 0
    while waiting:
        prefix, module = waiting.pop()
        seen += 1
        if seen > limits.tensors or len(prefix) > _LONGEST_KEY:
            raise ModelFileError(f"{path} holds a module of too many parts, or one that holds itself")
        state = _state(module)
        passing = set(_texts(state.get("_non_persistent_buffers_set")))
        own = {**_named(state.get("_parameters")), **_named(state.get("_buffers"))}
        found |= {prefix + name: value for name, value in own.items() if is_tensor(value) and name not in passing}
        children = [(f"{prefix}{name}.", child) for name, child in _named(state.get("_modules")).items()]
        waiting += children[::-1]
    return found


def _texts(node: Any) -> Iterator[str]:
    """The texts in what would be a set."""
    if isinstance(node, Call):
        first = node.args[0] if isinstance(node.args, tuple) and node.args else []
        for item in [*(first if isinstance(first, list) else []), *(node.items or [])]:
            if isinstance(item, str):
                yield item
