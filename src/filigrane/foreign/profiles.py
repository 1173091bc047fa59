"""All profiles by name, and the one place where a profile's text becomes an object."""

import dataclasses
from typing import Final

from filigrane.foreign.base import Profile
from filigrane.foreign.kgw import KgwExtended
from filigrane.foreign.sglang import SglangDualGumbel, SglangGumbel
from filigrane.foreign.synthid import SynthIDHead, SynthIDHf
from filigrane.foreign.textseal import TextSealGreenList, TextSealGumbelMax, TextSealSynthID
from filigrane.foreign.three_bricks import ThreeBricksMaryland, ThreeBricksOpenai
from filigrane.foreign.transformers_kgw import HfLefthash, HfSelfhash
from filigrane.foreign.vllm import VllmDualGumbel, VllmGumbel
from filigrane.schemes import tags

PROFILES: Final[dict[str, type[Profile]]] = {
    "vllm-gumbel": VllmGumbel,
    "vllm-dual-gumbel": VllmDualGumbel,
    "sglang-gumbel": SglangGumbel,
    "sglang-dual-gumbel": SglangDualGumbel,
    "synthid-hf": SynthIDHf,
    "synthid-text-head": SynthIDHead,
    "hf-kgw-lefthash": HfLefthash,
    "hf-kgw-selfhash": HfSelfhash,
    "kgw-ext": KgwExtended,
    "maryland": ThreeBricksMaryland,
    "openai": ThreeBricksOpenai,
    "textseal-greenlist": TextSealGreenList,
    "textseal-gumbelmax": TextSealGumbelMax,
    "textseal-synthid": TextSealSynthID,
}


def from_tag(tag: str, *, vocab_size: int | None = None) -> Profile:
    """Read 'vllm-gumbel' or 'hf-kgw-lefthash:vocab_size=49152,greenlist_ratio=0.5'.

    Omitted parameters keep their defaults; vocab_size is used where a profile needs one and the tag
    has none. Raises SchemeError for unknown names, parameters and values.
    """
    name, colon, rest = tag.strip().partition(":")
    needed = name in PROFILES and PROFILES[name].needs_vocab
    if needed and vocab_size is not None and "vocab_size" not in rest:
        rest = ",".join(part for part in (rest, f"vocab_size={vocab_size}") if part)
        colon = ":"
    return tags.read(f"{name}{colon}{rest}", PROFILES, "profile")


def parameters(name: str) -> dict[str, object]:
    """The parameters of a profile and their defaults; None for what has to be given."""
    return {
        f.name: None if f.default is dataclasses.MISSING else f.default
        for f in dataclasses.fields(PROFILES[name])
    }
