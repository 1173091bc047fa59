"""Was a model trained on marked text? Sander et al. 2024 (arXiv 2402.14904), and better statistics.

    rules       what may be scored: tape, ledger                              no keys here
    filter      windows that the marked text holds                            no keys here
    evidence    Reading, Exchange -> Tuples, Weighted                         no keys here
    weighted    the law of a weighted sum of keyed scores
    testing     test: evidence, key, scheme -> p-value, effect, decoys
    sequential  e-values: looking more than once
    membership  without a mark: calibrated loss, two samples
    power       how much evidence a test needs
    ngram       toy writers and suspects, for self-tests

Open models are read, closed ones are asked; `adapters` has both (reading, endpoints, collecting).
"""

from filigrane.radioactivity.evidence import Document as Document
from filigrane.radioactivity.evidence import Exchange as Exchange
from filigrane.radioactivity.evidence import Reading as Reading
from filigrane.radioactivity.evidence import Tuples as Tuples
from filigrane.radioactivity.evidence import Weighted as Weighted
from filigrane.radioactivity.evidence import answers as answers
from filigrane.radioactivity.evidence import argmax as argmax
from filigrane.radioactivity.evidence import differential as differential
from filigrane.radioactivity.evidence import soft as soft
from filigrane.radioactivity.filter import WindowFilter as WindowFilter
from filigrane.radioactivity.membership import BaselineResult as BaselineResult
from filigrane.radioactivity.membership import baseline as baseline
from filigrane.radioactivity.membership import calibrated as calibrated
from filigrane.radioactivity.power import Plan as Plan
from filigrane.radioactivity.power import needed as needed
from filigrane.radioactivity.power import plan as plan
from filigrane.radioactivity.rules import Ledger as Ledger
from filigrane.radioactivity.rules import read_positions as read_positions
from filigrane.radioactivity.sequential import EProcess as EProcess
from filigrane.radioactivity.sequential import follow as follow
from filigrane.radioactivity.sequential import log_e_value as log_e_value
from filigrane.radioactivity.testing import HYPOTHESIS as HYPOTHESIS
from filigrane.radioactivity.testing import Decoys as Decoys
from filigrane.radioactivity.testing import RadioactivityResult as RadioactivityResult
from filigrane.radioactivity.testing import test as test
