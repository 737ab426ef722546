"""A cache for functions without arguments whose result may be a little old."""

import time
from collections.abc import Callable, Hashable
from functools import update_wrapper
from typing import Generic, TypeVar

T = TypeVar("T")


class TtlCache(Generic[T]):
    """Calls `function` at most once every `seconds` for each value of `key`."""

    def __init__(self, function: Callable[[], T], seconds: float, key: Callable[[], Hashable]):
        self.function = function
        self.seconds = seconds
        self.key = key
        self._results: dict[Hashable, tuple[float, T]] = {}
        """Time of the call and its result, by key."""
        update_wrapper(self, function)

    def __call__(self) -> T:
        key = self.key()
        now = time.monotonic()
        if key not in self._results or now - self._results[key][0] > self.seconds:
            self._results[key] = (now, self.function())
        return self._results[key][1]

    def forget(self) -> None:
        """Makes the next call compute the result."""
        self._results.clear()


def ttl_cached(
    seconds: float, key: Callable[[], Hashable] = lambda: None
) -> Callable[[Callable[[], T]], TtlCache[T]]:
    """Returns a decorator that keeps the result of a function for `seconds`.

    Args:
        seconds: How old a result may be.
        key: Returns what the result depends on, such as the runs folder of the person that is
            signed in. Each value has its own result.
    """

    def decorate(function: Callable[[], T]) -> TtlCache[T]:
        return TtlCache(function, seconds, key)

    return decorate
