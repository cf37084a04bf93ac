"""What a pickle would make, as inert nodes: none of them is ever imported, called or hashed.

They compare by identity and print nothing of what they hold, as that can be exponentially large or hold itself.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Name:
    """A name that the pickle would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, repr=False, slots=True)
class Dict:
    """A dictionary as its pairs, in order; keys can be anything, as they are never hashed."""

    pairs: list[tuple[Any, Any]]


@dataclass(eq=False, repr=False, slots=True)
class Call:
    """What the pickle would make by calling `function(*args)`, and then fill.

    Attributes:
        function: a `Name`, in honest files.
        args: a tuple, in honest files.
        state: what would be given to `__setstate__`, or become the `__dict__`.
        items: what would be appended (lists and sets).
        pairs: what would be set by key (dictionaries).
    """

    function: Any
    args: Any
    state: Any = None
    items: list[Any] | None = None
    pairs: list[tuple[Any, Any]] | None = None


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Stored:
    """What lies outside the pickle, by its id: in torch's files, a storage."""

    id: Any
