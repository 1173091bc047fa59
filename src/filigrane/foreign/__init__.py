"""Marks that other tools write: read with exact p-values, and written for round trips.

    key = ForeignKey.load("vllm.key", KeyForm.UINT64)
    result = from_tag("vllm-gumbel").read(Written(tokens=ids), key)

Four engines say "Gumbel" and mean four different marks, so a profile is named by its tool; PROFILES
has them all, and `read_auto` tries what a key can be and pays for it. None imports the tool it
reads.
"""

from filigrane.foreign.auto import AutoResult, read_auto, usual_candidates
from filigrane.foreign.base import ASSURANCE, ForeignResult, Profile, Writable, Written
from filigrane.foreign.keys import ForeignKey, KeyForm
from filigrane.foreign.kgw import KgwExtended
from filigrane.foreign.profiles import PROFILES, from_tag
from filigrane.foreign.sglang import SglangDualGumbel, SglangGumbel
from filigrane.foreign.synthid import Bayesian, Posterior, SynthIDHead, SynthIDHf
from filigrane.foreign.textseal import TextSealGreenList, TextSealGumbelMax, TextSealSynthID
from filigrane.foreign.three_bricks import ThreeBricksMaryland, ThreeBricksOpenai
from filigrane.foreign.transformers_kgw import HfLefthash, HfSelfhash
from filigrane.foreign.vllm import VllmDualGumbel, VllmGumbel
from filigrane.foreign.writing import write

__all__ = [
    "ASSURANCE",
    "PROFILES",
    "AutoResult",
    "Bayesian",
    "ForeignKey",
    "ForeignResult",
    "HfLefthash",
    "HfSelfhash",
    "KeyForm",
    "KgwExtended",
    "Posterior",
    "Profile",
    "SglangDualGumbel",
    "SglangGumbel",
    "SynthIDHead",
    "SynthIDHf",
    "TextSealGreenList",
    "TextSealGumbelMax",
    "TextSealSynthID",
    "ThreeBricksMaryland",
    "ThreeBricksOpenai",
    "VllmDualGumbel",
    "VllmGumbel",
    "Writable",
    "Written",
    "from_tag",
    "read_auto",
    "usual_candidates",
    "write",
]
