"""What is asked of a model and what it answers, in the JSON of OpenAI-compatible servers.

Knows nothing of connections: it takes what came back, and says if that cannot be used.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from filigrane.errors import EndpointError


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """How answers are drawn. seed None leaves it to the endpoint; top_logprobs 0 asks for none."""

    max_tokens: int
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int | None = None
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.top_logprobs < 0:
            raise EndpointError("max_tokens has to be 1 or more, top_logprobs 0 or more.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise EndpointError(f"temperature {self.temperature} makes no sense; pass 0 or more.")
        if not 0 < self.top_p <= 1:
            raise EndpointError(f"top_p {self.top_p} makes no sense; it lies in (0, 1].")

    def as_json(self) -> dict[str, object]:
        """What is kept with an answer."""
        return {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "seed": self.seed,
        }


Alternatives = list[tuple[int | str, float]]
"""Tokens (ids, or strings where the endpoint gives no ids) and log-probabilities, falling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a model wrote. prompt_tokens, tokens: ids, if the endpoint gave them; output_tokens: how
    many it counts, None if it does not say; top_logprobs: per generated token, if asked for.
    """

    text: str
    finish_reason: str
    model: str
    prompt_tokens: list[int] | None = None
    tokens: list[int] | None = None
    output_tokens: int | None = None
    top_logprobs: list[Alternatives] | None = None


class Unusable(Exception):
    """An answer lacks what was asked for. tries: how often it is worth asking in all."""

    def __init__(self, message: str, tries: int | None = None) -> None:
        super().__init__(message)
        self.tries = tries


# ---------------------------------------------------------------- reading answers


def output_tokens(found: Mapping[str, Any]) -> int | None:
    """How many tokens the endpoint says it wrote."""
    usage = found.get("usage")
    counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return counted if type(counted) is int and counted >= 0 else None


def _model_of(found: Mapping[str, Any], asked: str) -> str:
    name = found.get("model")
    return name if isinstance(name, str) and name else asked


def choice_of(found: Mapping[str, Any]) -> dict[str, Any]:
    """The first choice of an answer. Raises Unusable, with the server's words, if there is none."""
    choices = found.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        words = their_words(json.dumps(found).encode()) if "error" in found else ""
        raise Unusable(f"the answer holds no choices{f': {words}' if words else ''}")
    first: dict[str, Any] = choices[0]
    return first


def ids_of(value: object) -> list[int] | None:
    """A list of token ids, or None for anything else."""
    if isinstance(value, list) and all(type(item) is int and item >= 0 for item in value):
        return value
    return None


def read_answer(found: dict[str, Any], asked: str) -> Answer:
    """The answer to a prompt. Raises Unusable for one that was cut, is empty, or is none."""
    choice = choice_of(found)
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    reason = choice.get("finish_reason")
    if not isinstance(reason, str) or not reason:
        raise Unusable("the answer was cut: it does not say why it ended (finish_reason)")
    tokens = ids_of(choice.get("token_ids"))
    if not isinstance(text, str) or not text:
        # Drawn once more: a model may begin with its end, but seldom twice.
        raise Unusable(f"the answer is empty (finish_reason {reason[:40]})", tries=2)
    counted = output_tokens(found)
    if counted is None and tokens is not None:
        counted = len(tokens)
    prompt = found.get("prompt_token_ids") or choice.get("prompt_token_ids")
    return Answer(
        text=text,
        finish_reason=reason,
        model=_model_of(found, asked),
        prompt_tokens=ids_of(prompt),
        tokens=tokens or None,
        output_tokens=counted,
        top_logprobs=_top_logprobs(choice.get("logprobs")),
    )


def _top_logprobs(given: object) -> list[Alternatives] | None:
    """Alternatives of every generated token, from either API's form; None if there are none."""
    if not isinstance(given, dict):
        return None
    if isinstance(rows := given.get("content"), list):
        return [
            _falling((item["token"], item["logprob"]) for item in row.get("top_logprobs") or ())
            for row in rows
        ]
    if isinstance(rows := given.get("top_logprobs"), list):
        return [_falling((row or {}).items()) for row in rows]
    return None


def _falling(pairs: Any) -> Alternatives:
    found = [(token_of(name), float(value)) for name, value in pairs]
    return sorted(found, key=lambda pair: -pair[1])


def token_of(name: str) -> int | str:
    """A token as an id where a server that was asked to names it as one ("token_id:17")."""
    head, _, number = name.partition(":")
    return int(number) if head == "token_id" and number.isdigit() else name


def their_words(content: bytes) -> str:
    """What a server says went wrong, in the forms that are about."""
    text = content[:4096].decode("utf-8", "replace")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return "" if text.lstrip().startswith("<") else text
    for name in ("error", "detail", "message"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found if isinstance(found, str) else json.dumps(found)
