"""What any engine that serves models needs to mark text: which key, which scheme, or why not.

    Keyring         the server's keys, tenants and policy, read from a folder
    LiveKeyring     a folder whose keyring changes while a server runs
    decide          one request -> a Mark, Unmarked with its reason, or RequestRefused
    MarkedText      one text being written: its slot, its history, its private randomness
    known_answers   whether marks made and found here are the ones everybody else makes

Knows nothing of any engine, of HTTP or of models; `filigrane.adapters` has those.
"""

from filigrane.serving.keyring import Keyring
from filigrane.serving.live import LiveKeyring
from filigrane.serving.orders import ARGUMENTS, Decoding, Mark, Unmarked, decide
from filigrane.serving.readiness import known_answers
from filigrane.serving.texts import MarkedText

__all__ = [
    "ARGUMENTS",
    "Decoding",
    "Keyring",
    "LiveKeyring",
    "Mark",
    "MarkedText",
    "Unmarked",
    "decide",
    "known_answers",
]
