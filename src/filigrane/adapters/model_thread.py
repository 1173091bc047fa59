"""The thread that runs the model: requests come in, tokens go out, several batches in turn.

What waits when the thread looks becomes one batch; batches take turns, one step each, so that a
short answer does not wait for a long one. Knows nothing of sockets or of what is written.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from filigrane.adapters.writing import Batch, Text
from filigrane.errors import FiligraneError, TokenError
from filigrane.serving.drawing import Drawer
from filigrane.speculative.models import BlockModel

_log: Final = logging.getLogger("filigrane.model")


class Overloaded(FiligraneError, RuntimeError):
    """Too many requests are waiting; come back later."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """The texts of one request, and whom to tell.

    progress: called in the thread after each step; it may end texts, and has to be quick. failure:
    called instead, once, if the texts cannot be written to their end.
    """

    texts: tuple[Text, ...]
    progress: Callable[[], None]
    failure: Callable[[Exception], None]


class ModelThread:
    """Runs one model.

    rows: most texts that are written at a time; batches: most batches that take turns, beyond which
    requests wait and gather; waiting: most texts that may wait.
    """

    def __init__(
        self, lm: BlockModel, *, rows: int = 16, batches: int = 2, waiting: int = 256
    ) -> None:
        self.rows = rows
        self._lm = lm
        self._drawer = Drawer(lm.vocab_size)
        self._most_batches = batches
        self._most_waiting = waiting
        self._queue: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="filigrane-model", daemon=True)

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """Break off what is being written, tell those who wait, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether requests can be taken."""
        return self._thread.is_alive() and not self._closing

    def submit(self, job: Job) -> None:
        """Hand over a request. Raises Overloaded if too many wait, or the thread is ending."""
        with self._changed:
            waiting = sum(len(other.texts) for other in self._queue)
            if self._closing or waiting + len(job.texts) > self._most_waiting:
                raise Overloaded(
                    "this server is being stopped."
                    if self._closing
                    else f"{waiting} texts are waiting already; try again in a few seconds."
                )
            self._queue.append(job)
            self._changed.notify()

    def _run(self) -> None:
        batches: list[tuple[Batch, list[Job]]] = []
        while True:
            with self._changed:
                while not (batches or self._queue or self._closing):
                    self._changed.wait()
                if self._closing:
                    stopped = [job for _, jobs in batches for job in jobs] + list(self._queue)
                    self._queue.clear()
                    break
                taken = self._take([batch for batch, _ in batches])
            if taken:
                texts = [text for job in taken for text in job.texts]
                batches.append((Batch(self._lm, texts, self._drawer), taken))
            batches = [turn for turn in batches if self._step(*turn)]
        for job in stopped:
            self._fail(job, Overloaded("this server is being stopped."))

    def _take(self, batches: Sequence[Batch]) -> list[Job]:
        """Requests that wait and have room, in their order."""
        taken: list[Job] = []
        if len(batches) >= self._most_batches:
            return taken
        room = self.rows - sum(len(batch.running) for batch in batches)
        while self._queue and len(self._queue[0].texts) <= room:
            job = self._queue.popleft()
            if any(text.ended is None for text in job.texts):  # else cancelled while it waited
                taken.append(job)
                room -= len(job.texts)
        return taken

    def _step(self, batch: Batch, jobs: list[Job]) -> bool:
        """One step of a batch; whether there is another."""
        open_jobs = [job for job in jobs if any(text.ended is None for text in job.texts)]
        try:
            batch.step()
        except Exception as error:  # whatever the model raises must not end the thread
            if not isinstance(error, TokenError):
                _log.exception("a step of the model failed")
            for job in open_jobs:
                self._fail(job, error)
            return False
        for job in open_jobs:
            try:
                job.progress()
            except Exception as error:
                _log.exception("an answer could not be made of its tokens")
                self._fail(job, error)
        jobs[:] = open_jobs
        return not batch.done

    @staticmethod
    def _fail(job: Job, error: Exception) -> None:
        for text in job.texts:
            if text.ended is None:
                text.ended = "error"
        job.failure(error)
