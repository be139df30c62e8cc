"""A mapping from objects that asks none of them whether they are equal, and keeps none of them alive."""

from __future__ import annotations

import weakref
from typing import Generic, TypeVar, overload

Value = TypeVar("Value")


class IdentityMap(Generic[Value]):
    """What is known of objects, by which object it is. Programs' own classes may forbid to be hashed, or be equal."""

    def __init__(self) -> None:
        self._entries: dict[int, tuple[weakref.ref[object], Value]] = {}

    @overload
    def get(self, key: object) -> Value | None: ...
    @overload
    def get(self, key: object, default: Value) -> Value: ...
    def get(self, key: object, default: Value | None = None) -> Value | None:
        """What is known of an object, or `default`."""
        entry = self._entries.get(id(key))
        return entry[1] if entry is not None and entry[0]() is key else default

    def __contains__(self, key: object) -> bool:
        entry = self._entries.get(id(key))
        return entry is not None and entry[0]() is key

    def __setitem__(self, key: object, value: Value) -> None:
        number, entries = id(key), self._entries

        def forget(reference: weakref.ref[object]) -> None:
            entry = entries.get(number)
            if entry is not None and entry[0] is reference:
                del entries[number]

        entries[number] = (weakref.ref(key, forget), value)
