"""Pickles as data: read by a machine that builds records and calls nothing.

It knows the opcodes that plain data, names and calls are written with. A name stays a name, a call stays a record of
the name and its arguments: nothing is imported, nothing is run, and only text, numbers and records become keys.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from typing import Any, NamedTuple


class Name(NamedTuple):
    """What a pickle calls a class or a function."""

    text: str  # "module name"


class Record:
    """What a pickle would have made: the name called, its arguments, and the state given to the result."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple[Any, ...]) -> None:
        self.name, self.args, self.state = name, args, None

    def __repr__(self) -> str:
        return self.name


_VALUES = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ARGUMENTS = {
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_EMPTY: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read(data: bytes, allowed: Callable[[str], bool]) -> Any:
    """What the pickle holds. Raises ValueError where it is damaged, has other opcodes or names than `allowed`."""
    machine = _Machine(allowed)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"the pickle must be in order, got {type(error).__name__} in it") from error
    if len(machine.stack) != 1 or machine.marks:
        raise ValueError(f"the pickle must hold one thing, got {len(machine.stack)}")
    return machine.stack[0]


class _Machine:
    def __init__(self, allowed: Callable[[str], bool]) -> None:
        self.allowed = allowed
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _ARGUMENTS:
            stack.append(argument)
        elif name in _VALUES:
            stack.append(_VALUES[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in _TUPLES:
            stack.append(tuple(self.pop(_TUPLES[name])))
        elif name == "TUPLE":
            stack.append(tuple(self.marked()))
        elif name in ("APPEND", "APPENDS"):
            values = self.marked() if name == "APPENDS" else self.pop(1)
            list.extend(stack[-1], values)
        elif name in ("SETITEM", "SETITEMS"):
            self.set_items(self.marked() if name == "SETITEMS" else self.pop(2))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self.name(argument if name == "GLOBAL" else " ".join(self.pop(2)))
        elif name in ("REDUCE", "NEWOBJ"):
            called, args = self.pop(2)
            if not isinstance(called, Name) or not isinstance(args, tuple):
                raise ValueError("calls must be of names, with a tuple")
            stack.append(Record(called.text, args))
        elif name == "BUILD":
            (state,) = self.pop(1)
            if not isinstance(stack[-1], Record):
                raise ValueError("states must be of records")
            stack[-1].state = state
        elif name == "BINPERSID":
            stack.append(Record("persistent", tuple(self.pop(1))))
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise ValueError(f"the pickle must be plain data, got the opcode {name}")

    def pop(self, n: int) -> list[Any]:
        if len(self.stack) - n < (self.marks[-1] if self.marks else 0):
            raise ValueError("the pickle must be in order, got too few things for a step")
        values = self.stack[-n:]
        del self.stack[-n:]
        return values

    def marked(self) -> list[Any]:
        at = self.marks.pop()
        values = self.stack[at:]
        del self.stack[at:]
        return values

    def set_items(self, flat: list[Any]) -> None:
        keys, values = flat[::2], flat[1::2]
        if not all(isinstance(key, str | int | Record) for key in keys):
            raise ValueError("keys of dicts must be text, numbers or records")
        dict.update(self.stack[-1], zip(keys, values, strict=True))

    def name(self, text: str) -> None:
        if not self.allowed(text):
            raise ValueError(f"names must be on the list, got {text[:60]}")
        self.stack.append(Name(text))
