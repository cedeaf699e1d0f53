"""Reads the data of a pickle. Nothing that it names is imported or called.

`pickletools.genops` splits a pickle into its instructions. The machine here carries them out with lists, dicts, tuples
and plain values alone: what a pickle would import is a `Global`, which has a name and no behaviour, and what it would
make by calling one is a `Made`, which records the call. Nothing else can come about, since no instruction has access to
an attribute, a method or a module. Python 2's strings are str, by Latin-1: byte for byte. A `Source` bounds the bytes
and the work.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any, BinaryIO, cast

from alexnet_kernels._errors import first_line, printable, shortened

__all__ = ["MOST_BYTES", "Global", "Made", "Source", "read_pickle"]

MOST_BYTES = 64 << 20
"""The longest pickle of plain values: tensors are stored beside it."""
_INSTRUCTIONS = 3_000_000
_LINE = 1 << 20
_BLOCK = 1 << 20
_BITS = 4096
"""The longest whole number, whose products take no time worth mentioning."""
_SHORT_KEY = 256
_SCALARS = (str, bytes, int, float, type(None))
_DICTS = ("collections.OrderedDict", "ordereddict.OrderedDict", "collections.defaultdict")


@dataclass(frozen=True, eq=False)
class Global:
    """What a pickle names: a class or a function, by its module and name."""

    name: str


@dataclass(eq=False, repr=False)
class Made:
    """What a pickle would make by a call."""

    by: Any
    """A `Global`, or whatever else it would call."""
    arguments: Any
    state: Any = None
    """What it would set as the object's attributes."""
    items: list[Any] = field(default_factory=list)
    """What it would append to it."""
    entries: dict[Any, Any] = field(default_factory=dict)
    """What it would store in it by keys."""

    @property
    def name(self) -> str:
        """What it would call; of an object that is no `Global`, the type."""
        return self.by.name if isinstance(self.by, Global) else type(self.by).__name__

    def __repr__(self) -> str:
        # The arguments may be deeply nested, or hold one object very many times.
        return f"<{printable(shortened(self.name))}>"


class Source:
    """A file whose reads and whose instructions are bounded, whatever lengths its content declares.

    limit: bytes. instructions: also counts the pairs that a call would copy into a dict.
    """

    def __init__(self, file: BinaryIO, limit: int = MOST_BYTES, instructions: int = _INSTRUCTIONS) -> None:
        self._file, self._limit, self._instructions = file, limit, instructions
        self._bytes_left, self._instructions_left = limit, instructions

    def read(self, count: int) -> bytes:
        self.check_room(count)
        if count <= _BLOCK:
            content = self._file.read(count)
        else:
            # One read would allocate what is declared, not what is there.
            blocks = []
            while count > 0 and (block := self._file.read(min(count, _BLOCK))):
                count -= len(block)
                blocks.append(block)
            content = b"".join(blocks)
        self._bytes_left -= len(content)
        return content

    def readline(self) -> bytes:
        line = self._file.readline(min(_LINE, self._bytes_left + 1))
        self.check_room(len(line))
        self._bytes_left -= len(line)
        if not line.endswith(b"\n"):
            raise ValueError("its pickle has a line that does not end")
        return line

    def tell(self) -> int:
        return self._file.tell()

    def spend_bytes(self, count: int) -> None:
        """Count bytes that are copied as if they were read."""
        self.check_room(count)
        self._bytes_left -= count

    def spend_instructions(self, count: int) -> None:
        self._instructions_left -= count
        if self._instructions_left < 0:
            raise ValueError(f"its pickle has more than {self._instructions:,} instructions")

    def check_room(self, count: int) -> None:
        if count > self._bytes_left:
            raise ValueError(f"its pickle has, or declares, more than {self._limit:,} bytes")


def read_pickle(
    source: Source,
    made: Callable[[Any, Any], Any] = Made,
    persistent: Callable[[Any], Any] | None = None,
) -> Any:
    """The content of the next pickle of `source`: plain values, `Global` and what `made` and `persistent` return.

    made: gets what the pickle would call and its arguments. persistent: gets a persistent id. Sets are lists here,
    dicts of other classes (OrderedDict, defaultdict) are dicts, and keys of bytes are str. Raises ValueError for
    anything that is not a whole pickle, or is too large.
    """
    machine = _Machine(source, made, persistent)
    try:
        for instruction, argument, _ in pickletools.genops(cast("IO[bytes]", source)):
            source.spend_instructions(1)
            name = instruction.name
            if name in _LITERALS:
                if type(argument) is int and argument.bit_length() > _BITS:
                    raise ValueError(f"its pickle has a number of more than {_BITS:,} bits")
                machine.stack.append(argument)
            elif name == "STOP":
                return machine.result()
            elif name in _STEPS:
                _STEPS[name](machine, argument)
            else:
                raise ValueError(f"its pickle has the instruction {name}, which no data needs")
    except ValueError as error:
        raise ValueError(shortened(first_line(error))) from error
    except (IndexError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"its pickle is damaged ({type(error).__name__})") from error
    raise ValueError("its pickle does not end")


class _Machine:
    """The stack and the memo of a pickle. Errors of damaged pickles are those of Python's lists and dicts."""

    def __init__(
        self, source: Source, made: Callable[[Any, Any], Any], persistent: Callable[[Any], Any] | None
    ) -> None:
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []
        """The stacks below each mark."""
        self._memo: dict[int, Any] = {}
        self._source, self._made, self._persistent = source, made, persistent

    def result(self) -> Any:
        if len(self.stack) != 1 or self._below:
            raise IndexError
        return self.stack[0]

    def put(self, place: int) -> None:
        self._memo[place] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def get(self, place: int) -> None:
        self.stack.append(self._memo[place])

    def mark(self, _: Any) -> None:
        self._below.append(self.stack)
        self.stack = []

    def _last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError
        return self.stack[-count:]

    def _to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self._below.pop()
        return items

    def pop(self, _: Any) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self._to_mark()

    def pop_mark(self, _: Any) -> None:
        self._to_mark()

    def dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def make_list(self, _: Any) -> None:
        items = self._to_mark()
        self.stack.append(items)

    def make_tuple(self, _: Any) -> None:
        items = self._to_mark()
        self.stack.append(tuple(items))

    def short_tuple(self, count: int) -> None:
        self.stack[-count:] = [tuple(self._last(count))]

    def make_dict(self, _: Any) -> None:
        items = self._to_mark()
        self.stack.append({})
        self._store(items)

    def append(self, _: Any) -> None:
        self._extend([self.stack.pop()])

    def appends(self, _: Any) -> None:
        self._extend(self._to_mark())

    def _extend(self, items: Any) -> None:
        target = self.stack[-1]
        if isinstance(target, Made):
            target.items.extend(items)
        elif isinstance(target, list):
            target.extend(items)
        else:
            raise TypeError

    def set_item(self, _: Any) -> None:
        items = self._last(2)
        del self.stack[-2:]
        self._store(items)

    def set_items(self, _: Any) -> None:
        self._store(self._to_mark())

    def _store(self, items: Any) -> None:
        target = self.stack[-1]
        entries = target.entries if isinstance(target, Made) else target
        if not isinstance(entries, dict) or len(items) % 2:
            raise TypeError
        for key, value in zip(items[::2], items[1::2], strict=True):
            entries[self._key(key)] = value

    def _key(self, key: Any) -> Any:
        """The key of a dict, whose hash and comparison take time for each use of it."""
        if type(key) is str and len(key) < _SHORT_KEY:
            return key
        parts = key if isinstance(key, tuple) else (key,)
        # The hash of a tuple of tuples takes exponential time where it holds one tuple many times.
        flat = all(isinstance(part, _SCALARS) for part in parts) if isinstance(key, tuple) else True
        if not flat or not isinstance(key, (*_SCALARS, tuple, Global, Made)):
            kind = f"nested {type(key).__name__}" if isinstance(key, tuple) else type(key).__name__
            raise ValueError(f"its pickle is damaged: it holds a {kind} as a key")
        size = sum(len(part) if isinstance(part, str | bytes) else 1 for part in parts)
        if size > _SHORT_KEY:
            self._source.spend_bytes(size)
        return key.decode("latin-1") if isinstance(key, bytes) else key

    def name(self, name: str) -> None:
        self.stack.append(_global(*name.split(" ", 1)))

    def stack_name(self, _: Any) -> None:
        module, name = self._last(2)
        self.stack[-2:] = [_global(module, name)]

    def reduce(self, _: Any) -> None:
        function, arguments = self._last(2)
        self.stack[-2:] = [self._call(function, arguments)]

    def new_object(self, _: Any) -> None:
        function, arguments, _ = self._last(3)
        self.stack[-3:] = [self._call(function, arguments)]

    def instance(self, name: str) -> None:
        arguments = tuple(self._to_mark())
        self.stack.append(self._call(_global(*name.split(" ", 1)), arguments))

    def make_object(self, _: Any) -> None:
        function, *arguments = self._to_mark()
        self.stack.append(self._call(function, tuple(arguments)))

    def _call(self, function: Any, arguments: Any) -> Any:
        """What `made` makes of it. Of what that leaves as it is, dicts and bytes of Python are taken for what they are.

        The copies are counted: a pickle may name one list or string very many times.
        """
        found = self._made(function, arguments)
        if type(found) is not Made:
            return found
        if found.name in _DICTS:
            pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
            self._source.spend_instructions(len(pairs))
            if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
                raise TypeError
            return {self._key(key): value for key, value in pairs}
        if found.name == "_codecs.encode" and isinstance(arguments[0], str):
            self._source.spend_bytes(len(arguments[0]))
            return arguments[0].encode("latin-1")
        return found

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        if isinstance(target := self.stack[-1], Made):
            target.state = state

    def persistent(self, _: Any) -> None:
        if self._persistent is None:
            raise ValueError("its pickle refers to what is stored elsewhere")
        self.stack.append(self._persistent(self.stack.pop()))


def _global(module: object, name: object) -> Global:
    # Only strings name anything. Each use of a name takes time, so that long ones are cut.
    parts = (shortened(part) if isinstance(part, str) else type(part).__name__ for part in (module, name))
    return Global(".".join(parts))


_LITERALS = frozenset((
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
))  # fmt: skip
_Step = Callable[[_Machine, Any], None]


def _pushing(value: Any) -> _Step:
    return lambda machine, _: machine.stack.append(value)


def _pushing_new(kind: Callable[[], Any]) -> _Step:
    return lambda machine, _: machine.stack.append(kind())


def _tuple_of(count: int) -> _Step:
    return lambda machine, _: machine.short_tuple(count)


_STEPS: dict[str, _Step] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    "NONE": _pushing(None),
    "NEWTRUE": _pushing(True),
    "NEWFALSE": _pushing(False),
    "EMPTY_TUPLE": _pushing(()),
    "EMPTY_LIST": _pushing_new(list),
    "EMPTY_DICT": _pushing_new(dict),
    "EMPTY_SET": _pushing_new(list),
    "TUPLE1": _tuple_of(1),
    "TUPLE2": _tuple_of(2),
    "TUPLE3": _tuple_of(3),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": _Machine.memoize,
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.dup,
    "LIST": _Machine.make_list,
    "FROZENSET": _Machine.make_list,
    "TUPLE": _Machine.make_tuple,
    "DICT": _Machine.make_dict,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "ADDITEMS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_object,
    "INST": _Machine.instance,
    "OBJ": _Machine.make_object,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
"""What the machine does for each instruction. Others, such as those of extension codes, have no place in data."""
