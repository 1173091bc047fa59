"""The bodies of requests, read strictly: what is not understood is refused, never ignored.

A setting that this server cannot follow (a penalty, tools, log-probabilities) would otherwise give
an answer that is not the one asked for. Values that ask for nothing (a penalty of 0) pass.
Knows nothing of models, keys or sockets.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from filigrane.errors import FiligraneError

Api = Literal["completions", "chat"]
Message = dict[str, str]

_MOST_STOPS: Final = 16
_LONGEST_STOP: Final = 256
_MARK: Final = "filigrane_"
_NESTED: Final = ("vllm_xargs", "extra_body")
"""Where clients made for vLLM put the filigrane_ fields."""

_NEUTRAL: Final[Mapping[str, tuple[object, ...]]] = {
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "top_logprobs": (None, 0),
    "prompt_logprobs": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "suffix": (None, ""),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "parallel_tool_calls": (None, False, True),
    "functions": (None, []),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
    "use_beam_search": (None, False),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "length_penalty": (None, 1),
    "skip_special_tokens": (None, True),
}
"""Known settings that are not followed, with the values that ask for nothing."""
_WITHOUT_EFFECT: Final = ("user", "metadata", "store", "service_tier", "safety_identifier")
"""Fields that change nothing in an answer."""
_COMMON: Final = (
    *("model", "max_tokens", "temperature", "top_p", "top_k", "n", "stop", "seed", "stream"),
    *("stream_options", "return_token_ids", "ignore_eos"),
)


class BadRequest(FiligraneError, ValueError):
    """A body that cannot be answered. param: the field; code: why; status: of HTTP."""

    def __init__(
        self, message: str, *, param: str | None = None, code: str = "malformed", status: int = 400
    ) -> None:
        super().__init__(message)
        self.param, self.code, self.status = param, code, status


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What a request asks for.

    prompts: of completions, texts or token ids; messages: of chats; max_tokens: None if it does not
    say; arguments: its filigrane_ fields.
    """

    api: Api
    model: str
    prompts: tuple[str | tuple[int, ...], ...] = ()
    messages: tuple[Message, ...] = ()
    max_tokens: int | None
    temperature: float
    top_p: float
    top_k: int
    n: int
    stop: tuple[str, ...]
    seed: int | None
    stream: bool
    usage_in_stream: bool
    return_token_ids: bool
    ignore_eos: bool
    arguments: Mapping[str, object]


def parse(body: bytes, api: Api) -> Wanted:
    """Read a body. Raises BadRequest, naming the field."""
    try:
        content = json.loads(body, parse_constant=_no_constant)
        # Lone surrogates are legal in JSON; neither tokenizers nor answers can take them.
        json.dumps(content, ensure_ascii=False).encode()
    # Nesting that is too deep ends in a RecursionError.
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the body is not JSON: {_short(str(error))}.") from None
    if not isinstance(content, dict):
        raise BadRequest("the body is not a JSON object.")
    content, arguments = _arguments(content)
    own = ("prompt",) if api == "completions" else ("messages", "max_completion_tokens")
    _refuse_unknown(content, own)
    model = content.get("model")
    if not isinstance(model, str) or not model:
        raise BadRequest("model is missing: name one of GET /v1/models.", param="model")
    return Wanted(
        api=api,
        model=model,
        prompts=_prompts(content) if api == "completions" else (),
        messages=_messages(content) if api == "chat" else (),
        max_tokens=_max_tokens(content),
        temperature=_number(content, "temperature", 1.0, 0.0, 1e6),
        top_p=_number(content, "top_p", 1.0, 0.0, 1.0, above=True),
        top_k=_integer(content, "top_k", 0, -1, 2**31) or 0,
        n=_integer(content, "n", 1, 1, 1024) or 1,
        stop=_stop(content),
        seed=_integer(content, "seed", None, -(2**63), 2**63 - 1),
        stream=_boolean(content, "stream"),
        usage_in_stream=_usage(content),
        return_token_ids=_boolean(content, "return_token_ids"),
        ignore_eos=_boolean(content, "ignore_eos"),
        arguments=arguments,
    )


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."


def _arguments(content: dict[str, Any]) -> tuple[dict[str, Any], dict[str, object]]:
    """The body without its filigrane_ fields, and these, wherever they were."""
    rest = {name: value for name, value in content.items() if not name.startswith(_MARK)}
    found: dict[str, object] = {n: v for n, v in content.items() if n.startswith(_MARK)}
    extra = rest.pop("extra_body", None)
    places = {"extra_body": extra, "vllm_xargs": rest.pop("vllm_xargs", None)}
    if isinstance(extra, dict) and "vllm_xargs" in extra:
        places["extra_body"] = {n: v for n, v in extra.items() if n != "vllm_xargs"}
        places["vllm_xargs of extra_body"] = extra["vllm_xargs"]
    for place, fields in places.items():
        if fields is None:
            continue
        if not isinstance(fields, dict):
            raise BadRequest(f"{place} is an object.", param=place.split()[0])
        for name, value in fields.items():
            if not name.startswith(_MARK):
                raise BadRequest(
                    f"{place} holds {_short(repr(name))}; only filigrane_ fields are read there.",
                    param=place.split()[0],
                )
            if name in found and found[name] != value:
                raise BadRequest(f"{_short(name)} is given twice.", param=_short(name))
            found[name] = value
    # A field that is null is one that was left out, as everywhere in these bodies.
    return rest, {name: value for name, value in found.items() if value is not None}


def _refuse_unknown(content: Mapping[str, Any], own: tuple[str, ...]) -> None:
    for name, value in content.items():
        if name in _NEUTRAL:
            # 0 == False, but `logprobs: 0` asks for something and `logprobs: false` does not.
            if not any(
                value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
                for neutral in _NEUTRAL[name]
            ):
                raise BadRequest(f"{name} is not supported here; leave it out.", param=name)
        elif name not in (*_COMMON, *own, *_WITHOUT_EFFECT):
            known = ", ".join(sorted((*_COMMON, *own)))
            raise BadRequest(
                f"unknown field {_short(repr(name))}; this server reads {known}.",
                param=_short(name),
            )


def _boolean(content: Mapping[str, Any], name: str) -> bool:
    value = content.get(name)
    if value is not None and not isinstance(value, bool):
        raise BadRequest(f"{name} is true or false.", param=name)
    return bool(value)


def _number(
    content: Mapping[str, Any],
    name: str,
    default: float,
    low: float,
    high: float,
    *,
    above: bool = False,
) -> float:
    value = content.get(name)
    if value is None:
        return default
    good = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN fails every comparison.
    if not good or not low <= value <= high or (above and value == low):
        raise BadRequest(
            f"{name} is a number {'above' if above else 'from'} {low:g} to {high:g}.", param=name
        )
    return float(value)


def _integer(
    content: Mapping[str, Any], name: str, default: int | None, low: int, high: int
) -> int | None:
    value = content.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise BadRequest(f"{name} is an integer from {low} to {high}.", param=name)
    return value


def _max_tokens(content: Mapping[str, Any]) -> int | None:
    names = ("max_tokens", "max_completion_tokens")
    values = {_integer(content, name, None, 1, 2**31) for name in names} - {None}
    if len(values) > 1:
        raise BadRequest(
            "max_tokens and max_completion_tokens say different things.", param="max_tokens"
        )
    return next(iter(values), None)


def _stop(content: Mapping[str, Any]) -> tuple[str, ...]:
    value = content.get("stop")
    if value is None:
        return ()
    texts = [value] if isinstance(value, str) else value
    if (
        not isinstance(texts, list)
        or len(texts) > _MOST_STOPS
        or not all(isinstance(text, str) and 0 < len(text) <= _LONGEST_STOP for text in texts)
    ):
        raise BadRequest(
            f"stop is a text or at most {_MOST_STOPS} texts, none empty or above {_LONGEST_STOP} "
            "characters.",
            param="stop",
        )
    return tuple(texts)


def _usage(content: Mapping[str, Any]) -> bool:
    options = content.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise BadRequest('stream_options is {"include_usage": true}.', param="stream_options")
    if not content.get("stream"):
        raise BadRequest("stream_options goes with stream: true.", param="stream_options")
    return _boolean(options, "include_usage")


def _prompts(content: Mapping[str, Any]) -> tuple[str | tuple[int, ...], ...]:
    prompt = content.get("prompt")
    rows = prompt if isinstance(prompt, list) and not _all(prompt, _is_id) else [prompt]
    if not rows or not all(isinstance(row, str) or _all(row, _is_id) for row in rows):
        raise BadRequest(
            "prompt is a text, a list of token ids, or a list of such.", param="prompt"
        )
    if not all(rows):
        raise BadRequest("prompt is empty.", param="prompt")
    return tuple(row if isinstance(row, str) else tuple(row or ()) for row in rows)


def _all(value: object, test: Callable[[object], bool]) -> bool:
    return isinstance(value, list) and bool(value) and all(map(test, value))


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def _messages(content: Mapping[str, Any]) -> tuple[Message, ...]:
    messages = content.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages is a list of at least one message.", param="messages")
    return tuple(_message(message, number) for number, message in enumerate(messages))


def _message(message: object, number: int) -> Message:
    where = f"messages[{number}]"
    if not isinstance(message, dict) or set(message) - {"role", "content", "name"}:
        raise BadRequest(f"{where} has a role and a content.", param="messages")
    role, content = message.get("role"), message.get("content")
    if role not in ("system", "developer", "user", "assistant"):
        raise BadRequest(
            f"the role of {where} is system, developer, user or assistant.", param="messages"
        )
    if isinstance(content, list):
        if not all(
            isinstance(part, dict)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
            for part in content
        ):
            raise BadRequest(f"{where} holds what is not text.", param="messages")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise BadRequest(f"the content of {where} is a text.", param="messages")
    # Templates know the older name.
    return {"role": "system" if role == "developer" else role, "content": content}
