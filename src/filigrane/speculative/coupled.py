"""The mark at full strength: without drafts, and with drafts that race under the same noise.

What comes out is what the unaccelerated watermark writes; the no-go theorem says what that costs
in acceptance (docs/design/0006-no-go.md). For a race this is the algorithm of Daliri et al. 2024
(arXiv 2408.07978) and, with one draft, of Liu et al. 2026 (2609.21858); for tournament sampling it
is the high-detectability variant of SynthID-Text (Dathathri et al. 2024, supplement I.4).
"""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from filigrane.prf import Words
from filigrane.schemes.base import Scheme
from filigrane.speculative.base import Noise, Position, TokenMethod
from filigrane.speculative.laws import Law, draw
from filigrane.speculative.plain import sample, speculate


def marked_law(scheme: Scheme, law: Law, block: Words) -> Law:
    """R_E(law): the scheme's reweight on a support."""
    return Law(law.ids, scheme.reweight(law.probs, block, law.ids))


@dataclass(frozen=True, slots=True, kw_only=True)
class Coupled(TokenMethod):
    """Maintain watermark strength (Hu and Huang 2024): speculative sampling of R_E(P) by R_E(Q)."""

    name: ClassVar[str] = "mws"
    reference: ClassVar[str] = "Hu and Huang 2024, arXiv 2410.20418"
    full_strength: ClassVar[bool] = True

    def _propose(self, q: Law, noise: Noise, rng: np.random.Generator) -> int:
        # Unmarked positions owe nothing to the noise, and plain speculation accepts more.
        law = marked_law(self.scheme, q, noise.blocks[0]) if noise.marked else q
        return draw(law.probs, rng)

    def decide(self, here: Position, rng: np.random.Generator) -> int:
        """See `TokenMethod.decide`."""
        p, q, block = here.target, here.q, here.noise.blocks[0]
        assert q is not None
        if here.noise.marked:
            p, q = marked_law(self.scheme, p, block), marked_law(self.scheme, q, block)
        return speculate(p, q, here.tokens[0], rng)

    def bonus(self, here: Position, rng: np.random.Generator) -> int:
        """See `TokenMethod.bonus`."""
        return sample(marked_law(self.scheme, here.target, here.noise.blocks[0]), rng)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unaccelerated(Coupled):
    """The watermark with one target call per token; the reference for strength."""

    name: ClassVar[str] = "watermark"
    reference: ClassVar[str] = "Aaronson 2022; Hu et al. 2023; Dathathri et al. 2024"
    drafted: ClassVar[bool] = False
