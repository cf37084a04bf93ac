"""Named things that users choose on the command line: one registry a kind."""

from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from unplant.errors import UsageError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from ids to things of one kind, with an error that lists what there is.

    >>> colours = Registry("colour")
    >>> colours.add("red", 1)
    1
    >>> colours["green"]
    Traceback (most recent call last):
    ...
    unplant.errors.UsageError: unknown colour 'green'; there are: red
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._things: dict[str, T] = {}

    def add(self, name: str, thing: T) -> T:
        """Adds a thing and returns it; a name can be taken once only."""
        if name in self._things:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._things[name] = thing
        return thing

    def register(self, name: str) -> Callable[[T], T]:
        """`add` as a decorator."""
        return lambda thing: self.add(name, thing)

    def __getitem__(self, name: str) -> T:
        try:
            return self._things[name]
        except KeyError:
            raise UsageError(f"unknown {self.kind} {name!r}; there are: {', '.join(sorted(self))}") from None

    def get(self, name: str, default: T | None = None) -> T | None:  # type: ignore[override]
        """The thing of that name, or the default."""
        return self._things.get(name, default)

    def __contains__(self, name: object) -> bool:
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __len__(self) -> int:
        return len(self._things)
