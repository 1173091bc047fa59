"""Drafts by name: what somebody who types one word may mean.

A draft is a model by its name, `ngram` (what followed the same words earlier in the text) or
`skip:5,12` (the target without its layers 5 and 12, sharing all weights). Knows nothing of keys or
methods; whether target and draft fit together is for `filigrane.speculative` to say.
"""

import dataclasses
import re
from typing import Final

from filigrane.adapters import models
from filigrane.adapters.models import DType, LoadedModel
from filigrane.errors import DraftError
from filigrane.speculative.drafts import Drafter, NGram
from filigrane.speculative.models import BlockModel

NGRAM: Final = "ngram"
SKIP: Final = "skip:"


@dataclasses.dataclass(frozen=True, slots=True)
class Draft:
    """What `filigrane.speculative.generate` takes as its draft, and what to call it.

    name: short, never a path of this machine; loaded: the model, None if no other than the target
    was loaded.
    """

    name: str
    source: BlockModel | Drafter
    loaded: LoadedModel | None = None


def check_draft(name: str) -> None:
    """Raise DraftError for a draft that says `skip` and no layers."""
    if name.startswith(SKIP) and not re.fullmatch("[0-9]+(,[0-9]+)*", name.removeprefix(SKIP)):
        raise DraftError(
            "the draft skip:LAYERS leaves layers of the target out; write their numbers, counted "
            "from 0, as in skip:5,12,17,26."
        )


def load_draft(
    name: str, target: LoadedModel, *, dtype: DType | None = None, device: str = "cpu"
) -> Draft:
    """Make or load the draft of a target.

    dtype and device are those of `adapters.models.load`, for a draft that is a model of its own.
    Raises DraftError for layers that the target lacks, ModelError and MissingDependency as `load`.
    """
    check_draft(name)
    if name == NGRAM:
        return Draft(name, NGram())
    from filigrane.adapters.transformers import TransformersModel, without_layers

    if name.startswith(SKIP):
        layers = [int(number) for number in name.removeprefix(SKIP).split(",")]
        small = without_layers(target.model, layers)
        return Draft(name, TransformersModel(dataclasses.replace(target, model=small)))
    loaded = models.load(name, dtype=dtype, device=device)
    return Draft(loaded.name, TransformersModel(loaded), loaded)
