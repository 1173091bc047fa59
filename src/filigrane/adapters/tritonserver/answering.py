"""The tensors of requests to the tensors of answers, for any server that speaks in tensors.

A request is a batch of rows, nearly always of one. Each row has a prompt, its own settings and its
own mark. Knows nothing of Triton; names and types are those of `tensors`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from filigrane.adapters.admission import Admitted, admit, identify
from filigrane.adapters.models import LoadedModel, chat_prompt
from filigrane.adapters.transformers import TransformersModel
from filigrane.adapters.tritonserver.tensors import INPUTS
from filigrane.adapters.writing import Order, Text
from filigrane.contexts import TokenIds
from filigrane.errors import TokenError
from filigrane.serving.keyring import Keyring
from filigrane.serving.live import LiveKeyring, current
from filigrane.serving.orders import Mark

Tensors = Mapping[str, npt.NDArray[Any]]

_MAX_TOKENS: Final = 16
"""Of requests that do not say, as in Triton's vLLM backend."""
_ARGUMENTS: Final = tuple(name for name in INPUTS if name.startswith("filigrane_"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Answering:
    """One model and one keyring, or the keyring that a folder holds when a request comes.

    context: most tokens of prompt and answer together; answer: most tokens of an answer.
    """

    model: LoadedModel
    lm: TransformersModel
    keyring: Keyring | LiveKeyring
    context: int
    answer: int

    @classmethod
    def of(
        cls, model: LoadedModel, keyring: Keyring | LiveKeyring, *, answer: int = 4096
    ) -> "Answering":
        """With the model's own limits."""
        lm = TransformersModel(model)
        own = getattr(model.model.config, "max_position_embeddings", None)
        return cls(
            model=model,
            lm=lm,
            keyring=keyring,
            context=own if isinstance(own, int) else 2**31,
            answer=answer,
        )

    def read(self, inputs: Tensors, token: str | None = None) -> list[Text]:
        """The texts that a request asks for, one a row.

        inputs: those that it has, each (rows, values). token: the bearer token that came with it.
        Raises RequestRefused with its reason, TokenError and UnsupportedDecoding for what makes no
        sense.
        """
        keyring = current(self.keyring)
        tenant = identify(keyring, token)
        rows = {tensor.shape[0] for tensor in inputs.values()}
        if len(rows) != 1:
            raise TokenError("the inputs of a request have one row for each of its texts.")
        return [Text(self._order(inputs, row, keyring, tenant)) for row in range(rows.pop())]

    def _order(
        self, inputs: Tensors, row: int, keyring: Keyring | None, tenant: str | None
    ) -> Order:
        def value(name: str, default: Any) -> Any:
            return inputs[name][row].item(0) if name in inputs else default

        prompt = self._prompt(inputs, row, chat=bool(value("chat", False)))
        max_tokens = int(value("max_tokens", _MAX_TOKENS))
        self._check_room(len(prompt), max_tokens)
        admitted: Admitted = admit(
            keyring,
            {name: _plain(value(name, None)) for name in _ARGUMENTS if name in inputs},
            tenant=tenant,
            temperature=float(value("temperature", 1.0)),
            top_k=int(value("top_k", 0)),
            top_p=float(value("top_p", 1.0)),
            max_tokens=max_tokens,
        )
        ends = frozenset() if value("ignore_eos", False) else frozenset(self.lm.stop_ids)
        return Order(
            prompt=prompt,
            max_tokens=max_tokens,
            sampling=admitted.sampling,
            mark=admitted.mark,
            seed=int(value("seed", 0)) if "seed" in inputs else None,
            number=row,
            stop=ends,
        )

    def _prompt(self, inputs: Tensors, row: int, *, chat: bool) -> TokenIds:
        if ("text_input" in inputs) == ("input_ids" in inputs):
            raise TokenError("send a prompt in one of text_input and input_ids.")
        if "input_ids" in inputs:
            if chat:
                raise TokenError("chat goes with text_input; input_ids are taken as they are.")
            prompt = np.asarray(inputs["input_ids"][row], dtype=np.int64).reshape(-1)
        else:
            text = _plain(inputs["text_input"][row].item(0))
            if chat:
                prompt = chat_prompt(self.model, text)
            else:
                prompt = np.asarray(self.model.tokenizer(text)["input_ids"], dtype=np.int64)
        if not len(prompt):
            raise TokenError("the prompt has no token at all.")
        if prompt.min() < 0 or prompt.max() >= self.lm.vocab_size:
            raise TokenError(f"token ids of this model lie in [0, {self.lm.vocab_size - 1}].")
        return prompt

    def _check_room(self, prompt: int, max_tokens: int) -> None:
        if not 1 <= max_tokens <= self.answer:
            raise TokenError(f"max_tokens is from 1 to {self.answer} here, not {max_tokens}.")
        if prompt + max_tokens > self.context:
            raise TokenError(
                f"the prompt has {prompt} tokens and max_tokens is {max_tokens}, together more "
                f"than the model's context length of {self.context}."
            )

    def outputs(self, texts: Sequence[Text]) -> dict[str, npt.NDArray[Any]]:
        """The answer to one request: OUTPUTS, each (rows, values)."""
        longest = max(len(text.tokens) for text in texts)
        ids = np.full((len(texts), longest), -1, dtype=np.int64)
        for row, text in enumerate(texts):
            ids[row, : len(text.tokens)] = text.tokens
        decoded = [
            self.model.tokenizer.decode(text.tokens, skip_special_tokens=True) for text in texts
        ]
        marks = [text.order.mark for text in texts]
        return {
            "text_output": _strings(decoded),
            "output_ids": ids,
            "marked_tokens": np.array([[text.n_marked] for text in texts], dtype=np.int32),
            "key_id": _strings([m.key_id if isinstance(m, Mark) else "" for m in marks]),
            "scheme": _strings([m.scheme.tag if isinstance(m, Mark) else "" for m in marks]),
            "finish_reason": _strings([str(text.ended) for text in texts]),
        }


def _plain(value: Any) -> Any:
    """Strings come as bytes."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise TokenError("a text input is not UTF-8.") from None


def _strings(rows: Sequence[str]) -> npt.NDArray[Any]:
    return np.array([[row.encode("utf-8", "replace")] for row in rows], dtype=np.object_)
