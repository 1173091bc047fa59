"""The worker that detects in the background: it takes chunks of jobs, detects, and writes results.

One thread for each process of the service. A chunk is leased: whoever dies with one loses nothing,
since another worker takes it when the lease has run out. While the key management system or the
database does not answer, chunks go back undone: nothing that was not tested gets a result that
could be read as "no mark". An item that cannot be tested gets a problem instead of a verdict.
"""

import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from filigrane.errors import FiligraneError, KmsError, StoreError
from filigrane.service import problems, telemetry
from filigrane.service.answers import Content, expert_answer
from filigrane.service.detecting import Query
from filigrane.service.problems import Problem
from filigrane.service.upkeep import Upkeep

if TYPE_CHECKING:
    from filigrane.service.office import Office
    from filigrane.store.records import Chunk

__all__ = ["Item", "Options", "Waiting", "Worker", "read_items", "results_of"]

_IDLE_S: Final = 1.0
_BACK_OFF_S: Final = 2.0
_STOP_S: Final = 10.0
_REMIND_S: Final = 1.0
_REMIND_MOST_S: Final = 60.0
_GIVEN_UP: Final = "given up"


class Item(Content):
    """One text of a job, as text or as token ids. id: the caller's own name for it."""

    id: str | None = Field(None, max_length=128)


class Options(BaseModel):
    """How all texts of a job are tested: under the keys of a model, or one key; at which alpha."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    key: str | None = None
    tokenizer: str | None = None
    alpha: float = 1e-6


_ITEMS: Final = TypeAdapter(list[Item])


def read_items(body: bytes, *, lines: bool, most: int, longest: int) -> list[Item]:
    """The items of a body: a JSON list, or (lines) one JSON object a line.

    most: items; longest: tokens of one text, or four times as many characters. Raises Problem,
    which names the line or the item, counted from 1 and from 0.
    """
    items: list[Item] = []
    places: list[str] = []
    number = None
    try:
        if lines:
            for number, line in enumerate(body.splitlines(), 1):
                if line.strip():
                    items.append(Item.model_validate_json(line))
                    places.append(f"line {number}")
        else:
            items = _ITEMS.validate_json(body)
            places = [f"item {index}" for index in range(len(items))]
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)
        names = frozenset(Item.model_fields)
        raise problems.validation_problem(found, names, line=number) from None
    if not 1 <= len(items) <= most:
        raise Problem(422, "items", f"A job has 1 to {most} items; split it.")
    for item, place in zip(items, places, strict=True):
        if len(item.tokens or ()) > longest or len(item.text or "") > 4 * longest:
            raise Problem(
                422,
                "too_long",
                f"The text of {place} is too long; one has at most {longest} tokens, or four "
                "times the letters.",
            )
    return items


class Waiting:
    """Says that jobs wait: at once, then after 1, 2, 4 ... 60 seconds, and at last that they go on.

    timer: seconds, of any origin; it never goes back.
    """

    def __init__(self, *, timer: Callable[[], float] = time.monotonic) -> None:
        self._timer = timer
        self._error: str | None = None
        self._count, self._pause, self._next = 0, 0.0, 0.0

    def for_(self, error: FiligraneError) -> None:
        """They cannot go on. Another class of error is said at once."""
        now, name = self._timer(), type(error).__name__
        if name != self._error:
            self._error, self._count, self._pause, self._next = name, 0, _REMIND_S, now
        self._count += 1
        if now >= self._next:
            fields = {"error": name, "count": self._count}
            telemetry.event("job_waits", fields, level="warning")
            self._next = now + self._pause
            self._pause = min(2 * self._pause, _REMIND_MOST_S)

    def over(self) -> None:
        """They go on."""
        if self._error is not None:
            telemetry.event("job_goes_on", {"count": self._count})
            self._error = None


class Worker:
    """A thread that works through jobs until it is stopped."""

    def __init__(self, office: "Office") -> None:
        self._office = office
        self._upkeep = Upkeep(office)
        self._waiting = Waiting()
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._stopping = threading.Event()
        self._waking = threading.Event()
        self._thread = threading.Thread(target=self._work, name="filigrane-jobs", daemon=True)
        limits = office.settings.limits
        self._most = limits.job_chunk
        self._chunk = min(4, self._most)
        self._lease_s = limits.job_lease_s

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def wake(self) -> None:
        """Look for work now."""
        self._waking.set()

    def stop(self) -> None:
        """Let the present item end, give back what is left of the chunk, and stop."""
        self._stopping.set()
        self._waking.set()
        if self._thread.ident is not None:
            self._thread.join(_STOP_S)

    def _work(self) -> None:
        while not self._stopping.is_set():
            # Before looking, so that work that comes while looking is not slept over.
            self._waking.clear()
            wait = _IDLE_S
            try:
                self._upkeep.run()
                chunk = self._office.jobs.claim(self._name, self._lease_s, limit=self._chunk)
                if chunk is not None:
                    self._do(chunk)
                    wait = 0.0
                self._waiting.over()
            except (KmsError, StoreError) as error:
                # Whatever was claimed comes back when its lease ends, unless it was given back.
                self._waiting.for_(error)
                wait = _BACK_OFF_S
            except Exception as error:
                # The thread has to outlive a fault of one chunk, which is given up in the end.
                telemetry.failure({}, error)
                wait = _BACK_OFF_S
            if wait:
                self._waking.wait(wait)

    def _do(self, chunk: "Chunk") -> None:
        """Work through a chunk. Raises KmsError or StoreError if something that it needs is
        missing; then it was given back, if that could be done.
        """
        jobs = self._office.jobs
        started = time.monotonic()
        results = []
        options = Options.model_validate_json(chunk.options)
        try:
            for _, content in chunk.items:
                if self._stopping.is_set():
                    jobs.release(chunk)
                    return
                results.append(self._result(chunk.tenant, options, content))
            kept = jobs.finish(chunk, results)
        except (KmsError, StoreError):
            # If that fails too, the lease ends by itself.
            with contextlib.suppress(StoreError):
                jobs.release(chunk)
            raise
        telemetry.JOB_ITEMS.labels("done" if kept else "dropped").inc(len(results))
        # A chunk should take a small part of its lease, or it is lost to the next worker.
        pace = (time.monotonic() - started) / len(results)
        self._chunk = max(1, min(self._most, int(self._lease_s / 8 / max(pace, 1e-6))))

    def _result(self, tenant: str, options: Options, content: bytes) -> bytes:
        item = Item.model_validate_json(content)
        named = {} if item.id is None else {"id": item.id}
        query = Query(
            text=item.text,
            tokens=None if item.tokens is None else np.asarray(item.tokens, dtype=np.int64),
            model=options.model,
            key=options.key,
            tokenizer=options.tokenizer,
            alpha=options.alpha,
        )
        try:
            finding = self._office.detector.detect(tenant, query)
            found: dict[str, Any] = {"answer": expert_answer(finding, None)}
        except (KmsError, StoreError):
            raise
        except (FiligraneError, Problem) as error:
            problem = problems.as_problem(error)
            found = {"problem": problem.code, "detail": problem.detail}
        return json.dumps(named | found, allow_nan=False).encode()


def results_of(
    kept: Iterable[bytes | None], start: int, *, ended: bool
) -> Iterator[dict[str, Any]]:
    """The results of items `start` on as they are shown: index, state, answer or problem.

    ended: whether what has no result is never going to have one, because the job was cancelled.
    """
    for index, content in enumerate(kept, start):
        if content is None:
            yield {"index": index, "state": "cancelled" if ended else "waiting"}
            continue
        found = json.loads(content)
        if found.get("error") == _GIVEN_UP:
            found = {"problem": "given_up", "detail": "This item ended its worker three times."}
        yield {"index": index, "state": "failed" if "problem" in found else "done", **found}
