"""filigrane: watermark what a language model writes, prove it later, trace who it came from.

    keys        Key.generate, users, derivation                         secrets
    prf         key and context -> numbers (SPEC.md)                    the reference
    contexts    which positions count                                   one rule for both sides
    schemes     Gumbel, GreenList, Tournament, GammaReweight, DeltaReweight
    stats       exact tails in log space                                every p-value
    embedding   embed, embed_batch, stream, MarkedSampler               writing
    detection   detect                                                  proving
    tracing     trace                                                   attributing
    speculative generate, Session, method                               writing with drafts
    radioactivity  test, argmax, differential, answers                  was a model taught with it?
    bayes       a trained score for tournament text                     proving, a little more
    adapters    transformers, torch, models                             optional, above the core

The core sees token ids and numpy. Importing this package loads no framework.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from filigrane.contexts import Corpus as Corpus
    from filigrane.detection import DetectionResult as DetectionResult
    from filigrane.detection import detect as detect
    from filigrane.embedding import Generated as Generated
    from filigrane.embedding import LanguageModel as LanguageModel
    from filigrane.embedding import MarkedSampler as MarkedSampler
    from filigrane.embedding import Sampling as Sampling
    from filigrane.embedding import embed as embed
    from filigrane.embedding import embed_batch as embed_batch
    from filigrane.embedding import stream as stream
    from filigrane.errors import FiligraneError as FiligraneError
    from filigrane.keys import Key as Key
    from filigrane.schemes import SCHEMES as SCHEMES
    from filigrane.schemes import DeltaReweight as DeltaReweight
    from filigrane.schemes import GammaReweight as GammaReweight
    from filigrane.schemes import GreenList as GreenList
    from filigrane.schemes import Gumbel as Gumbel
    from filigrane.schemes import Tournament as Tournament
    from filigrane.schemes import from_tag as from_tag
    from filigrane.tracing import TraceResult as TraceResult
    from filigrane.tracing import trace as trace

__version__ = "0.1.0"

__all__ = [
    "SCHEMES",
    "Corpus",
    "DeltaReweight",
    "DetectionResult",
    "FiligraneError",
    "GammaReweight",
    "Generated",
    "GreenList",
    "Gumbel",
    "Key",
    "LanguageModel",
    "MarkedSampler",
    "Sampling",
    "Tournament",
    "TraceResult",
    "detect",
    "embed",
    "embed_batch",
    "from_tag",
    "stream",
    "trace",
]

_HOME = {
    "Corpus": "contexts",
    "DeltaReweight": "schemes",
    "DetectionResult": "detection",
    "FiligraneError": "errors",
    "GammaReweight": "schemes",
    "Generated": "embedding",
    "GreenList": "schemes",
    "Gumbel": "schemes",
    "Key": "keys",
    "LanguageModel": "embedding",
    "MarkedSampler": "embedding",
    "SCHEMES": "schemes",
    "Sampling": "embedding",
    "Tournament": "schemes",
    "TraceResult": "tracing",
    "detect": "detection",
    "embed": "embedding",
    "embed_batch": "embedding",
    "from_tag": "schemes",
    "stream": "embedding",
    "trace": "tracing",
}


def __getattr__(name: str) -> object:
    """Load a name of the front door when it is first asked for.

    Numpy takes half of the time of a command's help, which needs none of it.
    """
    if name not in _HOME:
        raise AttributeError(f"module 'filigrane' has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"filigrane.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
