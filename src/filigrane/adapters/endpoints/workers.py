"""A few threads that wait for somebody else's machine; knows nothing of what they ask for.

They are daemons: an interruption leaves at once, however long an answer may still take.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Workers(Generic[T, R]):
    """Calls `ask` on what is put in, at most `count` at a time, and hands over what comes back.

    All methods are for one thread, which thereby does everything that is not waiting.
    """

    def __init__(self, ask: Callable[[T], R], count: int) -> None:
        self._ask = ask
        self._todo: queue.SimpleQueue[tuple[T] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[T, R | BaseException]] = queue.SimpleQueue()
        self.busy = 0
        self.count = count
        for _ in range(count):
            threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while (item := self._todo.get()) is not None:
            try:
                result: R | BaseException = self._ask(item[0])
            # Whatever it is belongs to the thread that asked; here it would only be printed.
            except BaseException as error:
                result = error
            self._done.put((item[0], result))

    @property
    def free(self) -> bool:
        """Whether another item would be begun at once."""
        return self.busy < self.count

    def put(self, item: T) -> None:
        """Have something done."""
        self.busy += 1
        self._todo.put((item,))

    def get(self) -> tuple[T, R | BaseException]:
        """Wait for the next result, in the order of completion: what was put in, and its result."""
        done = self._done.get()
        self.busy -= 1
        return done

    def __enter__(self) -> "Workers[T, R]":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for _ in range(self.count):
            self._todo.put(None)


def in_order(ask: Callable[[T], R], items: Iterable[T], count: int) -> Iterator[R]:
    """Results of `ask` in the order of `items`, with `count` of them under way at a time.

    An error is raised in its turn, after all results that come before it.
    """

    def numbered(item: tuple[int, T]) -> R:
        return ask(item[1])

    ahead = enumerate(items)
    ready: dict[int, R | BaseException] = {}
    turn = 0
    with Workers(numbered, count) as workers:
        exhausted = False
        while True:
            # Not further ahead than that: a slow first result must not fill the memory.
            while not exhausted and workers.free and len(ready) < 2 * count:
                item = next(ahead, None)
                if item is None:
                    exhausted = True
                else:
                    workers.put(item)
            while turn in ready:
                result = ready.pop(turn)
                if isinstance(result, BaseException):
                    raise result
                turn += 1
                yield result
            if workers.busy:
                (number, _), result = workers.get()
                ready[number] = result
            elif exhausted:
                return
