"""Pickles read without unpickling: a stack machine that builds inert nodes and never imports, calls or hashes anything.

A pickle is a program for a small machine that may import and call what it names. The restricted unpicklers run that
program and filter its imports; torch's own (`weights_only=True`) had CVE-2025-32434 and CVE-2026-24747, takes bombs,
and hangs on dictionary keys whose hash takes exponential time. Here an import becomes a `Name` and a call a `Call`:
what the file wants is known, and none of it happens.
"""

import gc
import pickletools
import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from unplant.errors import ModelFileError
from unplant.files.nodes import Call, Dict, Name, Stored
from unplant.limits import DEFAULT, Limits

BROKEN = (ValueError, LookupError, TypeError, OverflowError, AssertionError, struct.error)
"""What pickletools and the machine raise on damaged streams."""


class PickleReader:
    """Reads the pickles that follow one another in a stream; the limit of instructions holds for all of them together.

    Args:
        path: for errors.
        stream: at most `limits.pickle_bytes` in memory.
        cut: whether the file goes on behind the stream.

    Attributes:
        names: what the pickles would import, in order.
        stored: what they name outside of themselves, in order.
    """

    def __init__(self, path: Path, stream: BytesIO, limits: Limits = DEFAULT, *, cut: bool = False) -> None:
        self.path, self.stream, self.limits, self._cut = path, stream, limits, cut
        self.names: dict[Name, None] = {}
        self.stored: list[Stored] = []
        self._opcodes = 0

    def read(self) -> Any:
        """The next pickle: None, bool, int, float, str, bytes, list and tuple as they are, all else as nodes.

        The value may be nested deeply, hold itself, and share parts: walk it with bounds only.

        Raises:
            ModelFileError: damaged, over the limits, or no pickle that torch writes.
        """
        try:
            with warnings.catch_warnings(), _collector_paused():
                warnings.simplefilter("ignore")  # wrong escapes in the strings of old protocols
                return self._run()
        except BROKEN as error:
            if self._cut and self.stream.read(1) == b"":
                raise ModelFileError(
                    f"{self.path}: its pickle has more than {self.limits.pickle_bytes:,} bytes or never ends; "
                    "raise --limit pickle_bytes=N if you trust it"
                ) from None
            raise ModelFileError(f"{self.path} is damaged or no torch checkpoint: {str(error)[:80]}") from None

    def _run(self) -> Any:
        machine, most, seen = _Machine(self), self.limits.pickle_opcodes, self._opcodes
        for opcode, argument, _ in pickletools.genops(self.stream):
            seen += 1
            if seen > most:
                raise ModelFileError(
                    f"{self.path}: its pickle has more than {most:,} instructions; "
                    "raise --limit pickle_opcodes=N if you trust it"
                )
            step = _STEPS.get(opcode.name)
            if step is None:
                raise ValueError(f"the instruction {opcode.name}, which torch never writes")
            step(machine, argument)
        self._opcodes = seen
        return machine.pop()


@contextmanager
def _collector_paused() -> Iterator[None]:
    """Without the search for cycles, which goes through all that was made again and again: a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Machine:
    def __init__(self, reader: PickleReader) -> None:
        self.reader = reader
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[str, Any] = {}  # by text: whole numbers can be chosen so that their hashes collide

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("a value is missing")
        return self.stack.pop()

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise ValueError("a value is missing")
        return self.stack[-1]

    def pop_marked(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def take(self, count: int) -> tuple[Any, ...]:
        return tuple([self.pop() for _ in range(count)][::-1])

    def drop(self, _: Any) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop()

    def mark(self, _: Any) -> None:
        self.marks.append(len(self.stack))

    def remember(self, index: int | None) -> None:
        self.memo[str(len(self.memo) if index is None else index)] = self.top()

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def recall(self, index: int) -> None:
        self.stack.append(self.memo[str(index)])

    def append(self, _: Any) -> None:
        item, target = self.pop(), self.top()
        if isinstance(target, list):
            target.append(item)
        else:
            self.extend([item])

    def extend(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Call):
            target.items = [] if target.items is None else target.items
            target.items.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise ValueError("items for what holds none")

    def set_items(self, items: list[Any]) -> None:
        target = self.top()
        if isinstance(target, Call) and target.pairs is None:
            target.pairs = []
        if not isinstance(target, (Call, Dict)) or target.pairs is None:
            raise ValueError("keys for what has none")
        target.pairs.extend(_pairs(items))

    def build(self, _: Any) -> None:
        state, target = self.pop(), self.top()
        if not isinstance(target, Call):
            raise ValueError("a state for what has none")
        target.state = state

    def name(self, module: Any, name: Any) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        found = Name(module, name)
        self.reader.names[found] = None
        return found

    def instance(self, text: str) -> None:
        self.stack.append(Call(self.name(*text.split(" ", 1)), tuple(self.pop_marked())))

    def marked_object(self, _: Any) -> None:
        items = self.pop_marked()
        self.stack.append(Call(items[0], tuple(items[1:])))

    def call(self, count: int) -> None:
        function, *args = self.take(count)
        self.stack.append(Call(function, args[0] if count == 2 else tuple(args)))

    def outside(self, identity: Any) -> None:
        node = Stored(identity)
        self.reader.stored.append(node)
        self.stack.append(node)


def _pairs(items: list[Any]) -> list[tuple[Any, Any]]:
    return list(zip(items[::2], items[1::2], strict=True))


SET, FROZEN_SET = Name("builtins", "set"), Name("builtins", "frozenset")

_VALUES = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
)

_STEPS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), lambda m, _: None),
    **dict.fromkeys(_VALUES, _Machine.push),
    "NONE": _Machine.push,
    "NEWTRUE": lambda m, _: m.stack.append(True),
    "NEWFALSE": lambda m, _: m.stack.append(False),
    "EMPTY_LIST": lambda m, _: m.stack.append([]),
    "EMPTY_TUPLE": lambda m, _: m.stack.append(()),
    "EMPTY_DICT": lambda m, _: m.stack.append(Dict([])),
    "EMPTY_SET": lambda m, _: m.stack.append(Call(SET, ())),
    "MARK": _Machine.mark,
    "POP": _Machine.drop,
    "POP_MARK": lambda m, _: m.pop_marked().clear(),
    "DUP": lambda m, _: m.stack.append(m.top()),
    "TUPLE": lambda m, _: m.stack.append(tuple(m.pop_marked())),
    "TUPLE1": lambda m, _: m.stack.append(m.take(1)),
    "TUPLE2": lambda m, _: m.stack.append(m.take(2)),
    "TUPLE3": lambda m, _: m.stack.append(m.take(3)),
    "LIST": lambda m, _: m.stack.append(m.pop_marked()),
    "DICT": lambda m, _: m.stack.append(Dict(_pairs(m.pop_marked()))),
    "FROZENSET": lambda m, _: m.stack.append(Call(FROZEN_SET, (), items=m.pop_marked())),
    "BYTEARRAY8": lambda m, value: m.stack.append(bytes(value)),
    "APPEND": _Machine.append,
    "APPENDS": lambda m, _: m.extend(m.pop_marked()),
    "ADDITEMS": lambda m, _: m.extend(m.pop_marked()),
    "SETITEM": lambda m, _: m.set_items(list(m.take(2))),
    "SETITEMS": lambda m, _: m.set_items(m.pop_marked()),
    "BUILD": _Machine.build,
    "GET": _Machine.recall,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "PUT": _Machine.remember,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": _Machine.remember,
    "GLOBAL": lambda m, text: m.stack.append(m.name(*text.split(" ", 1))),
    "STACK_GLOBAL": lambda m, _: m.stack.append(m.name(*m.take(2))),
    "INST": _Machine.instance,
    "OBJ": _Machine.marked_object,
    "REDUCE": lambda m, _: m.call(2),
    "NEWOBJ": lambda m, _: m.call(2),
    "NEWOBJ_EX": lambda m, _: m.call(3),
    "PERSID": _Machine.outside,
    "BINPERSID": lambda m, _: m.outside(m.pop()),
}
