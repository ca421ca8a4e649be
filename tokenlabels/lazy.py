"""`functools.cached_property` as it is from Python 3.12 on, without a lock.

That of Python 3.11 holds one while it computes, for all objects of the class: threads wait for each other, and a
process that was forked in that moment waits for ever.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from functools import cached_property as cached_property
else:

    class cached_property:  # noqa: N801 - a decorator
        """A property that is computed when it is first read, and kept in the object.

        Two threads that read it first at the same time both compute it.
        """

        def __init__(self, compute: Callable[[Any], Any]) -> None:
            self._compute = compute
            self.__doc__ = compute.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self._name = name

        def __get__(self, instance: object | None, owner: type | None = None) -> Self | Any:
            if instance is None:
                return self
            value = instance.__dict__[self._name] = self._compute(instance)
            return value
