"""What --draft, --method and --draft-length of `embed` mean.

Only methods whose text `filigrane detect` reads are taken here: what was written at a command line
has to be found at one. Knows nothing of prompts and records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from filigrane.adapters.drafts import check_draft, load_draft
from filigrane.embedding import Sampling
from filigrane.errors import DraftError, SchemeError
from filigrane.schemes import Gumbel, Scheme
from filigrane.speculative import METHODS, Method, Session, Speculated, method
from filigrane.speculative.decoding import MAX_DRAFT_LENGTH

if TYPE_CHECKING:
    from filigrane.adapters.drafts import Draft
    from filigrane.adapters.models import LoadedModel
    from filigrane.adapters.transformers import TransformersModel
    from filigrane.keys import MarkingKey

DRAFT_LENGTH: Final = 4
"""Draft tokens per target call if --draft-length is not given."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What the options say. draft: as given, for `load_draft`; length: tokens per target call."""

    method: Method
    draft: str
    length: int

    @property
    def settings(self) -> dict[str, object]:
        """For records, without the name of the draft: a model's is known once it is loaded."""
        return {"method": self.method.form, "draft_length": self.length}

    def load(self, loaded: "LoadedModel", target: "TransformersModel", device: str) -> "Drafts":
        """The draft, made for a target. Raises if the two do not fit; nothing is written then."""
        draft = load_draft(self.draft, loaded, device=device)
        drafts = Drafts(self, draft, target)
        # A session of no texts: it checks all that one of some texts would check.
        drafts.session([], 0, None, np.random.default_rng(0), Sampling(), ())
        return drafts


@dataclass(frozen=True, slots=True)
class Drafts:
    """A target with its draft, ready to write."""

    choice: Choice
    draft: "Draft"
    target: "TransformersModel"

    @property
    def settings(self) -> dict[str, object]:
        """For records."""
        return {"draft": self.draft.name} | self.choice.settings

    def session(
        self,
        prompts: Sequence[Any],
        max_new_tokens: int,
        key: "MarkingKey | None",
        rng: np.random.Generator,
        sampling: Sampling,
        stop: Sequence[int],
    ) -> Session:
        """Texts about to be written, all with one key."""
        return Session(
            self.target,
            self.draft.source,
            prompts,
            max_new_tokens,
            [key] * len(prompts),
            self.choice.method,
            draft_length=self.choice.length,
            rng=rng,
            sampling=sampling,
            stop=stop,
        )

    def generate(
        self,
        prompts: Sequence[Any],
        max_new_tokens: int,
        key: "MarkingKey | None",
        rng: np.random.Generator,
        sampling: Sampling,
        stop: Sequence[int],
    ) -> list[Speculated]:
        """All of the texts at once, as `speculative.generate`."""
        session = self.session(prompts, max_new_tokens, key, rng, sampling, stop)
        for _ in session:
            pass
        return session.results()


def choose(
    draft: str | None, name: str | None, length: int | None, scheme: Scheme, *, marked: bool
) -> Choice | None:
    """Read the three options; None without --draft. Raises before anything is loaded.

    scheme: of --scheme, not used for unmarked text.
    """
    if draft is None:
        if name is not None or length is not None:
            raise DraftError(
                "--method and --draft-length say how drafts are used; name a draft with --draft, "
                "e.g. --draft ngram."
            )
        return None
    check_draft(draft)
    length = DRAFT_LENGTH if length is None else length
    if not 1 <= length <= MAX_DRAFT_LENGTH:
        raise DraftError(f"--draft-length takes 1 to {MAX_DRAFT_LENGTH} tokens, got {length}.")
    if name is None:
        name = _default(scheme) if marked else "plain"
    if "@" in name:
        raise SchemeError(
            f"--method takes a method without a scheme, {name.partition('@')[0]}; the scheme is "
            "that of --scheme."
        )
    chosen = method(name, scheme)
    if not chosen.drafted:
        raise DraftError(
            f"{chosen.name} takes no drafts: leave --draft out, or choose another --method."
        )
    if marked and not chosen.marks:
        raise SchemeError(
            f"{chosen.name} leaves text unmarked; pass --unmarked instead of scheme and key, or a "
            "method that marks, such as mse."
        )
    if chosen.marks and not marked:
        raise SchemeError(
            f"{chosen.name} marks text; with --unmarked use plain or bv, or drop --unmarked."
        )
    if chosen.marks and not chosen.one_key:
        raise SchemeError(
            f"`filigrane detect` does not read the mark of {chosen.name}; use the Python API, "
            "filigrane.speculative.generate and the tests of filigrane.speculative.detectors, or a "
            "method of one key, such as mse."
        )
    return Choice(chosen, draft, length)


def _default(scheme: Scheme) -> str:
    """The method for drafts if none is named."""
    if isinstance(scheme, Gumbel):
        return "otmc"
    takers = [kind for kind in METHODS.values() if _takes(kind, scheme)]
    if not takers:
        raise SchemeError(
            f"no method of speculative sampling takes {scheme.name}; leave --draft out, or use "
            "another scheme, such as gumbel."
        )
    names = ", ".join(kind.name for kind in takers)
    raise SchemeError(f"which method? Pass --method; {scheme.name} is taken by {names}.")


def _takes(kind: type[Method], scheme: Scheme) -> bool:
    try:
        made = kind(scheme=scheme)
    except SchemeError:
        return False
    return made.marks and made.drafted and made.one_key
