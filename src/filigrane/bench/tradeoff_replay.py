"""The replay of a run: positions of its own texts, decided anew under much noise.

Positions come from the texts of `watermark`, or of `plain`, or of the first method in the run, so
they are on-policy; which ones is fixed by a seed. What is found goes to replay.json.
"""

import json
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from filigrane.bench import Report
from filigrane.bench.tradeoff import Models, Prompt, RunDirectory, Settings, write
from filigrane.errors import FiligraneError, SchemeError
from filigrane.speculative import method
from filigrane.speculative.models import BlockModel
from filigrane.speculative.replay import laws_along, replay

REPLAY: Final = "replay.json"
FIELDS: Final = 100
_SOURCES: Final = ("watermark", "plain")


def run(
    settings: Settings,
    prompts: Sequence[Prompt],
    models: Models,
    directory: RunDirectory,
    positions: int,
    report: Report,
) -> None:
    """Replay `positions` positions with every method of the run that can be, and write the file.

    Raises FiligraneError if the draft is not a model: then it has no law of its own.
    """
    if not isinstance(models.draft, BlockModel):
        raise FiligraneError("--replay needs a draft that is a model; leave it out with ngram.")
    records = list(directory.records())
    names = [*_SOURCES, *settings.methods]
    source = next(name for name in names if any(r["method"] == name for r in records))
    texts = [record for record in records if record["method"] == source]
    rng = np.random.default_rng(0)
    chosen = rng.permutation([(at, i) for at, r in enumerate(texts) for i in range(r["n_tokens"])])
    wanted: dict[int, list[int]] = {}
    for at, i in chosen[:positions].tolist():
        wanted.setdefault(at, []).append(i)
    by_id = {prompt.id: ids for prompt, ids in zip(prompts, models.prompts, strict=True)}
    pairs = []
    for done, (at, places) in enumerate(sorted(wanted.items())):
        report(done, len(wanted), "reading texts again")
        prompt, tokens = by_id[texts[at]["prompt"]], texts[at]["tokens"]
        p = laws_along(models.target, prompt, tokens, settings.sampling)
        q = laws_along(models.draft, prompt, tokens, settings.sampling)
        pairs += [(p[i], q[i]) for i in places]
    found: dict[str, Any] = {}
    for name in settings.methods:
        try:
            value = replay(
                pairs,
                method(name),
                # The same noise for every method: their ratios are what matters.
                rng=np.random.default_rng(1),
                fields=FIELDS,
                report=lambda done, name=name: report(done, len(pairs), f"replaying {name}"),  # type: ignore[misc]
            )
        except SchemeError:
            continue
        found[name] = {**value._asdict(), "positions": len(pairs), "fields": FIELDS}
    write(directory.path / REPLAY, json.dumps(found, indent=1) + "\n")
