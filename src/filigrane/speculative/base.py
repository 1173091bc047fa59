"""What a method of watermarked speculative sampling is: how drafts are drawn, how they are judged.

A method decides; the loop in `decoding` runs models, keeps histories and asks. Between the two
stand `Position`s: places in the text whose token is to be decided, each with its noise, the draft's
law, the tokens drafted there and, once the target has read them, the target's law.

Noise of a position is keyed where the rule of `contexts` lets it be marked, and private elsewhere.
A method sees no difference and needs none: with private noise every rule here draws from P.
"""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from filigrane.contexts import Corpus
from filigrane.detection import DetectionResult, detect
from filigrane.errors import SchemeError
from filigrane.keys import MarkingKey
from filigrane.prf import Words
from filigrane.schemes.base import Scheme
from filigrane.schemes.gumbel import Gumbel
from filigrane.speculative.laws import Array, Ids, Law, aligned, clocks, draw, index_of, race


class Noise(NamedTuple):
    """The random numbers of a position: blocks (streams, 8) uint32, and whether they are keyed."""

    blocks: Words
    marked: bool


@dataclass(slots=True)
class Position:
    """A place in the text whose token is to be decided.

    q: the draft's law, None where nothing was drafted; tokens: what was drafted, best first; then:
    the positions after those tokens; p: the target's law, once the target has read this far.
    """

    noise: Noise
    q: Law | None = None
    tokens: list[int] = field(default_factory=list)
    then: list["Position"] = field(default_factory=list)
    p: Law | None = None

    @property
    def target(self) -> Law:
        """The target's law; there is one when a method is asked to judge."""
        assert self.p is not None
        return self.p

    def laws(self) -> tuple[Ids, Array, Array, int]:
        """(ids, p, q, x): both laws on common ids, and the index of the one drafted token."""
        assert self.q is not None
        ids, p, q = aligned(self.target, self.q)
        return ids, p, q, index_of(ids, self.tokens[0])


class Verdict(NamedTuple):
    """What became of a block: the tokens that stay, in order, and where each was decided.

    The last token is the target's own (corrected or bonus); those before it were drafted.
    """

    tokens: list[int]
    positions: list[Position]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method(ABC):
    """A way to mark text that is drafted by one model and verified by another.

    scheme: whose mark. The class attributes say what the method keeps: `exact` that the text's law
    is the target's; `full_strength` that the text is what the unaccelerated watermark would write
    (in law, given the key); `full_acceptance` that drafts are kept with probability 1 - TV, as
    without a mark; `one_key` that the scheme's ordinary detector applies unchanged.
    """

    name: ClassVar[str]
    reference: ClassVar[str]
    streams: ClassVar[tuple[str, ...]] = ("",)
    """Label suffixes of the keys it uses: one stream of keyed numbers each, never shared."""
    marks: ClassVar[bool] = True
    drafted: ClassVar[bool] = True
    """Whether it takes drafts at all."""
    exact: ClassVar[bool] = True
    full_strength: ClassVar[bool] = False
    full_acceptance: ClassVar[bool] = False
    spends_discarded: ClassVar[bool] = False
    """Whether the decision looks at noise of positions that it throws away (block verification):
    their contexts then count as used."""

    scheme: Scheme = field(default_factory=Gumbel)

    def __post_init__(self) -> None:
        if not self.scheme.unbiased:
            raise SchemeError(
                f"{self.name} needs an unbiased scheme; {self.scheme.name} changes the law of the "
                "text, so that drafts could not be verified. Use gumbel, gamma, delta, tournament."
            )

    @property
    def one_key(self) -> bool:
        """Whether `filigrane.detect` with the scheme is the detector."""
        return self.streams == ("",)

    @property
    def branching(self) -> int:
        """Draft tokens per position; several make a tree."""
        return 1

    @property
    def form(self) -> str:
        """Name and parameters, without the scheme: 'otmc', 'pfr:drafts=2'."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "scheme"]
        values = ",".join(f"{name}={getattr(self, name)}" for name in names)
        return self.name + (f":{values}" if values else "")

    @property
    def tag(self) -> str:
        """Text form that `speculative.method` reads back, 'otmc@gumbel:context_width=4'."""
        return f"{self.form}@{self.scheme.tag}"

    def propose(self, q: Law, noise: Noise, rng: np.random.Generator) -> list[tuple[int, float]]:
        """Draft tokens at a position, best first, each with its gap to the best (0.0 for that).

        A gap says how much less likely a token is to be kept; it decides which branches of a tree
        are followed.
        """
        return [(int(q.ids[self._propose(q, noise, rng)]), 0.0)]

    def _propose(self, q: Law, noise: Noise, rng: np.random.Generator) -> int:
        return draw(q.probs, rng)

    @abstractmethod
    def verify(self, root: Position, rng: np.random.Generator) -> Verdict:
        """Judge a block: root and all positions after it hold the target's law."""

    def detect(
        self, tokens: npt.ArrayLike | Corpus, key: MarkingKey, *, vocab_size: int | None = None
    ) -> DetectionResult:
        """Test a text for the mark that this method leaves; see `filigrane.detect`."""
        return detect(tokens, key, self.scheme, vocab_size=vocab_size)


class TokenMethod(Method):
    """Token-level verification: positions are judged one after the other, until one is rejected."""

    __slots__ = ()

    @abstractmethod
    def decide(self, here: Position, rng: np.random.Generator) -> int:
        """The token of a position where something was drafted; kept if it is that."""

    @abstractmethod
    def bonus(self, here: Position, rng: np.random.Generator) -> int:
        """The token of a position where nothing was drafted."""

    def verify(self, root: Position, rng: np.random.Generator) -> Verdict:
        """See `Method.verify`."""
        verdict = Verdict([], [])
        here = root
        while True:
            token = self.decide(here, rng) if here.tokens else self.bonus(here, rng)
            verdict.tokens.append(token)
            verdict.positions.append(here)
            if token not in here.tokens:
                return verdict
            here = here.then[here.tokens.index(token)]


class RaceMethod(TokenMethod):
    """Token-level methods whose text is a function of one race: `resolve` says it all."""

    __slots__ = ()

    def __post_init__(self) -> None:
        if not isinstance(self.scheme, Gumbel):
            raise SchemeError(
                f"{self.name} is a rule about races: its scheme is gumbel, not {self.scheme.name}. "
                "For other schemes there are mws, mse and (with detectors of their own) two-key, "
                "keyed-coin."
            )

    def _propose(self, q: Law, noise: Noise, rng: np.random.Generator) -> int:
        return race(clocks(noise.blocks[0], q.ids), q.probs)

    @abstractmethod
    def resolve(self, p: Array, q: Array, clocks: Array, x: int) -> int:
        """Index of the token: p, q, clocks (n,) aligned; x = race(clocks, q); x itself is kept."""

    def decide(self, here: Position, rng: np.random.Generator) -> int:
        """See `TokenMethod.decide`."""
        ids, p, q, x = here.laws()
        return int(ids[self.resolve(p, q, clocks(here.noise.blocks[0], ids), x)])

    def bonus(self, here: Position, rng: np.random.Generator) -> int:
        """See `TokenMethod.bonus`: the race that the unaccelerated watermark runs."""
        law = here.target
        return int(law.ids[race(clocks(here.noise.blocks[0], law.ids), law.probs)])
