"""Token ids to text, a few at a time: whole characters only, and an end at a stop string.

Knows nothing of marks, models or sockets.
"""

from collections.abc import Sequence
from typing import Any, Final

_INCOMPLETE: Final = "\N{REPLACEMENT CHARACTER}"


class Decoder:
    """One growing text.

    tokenizer: of transformers. stop: texts none of which may appear; the text ends before the first
    one that does. What might be the beginning of one, and what is not yet a whole character, is
    kept back until it is known.
    """

    __slots__ = ("_begin", "_ids", "_read", "_sent", "_stop", "_tokenizer", "stopped", "text")

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        # Tokens from _begin to _read are decoded again with what follows: how a token is written
        # depends on those before it.
        self._begin = self._read = 0
        self._sent = 0
        self.text = ""
        self.stopped = False

    def push(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """Append tokens and return what can be shown beyond what was returned before.

        last: nothing will follow, so nothing is kept back.
        """
        if self.stopped:
            return ""
        self._ids += tokens
        known = self._decode(self._begin, self._read)
        whole = self._decode(self._begin, len(self._ids))
        if last or not whole.endswith(_INCOMPLETE):
            before = len(self.text)
            self.text += whole[len(known) :]
            self._begin, self._read = self._read, len(self._ids)
            self._look_for_stop(before)
        end = len(self.text) if last or self.stopped else len(self.text) - self._doubtful()
        new = self.text[self._sent : end]
        self._sent = max(self._sent, end)
        return new

    def _decode(self, start: int, end: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[start:end], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return text

    def _look_for_stop(self, before: int) -> None:
        found = [
            place
            for stop in self._stop
            if (place := self.text.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        if found:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _doubtful(self) -> int:
        """How many characters at the end may be the beginning of a stop text."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, len(self.text)), 0, -1):
            tail = self.text[-size:]
            if any(stop.startswith(tail) for stop in self._stop):
                return size
        return 0
