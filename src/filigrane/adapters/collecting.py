"""Collecting what a suspect answers: prompts in, JSON Lines out, nothing lost on the way.

Knows nothing of marks and scores nothing: answers are on disk before anybody looks at them. A file
holds the answers of one model under one set of settings; whatever stops a run (a full disk, the
power, an impatient hand), the same call continues it.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final

from filigrane.adapters.answer_files import Answers, Settings
from filigrane.adapters.endpoints import (
    Answer,
    Endpoint,
    Parameters,
    Stopped,
    Unanswered,
)
from filigrane.adapters.endpoints.workers import Workers
from filigrane.errors import EndpointError, RecordError

Report = Callable[[int, int | None, str], None]
"""Takes what is done, what there is to do (None if unknown) and a few words."""

_FAILURES: Final = 8  # prompts in a row without an answer, after which the endpoint is to blame


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What to ask. number: its place among all prompts, which chooses its seed."""

    id: str
    text: str
    system: str | None = None
    number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A prompt without an answer, and why."""

    id: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Collected:
    """How a run ended.

    written: answers of this run; skipped: prompts that were answered before; failures: prompts that
    the endpoint did not answer; left: prompts that were not asked, because the budget was spent;
    cut: answers that ended at max_tokens; without_tokens: answers for which the endpoint gave no
    token ids; requests, output_tokens: spent.
    """

    written: int
    skipped: int
    failures: tuple[Failure, ...]
    left: int
    cut: int
    without_tokens: int
    requests: int
    output_tokens: int
    model: str | None

    @property
    def complete(self) -> bool:
        """Whether every prompt has an answer now."""
        return not self.failures and not self.left


def collect(
    endpoint: Endpoint,
    prompts: Sequence[Prompt],
    path: str | os.PathLike[str],
    parameters: Parameters,
    *,
    concurrency: int = 4,
    report: Report | None = None,
    notice: Callable[[str], None] | None = None,
) -> Collected:
    """Ask every prompt that `path` holds no answer to, and append the answers as they come.

    endpoint: carries retries, pace and budget; parameters.seed: that of the first prompt, prompt
    number n gets seed + n, so that equal prompts get different answers; report: progress; notice:
    takes a sentence about what happened on the way.

    Raises EndpointError if the endpoint is down, refuses, or becomes another model, RecordError if
    the file holds something else, OSError if it cannot be written. In every case, and at an
    interruption, what was written before stays and the same call goes on from there.
    """
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1; got {concurrency}.")
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise RecordError("two prompts have the same id; give each its own.")
    settings = Settings(
        endpoint=endpoint.url, model=endpoint.model, api=endpoint.api, parameters=parameters
    )
    with Answers(path, settings) as answers:
        if answers.dropped and notice is not None:
            notice(
                f"{answers.path}: moved the unfinished last line of an earlier run to "
                f"{answers.path.name}.part; its prompt is asked again"
            )
        todo = [prompt for prompt in prompts if not _answered(answers, prompt)]
        if answers.model is not None:
            endpoint.expect(answers.model)
        run = _Run(endpoint, answers, parameters, len(prompts), report)
        return run.go(todo, concurrency)


def _answered(answers: Answers, prompt: Prompt) -> bool:
    if prompt.id not in answers.done:
        return False
    if answers.done[prompt.id] != (prompt.text, prompt.system):
        raise RecordError(
            f"{answers.path} holds an answer to {prompt.id!r} that was another prompt (or system "
            "prompt) then; give changed prompts new ids, or choose another file."
        )
    return True


class _Run:
    """One run of `collect`, and what it counts."""

    def __init__(
        self,
        endpoint: Endpoint,
        answers: Answers,
        parameters: Parameters,
        total: int,
        report: Report | None,
    ) -> None:
        self._endpoint, self._answers, self._parameters = endpoint, answers, parameters
        self._total, self._report = total, report
        self._written = self._cut = self._without_tokens = self._in_a_row = 0
        self._failures: list[Failure] = []
        self._stop: EndpointError | None = None

    def _own(self, prompt: Prompt) -> Parameters:
        seed = self._parameters.seed
        return replace(self._parameters, seed=None if seed is None else seed + prompt.number)

    def _ask(self, prompt: Prompt) -> Answer:
        return self._endpoint.ask(prompt.text, prompt.system, self._own(prompt))

    def go(self, todo: Sequence[Prompt], concurrency: int) -> Collected:
        skipped = self._total - len(todo)
        waiting = list(reversed(todo))
        left = 0
        self._tell(skipped)
        with Workers(self._ask, min(concurrency, max(1, len(todo)))) as workers:
            while True:
                while waiting and workers.free and self._may_ask(workers):
                    workers.put(waiting.pop())
                if not workers.busy:
                    break
                prompt, result = workers.get()
                if isinstance(result, Stopped):
                    left += 1
                else:
                    self._settle(prompt, result)
                self._tell(skipped)
        if self._stop is not None:
            raise self._stop
        return Collected(
            written=self._written,
            skipped=skipped,
            failures=tuple(self._failures),
            left=left + len(waiting),
            cut=self._cut,
            without_tokens=self._without_tokens,
            requests=self._endpoint.budget.requests,
            output_tokens=self._endpoint.budget.output_tokens,
            model=self._answers.model,
        )

    def _may_ask(self, workers: "Workers[Prompt, Answer]") -> bool:
        """Whether to begin another one. What is under way may still give back tokens."""
        if self._stop is not None:
            return False
        # The first answer shows whether anything works at all, before many requests are wrong.
        if workers.busy and not self._written and not self._answers.done:
            return False
        return self._endpoint.budget.has_room(self._parameters.max_tokens)

    def _settle(self, prompt: Prompt, result: Answer | BaseException) -> None:
        if isinstance(result, Answer):
            self._answers.add(self._record(prompt, result))
            self._answers.model = result.model
            self._written += 1
            self._cut += result.finish_reason == "length"
            self._without_tokens += result.tokens is None
            self._in_a_row = 0
        elif isinstance(result, Unanswered):
            self._failures.append(Failure(id=prompt.id, message=str(result)))
            self._in_a_row += 1
            if self._stop is None and self._in_a_row >= _FAILURES:
                self._give_up(
                    EndpointError(f"{self._in_a_row} prompts in a row got no answer: {result}")
                )
        elif isinstance(result, EndpointError):
            # What is under way was asked before, and may be paid for: it is waited for, and kept.
            self._give_up(result)
        else:
            raise result

    def _give_up(self, error: EndpointError) -> None:
        self._stop = self._stop or error
        self._endpoint.stop()

    def _tell(self, skipped: int) -> None:
        if self._report is not None:
            done = skipped + self._written + len(self._failures)
            self._report(done, self._total, "asking")

    def _record(self, prompt: Prompt, answer: Answer) -> dict[str, Any]:
        record: dict[str, Any] = {
            "id": prompt.id,
            "prompt": prompt.text,
            "system": prompt.system,
            "answer": answer.text,
            "prompt_tokens": answer.prompt_tokens,
            "tokens": answer.tokens,
            "finish_reason": answer.finish_reason,
            "model": answer.model,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "endpoint": self._endpoint.url,
            "parameters": self._own(prompt).as_json(),
        }
        if self._parameters.top_logprobs:
            record["top_logprobs"] = answer.top_logprobs
        return record
