"""filigrane radioactivity: the commands of the group, each in a file of its own."""

from typing import Final

from filigrane.cli.radioactivity_baseline import baseline
from filigrane.cli.radioactivity_collect import collect
from filigrane.cli.radioactivity_filter import filter_
from filigrane.cli.radioactivity_plan import plan
from filigrane.cli.radioactivity_read import read
from filigrane.cli.radioactivity_report import report
from filigrane.cli.radioactivity_selftest import selftest
from filigrane.cli.radioactivity_study import study
from filigrane.cli.radioactivity_test import test

SUBCOMMANDS: Final = {
    "plan": plan,
    "collect": collect,
    "read": read,
    "filter": filter_,
    "baseline": baseline,
    "test": test,
    "report": report,
    "study": study,
    "selftest": selftest,
}
