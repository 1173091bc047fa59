"""What every reader of a foreign mark is: a tool's PRF, contexts, deduplication and parameters.

A `Profile` holds parameters only. Its `read` takes token ids and numbers and returns a
`ForeignResult` with a p-value of ours, exact over the positions that the tool's own rules score,
beside what the tool itself would report. Nothing here imports the tool: profiles are checked
against recorded values of it (vectors/foreign).

No mark read here is cryptographic: keys have 64 bits or fewer, and the PRFs are hashes or linear
congruences that were never meant to resist. A small p-value says that the text agrees with the key
far better than chance; it does not say who wrote it.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, ClassVar, Final, NoReturn

import numpy as np
import numpy.typing as npt

from filigrane.contexts import TokenIds, as_token_ids
from filigrane.embedding import Sampling
from filigrane.errors import FiligraneError, KeyFormatError, LogitsError, TokenError
from filigrane.foreign.keys import ForeignKey, KeyForm
from filigrane.schemes.base import check_integer

__all__ = ["ASSURANCE", "ForeignResult", "Profile", "Writable", "Written"]

ASSURANCE: Final = "detects honest use; does not prove origin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """One text to read.

    tokens: (n,) int64 ids, what the model wrote, without its prompt; prompt: (m,) int64 ids of the
    prompt if known (contexts of some profiles reach into it), or None. Both may be given as any
    sequence of ids. Raises TokenError for anything else.
    """

    tokens: TokenIds
    prompt: TokenIds | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", as_token_ids(self.tokens))
        if self.prompt is not None:
            object.__setattr__(self, "prompt", as_token_ids(self.prompt))


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignResult:
    """What a reading found. It has no truth value: compare `log_pvalue` with your own alpha.

    log_pvalue: natural log, ours, exact over the scored positions unless `method` says otherwise;
    statistic: the profile's score; n_scored, n_tokens: positions scored, tokens given (without
    prompts); dropped: how many positions each rule left out; compat: what the tool itself would
    report for these positions, rounded and clipped as it does, never to be ranked by; warnings:
    what may make this reading weaker or void; profile: tag; key: public name; method: how the
    p-value was computed; assurance: the same sentence in every result.
    """

    log_pvalue: float
    statistic: float
    n_scored: int
    n_tokens: int
    dropped: Mapping[str, int] = field(default_factory=dict)
    compat: Mapping[str, float] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    profile: str
    key: str
    method: str
    assurance: str = ASSURANCE

    def __post_init__(self) -> None:
        for name in ("dropped", "compat"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    @property
    def pvalue(self) -> float:
        """exp(log_pvalue); underflows to 0.0 below about 1e-308, log_pvalue does not."""
        return math.exp(self.log_pvalue)

    @property
    def log10_pvalue(self) -> float:
        """log_pvalue in decimal digits."""
        return self.log_pvalue / math.log(10)

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "a ForeignResult is not true or false; compare result.log_pvalue with math.log(alpha)."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile(ABC):
    """A tool with its PRF, context rule, deduplication rule and parameters; no keys, no state."""

    name: ClassVar[str]
    tool: ClassVar[str]
    """Whose marks these are, with versions: 'vLLM 0.30 to 0.33 (PRF philox4x32-10-v1)'."""
    reference: ClassVar[str]
    key_form: ClassVar[KeyForm]
    key_count: ClassVar[int] = 1
    """How many numbers `ForeignKey.derive` makes."""
    key_bits: ClassVar[int] = 64
    """How many bits each of them gets: what the tool accepts and uses."""
    needs_vocab: ClassVar[bool] = False
    """Whether there is a required field vocab_size: the width of the model's logits."""

    @property
    def tag(self) -> str:
        """Text form that `foreign.from_tag` reads back: 'vllm-gumbel:context_width=4'."""
        values = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        written = ",".join(f"{name}={_written(value)}" for name, value in values)
        return f"{self.name}:{written}" if written else self.name

    def read(self, texts: Sequence[Written] | Written, key: ForeignKey) -> ForeignResult:
        """Test one text, or several as one claim: a window counts once over all of them.

        Nothing to score is no error: such a result has p = 1. Raises KeyFormatError for a key of
        another form, TokenError for anything but Written texts, VocabularyMismatch for ids outside
        vocab_size.
        """
        claim = (texts,) if isinstance(texts, Written) else tuple(texts)
        for text in claim:
            if not isinstance(text, Written):
                raise TokenError(
                    f"pass Written(tokens=ids), or a list of them, not {type(text).__name__}."
                )
            if self.needs_vocab:
                as_token_ids(text.tokens, self.vocabulary)
                if text.prompt is not None:
                    as_token_ids(text.prompt, self.vocabulary)
        self.require_key(key)
        return self._read(claim, key)

    @abstractmethod
    def _read(self, texts: tuple[Written, ...], key: ForeignKey) -> ForeignResult:
        """`read` after its checks."""

    def default_warnings(self, key: ForeignKey) -> tuple[str, ...]:
        """What every reading with this key should say (public keys, weak parameters)."""
        return ()

    @property
    def vocabulary(self) -> int:
        """The field vocab_size. Raises FiligraneError if the profile has none."""
        size = getattr(self, "vocab_size", None)
        if size is None:
            raise FiligraneError(f"{self.name} needs no vocabulary size.")
        return int(size)

    def require_key(self, key: ForeignKey) -> None:
        """Raise KeyFormatError unless this is a key of the profile's form."""
        if not isinstance(key, ForeignKey):
            raise KeyFormatError(
                f"{self.name} takes a ForeignKey, not {type(key).__name__}; read the tool's key "
                f"with ForeignKey.load(path, KeyForm.{self.key_form.name}), or derive one with "
                "ForeignKey.derive(key, profile)."
            )
        if key.form is not self.key_form:
            raise KeyFormatError(
                f"{self.name} takes keys of form {self.key_form.value}, and {key.name} was read as "
                f"{key.form.value}; read it with KeyForm.{self.key_form.name}."
            )

    def require_width(self, logits: npt.NDArray[np.float32]) -> None:
        """Raise LogitsError unless these are logits (V,) of the profile's vocabulary."""
        if logits.shape != (self.vocabulary,):
            raise LogitsError(
                f"{self.name}: logits have shape {logits.shape} and vocab_size is "
                f"{self.vocabulary}; vocab_size must be the width of the logits."
            )

    def result(
        self,
        texts: Sequence[Written],
        key: ForeignKey,
        *,
        log_pvalue: float,
        statistic: float,
        n_scored: int,
        dropped: Mapping[str, int],
        compat: Mapping[str, float],
        method: str,
        warnings: Sequence[str] = (),
    ) -> ForeignResult:
        """A ForeignResult with what is the same in every reading filled in."""
        return ForeignResult(
            log_pvalue=log_pvalue,
            statistic=statistic,
            n_scored=n_scored,
            n_tokens=sum(text.tokens.shape[0] for text in texts),
            dropped=dropped,
            compat=compat,
            warnings=(*self.default_warnings(key), *warnings),
            profile=self.tag,
            key=key.name,
            method=method,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Writable(Profile):
    """A profile that can also write, for round trips and for tests of other readers."""

    def start(self) -> Any:
        """What the writer of one text has to remember between positions; nothing by default."""
        return None

    @abstractmethod
    def choose(
        self,
        logits: npt.NDArray[np.float32],
        prompt: TokenIds,
        output: Sequence[int],
        key: ForeignKey,
        *,
        state: Any,
        rng: np.random.Generator,
        sampling: Sampling,
    ) -> int:
        """The next token of one text.

        logits: (V,) float32, raw, before temperature and truncation; prompt: its ids; output: what
        was written so far; state: what `start` returned, changed in place; rng: private randomness
        for what the key does not decide; sampling: temperature and truncation.
        """


def check_vocab(profile: str, value: object) -> None:
    """Raise SchemeError unless value can be the width of a model's logits."""
    check_integer(profile, "vocab_size", value, 2, 2**32 - 2)


def _written(value: object) -> str:
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
