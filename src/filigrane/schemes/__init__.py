"""The schemes, and the one place where a scheme's text becomes an object."""

from typing import Final

from filigrane.schemes import tags
from filigrane.schemes.base import Scheme
from filigrane.schemes.greenlist import GreenList
from filigrane.schemes.gumbel import Gumbel
from filigrane.schemes.tournament import Tournament
from filigrane.schemes.unbiased import DeltaReweight, GammaReweight

__all__ = [
    "SCHEMES",
    "DeltaReweight",
    "GammaReweight",
    "GreenList",
    "Gumbel",
    "Scheme",
    "Tournament",
    "from_tag",
]

SCHEMES: Final[dict[str, type[Scheme]]] = {
    "gumbel": Gumbel,
    "greenlist": GreenList,
    "tournament": Tournament,
    "gamma": GammaReweight,
    "delta": DeltaReweight,
}


def from_tag(tag: str) -> Scheme:
    """Read 'gumbel' or 'greenlist:gamma=0.5,delta=3' (omitted parameters keep their defaults).

    Raises SchemeError for unknown names, parameters and values.
    """
    return tags.read(tag, SCHEMES, "scheme")
