"""What somebody who may ask the detector learns: queries and edits to strip or forge a mark.

    python benchmarks/service/oracle.py --out benchmarks/service/oracle.json [--queries 20000]

On a key of its own, with texts of 200 tokens of a toy model, an attacker changes words and asks
again. Its proposals are random words of the model's vocabulary; whether they keep the meaning is
not its problem here, which makes it stronger than a real one. It knows the rules, not the key.

    strip, expert   climbs on log p: keeps a change if the evidence became weaker
    strip, public   sees three classes: changes words in a random order, finds by bisection how many
                    are needed, then puts words back one by one as long as nothing is found
    with filler     the same, each variant followed by as many fresh words of no mark, so that it
                    resembles no other as a whole
    strip, blind    never asks: how many random changes remove the mark from 99 of 100 texts
    forge, expert   climbs on log p from a text without a mark
    forge, public   climbs on the answer, which does not move until it is "detected"

Budgets: the public tier with its near-duplicate budget, as it is set up, for one hour.
"""

import argparse
import datetime
import json
import math
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from filigrane import __version__
from filigrane.custody.hierarchy import KeySpec
from filigrane.embedding import embed
from filigrane.errors import BudgetSpent
from filigrane.keys import Key
from filigrane.schemes import from_tag
from filigrane.service.detecting import Query
from filigrane.service.public import PublicLimits, PublicTier
from filigrane.toy import ZipfModel

Ids = list[int]
Score = Callable[[Ids], float]
"""What is climbed on: larger is what the attacker wants."""
Goal = Callable[[Ids], bool | None]
"""Whether the mark is found; None if the tier does not answer any more."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """queries: asked; edits: words that differ from the first text; reached: whether it worked;
    moves: how often an answer told one change from another."""

    reached: bool
    queries: int
    edits: int
    moves: int


def climb(
    start: Ids,
    score: Score,
    reached: Callable[[Ids], bool],
    vocabulary: int,
    rng: np.random.Generator,
    most: int,
) -> Outcome:
    """Change one word at a time, keep what is better. score(ids) is one query."""
    now, best = list(start), score(start)
    queries, moves = 1, 0
    while queries < most and not reached(now):
        changed = list(now)
        changed[int(rng.integers(len(now)))] = int(rng.integers(vocabulary))
        value = score(changed)
        queries += 1
        moves += value != best
        if value > best or (value == best and rng.random() < 0.5):
            now, best = changed, value
    edits = sum(a != b for a, b in zip(now, start, strict=True))
    return Outcome(reached=reached(now), queries=queries, edits=edits, moves=moves)


def bisect_and_restore(
    start: Ids, found: Goal, vocabulary: int, rng: np.random.Generator, most: int
) -> Outcome:
    """Strip with yes and no alone."""
    order = rng.permutation(len(start))
    other = rng.integers(vocabulary, size=len(start))
    queries = 0

    def changed(places: Sequence[int]) -> Ids:
        ids = list(start)
        for place in places:
            ids[place] = int(other[place])
        return ids

    low, high = 0, len(start)
    while high - low > 1 and queries < most:
        middle = (low + high) // 2
        answer = found(changed(order[:middle]))
        queries += 1
        if answer is None:
            break
        low, high = (middle, high) if answer else (low, middle)
    places = list(order[:high])
    for place in list(places):
        if queries >= most:
            break
        fewer = [one for one in places if one != place]
        answer = found(changed(fewer))
        queries += 1
        if answer is None:
            break
        if not answer:
            places = fewer
    # Whether it worked, the attacker need not ask: it is what the last kept answer said.
    return Outcome(reached=True, queries=queries, edits=len(places), moves=queries)


class Target:
    """A service of one key, in this process, and texts of a toy model."""

    def __init__(self, folder: Path, scheme: str, vocabulary: int = 1000, n: int = 200) -> None:
        from filigrane.service.office import open_office
        from filigrane.service.settings import Settings

        self.vocabulary, self.n = vocabulary, n
        self.model = ZipfModel(vocabulary, 1.0)
        self.scheme = from_tag(scheme)
        words = [_word(i) for i in range(vocabulary)]
        _write_tokenizer(folder / "words", words)
        settings = Settings.initial(folder / "service")
        config = folder / "service" / "filigrane.toml"
        config.write_text(config.read_text() + f'\n[tokenizers]\nwords = "{folder / "words"}"\n')
        self.office = open_office(Settings.load(config))
        self.words = words
        sha256 = self.office.tokenizers.sha256("words")
        assert settings.public is not None
        self.tenant = settings.public.tenant
        self.record = self.office.keybook.create(
            KeySpec(
                tenant=self.tenant,
                name="own",
                model="toy",
                scheme=scheme,
                tokenizer_sha256=sha256,
                slots=8,
            ),
            actor="benchmark",
        )
        self.office.keybook.promote(self.tenant, "own", 1, actor="benchmark")
        key = self.office.keybook.key_of(self.record)
        assert isinstance(key, Key)
        self.key = key
        self.queries = 0

    def marked(self, seed: int) -> Ids:
        rng = np.random.default_rng(seed)
        prompt = rng.integers(self.vocabulary, size=3)
        made = embed(self.model, prompt, self.n, self.key, self.scheme, rng=rng)
        return [int(token) for token in made.tokens]

    def unmarked(self, seed: int) -> Ids:
        rng = np.random.default_rng(seed)
        prompt = rng.integers(self.vocabulary, size=3)
        other = Key.generate("other")
        made = embed(self.model, prompt, self.n, other, self.scheme, rng=rng)
        return [int(token) for token in made.tokens]

    def text(self, ids: Ids) -> str:
        return " ".join(self.words[i] for i in ids)

    def log_p(self, ids: Ids) -> float:
        """What the expert tier says."""
        return float(
            self.office.detector.detect(self.tenant, Query(text=self.text(ids))).log_pvalue
        )

    def public(self, limits: PublicLimits, filler: np.random.Generator | None = None) -> Goal:
        """What the public tier says: whether a mark was found, or None for no answer.

        filler: draws as many words again, to be put behind each text.
        """
        tier = PublicTier(self.office.detector, limits)

        def ask(ids: Ids) -> bool | None:
            if filler is not None:
                ids = [*ids, *filler.integers(self.vocabulary, size=len(ids)).tolist()]
            try:
                answer = tier.answer(self.tenant, self.text(ids), identity=None, address=None)
            except BudgetSpent:
                return None
            return answer.verdict == "detected"

        return ask

    def close(self) -> None:
        self.office.close()


# Of the rates nothing is asked here: an attacker has the hour.
OPEN = PublicLimits(near_duplicates=0, per_identity="1000000/second", per_network="1000000/second")
BUDGET = PublicLimits()
LIMIT = math.log(1e-6)


def strip_expert(target: Target, seed: int, most: int) -> Outcome:
    rng = np.random.default_rng([1, seed])
    last: dict[tuple[int, ...], float] = {}

    def score(ids: Ids) -> float:
        last[tuple(ids)] = target.log_p(ids)
        return last[tuple(ids)]

    start = target.marked(seed)
    return climb(start, score, lambda ids: last[tuple(ids)] > LIMIT, target.vocabulary, rng, most)


def forge_expert(target: Target, seed: int, most: int) -> Outcome:
    rng = np.random.default_rng([2, seed])
    last: dict[tuple[int, ...], float] = {}

    def score(ids: Ids) -> float:
        last[tuple(ids)] = target.log_p(ids)
        return -last[tuple(ids)]

    start = target.unmarked(seed)
    return climb(start, score, lambda ids: last[tuple(ids)] <= LIMIT, target.vocabulary, rng, most)


def strip_public(target: Target, seed: int, most: int, limits: PublicLimits) -> Outcome:
    rng = np.random.default_rng([3, seed])
    start = target.marked(seed)
    return bisect_and_restore(start, target.public(limits), target.vocabulary, rng, most)


def strip_filled(target: Target, seed: int, most: int, limits: PublicLimits) -> Outcome:
    rng = np.random.default_rng([6, seed])
    ask = target.public(limits, np.random.default_rng([7, seed]))
    return bisect_and_restore(target.marked(seed), ask, target.vocabulary, rng, most)


def forge_public(target: Target, seed: int, most: int, limits: PublicLimits) -> Outcome:
    rng = np.random.default_rng([4, seed])
    ask = target.public(limits)
    answered = 0
    found = False

    def score(ids: Ids) -> float:
        nonlocal answered, found
        answer = ask(ids)
        answered += answer is not None
        found = found or bool(answer)
        return float(bool(answer))

    outcome = climb(target.unmarked(seed), score, lambda ids: found, target.vocabulary, rng, most)
    return Outcome(
        reached=outcome.reached, queries=answered, edits=outcome.edits, moves=outcome.moves
    )


def strip_blind(target: Target, seeds: Sequence[int]) -> int:
    """The least number of random changes that removes the mark from 99 of 100 texts."""
    needed = []
    for seed in seeds:
        rng = np.random.default_rng([5, seed])
        start = target.marked(seed)
        order, other = rng.permutation(len(start)), rng.integers(target.vocabulary, size=len(start))
        low, high = 0, len(start)
        while high - low > 1:
            middle = (low + high) // 2
            ids = list(start)
            for place in order[:middle]:
                ids[place] = int(other[place])
            low, high = (middle, high) if target.log_p(ids) <= LIMIT else (low, middle)
        needed.append(high)
    return int(np.quantile(needed, 0.99, method="higher"))


def attacks_on(
    target: Target, most: int, texts: int
) -> list[tuple[str, str, Callable[[int], Outcome], int]]:
    """Attack, tier, what runs it on the text of a seed, and on how many texts."""
    few, hour = max(1, texts // 3), "public, budget of an hour"
    return [
        ("strip", "expert", lambda s: strip_expert(target, s, most), texts),
        ("strip", "public, no budget", lambda s: strip_public(target, s, most, OPEN), texts),
        ("strip", hour, lambda s: strip_public(target, s, most, BUDGET), texts),
        (
            "strip with filler",
            "public, no budget",
            lambda s: strip_filled(target, s, most, OPEN),
            texts,
        ),
        ("strip with filler", hour, lambda s: strip_filled(target, s, most, BUDGET), texts),
        ("forge", "expert", lambda s: forge_expert(target, s, most), texts),
        ("forge", "public, no budget", lambda s: forge_public(target, s, most, OPEN), few),
        ("forge", hour, lambda s: forge_public(target, s, min(2000, most), BUDGET), few),
    ]


def _word(number: int) -> str:
    consonants, vowels = "bdfglmnprt", "aeiou"
    parts = []
    for _ in range(3):
        number, rest = divmod(number, 50)
        parts.append(consonants[rest // 5] + vowels[rest % 5])
    return "".join(parts)


def _write_tokenizer(folder: Path, words: Sequence[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    bare = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="ba"))
    bare.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=bare).save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/service/oracle.json"))
    parser.add_argument("--queries", type=int, default=20_000, help="the most that one attack asks")
    parser.add_argument("--texts", type=int, default=10)
    parser.add_argument("--schemes", nargs="+", default=["gumbel", "greenlist"])
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for scheme in given.schemes:
        with tempfile.TemporaryDirectory() as folder:
            target = Target(Path(folder), scheme)
            strength = [target.log_p(target.marked(seed)) for seed in range(given.texts)]
            rows.append(
                {
                    "scheme": scheme,
                    "attack": "none",
                    "tier": "",
                    "log10_p_median": round(statistics.median(strength) / math.log(10), 1),
                }
            )
            rows.append(
                {
                    "scheme": scheme,
                    "attack": "strip",
                    "tier": "blind, 99 of 100 texts",
                    "reached": "99 of 100",
                    "queries": 0,
                    "edits": strip_blind(target, range(100)),
                }
            )
            attacks = attacks_on(target, given.queries, given.texts)
            for attack, tier, run, texts in attacks:
                done = [run(seed) for seed in range(texts)]
                rows.append(
                    {
                        "scheme": scheme,
                        "attack": attack,
                        "tier": tier,
                        "texts": texts,
                        "reached": sum(one.reached for one in done),
                        "queries": [one.queries for one in done],
                        "edits": [one.edits for one in done],
                        "moves": [one.moves for one in done],
                    }
                )
                sys.stderr.write(f"{scheme}, {attack}, {tier}: {done[0]}\n")
            target.close()
    result = {
        "made_by": "benchmarks/service/oracle.py",
        "at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "python": platform.python_version(),
        "tokens": 200,
        "vocabulary": 1000,
        "most_queries": given.queries,
        "near_duplicates_an_hour": BUDGET.near_duplicates,
        "rows": rows,
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(markdown(result))
    sys.stdout.write(markdown(result))


def markdown(result: dict[str, Any]) -> str:
    lines = [
        "# The detector as an oracle",
        "",
        f"Made by `{result['made_by']}` on {result['at'][:10]}: texts of {result['tokens']} words "
        f"of a toy model with {result['vocabulary']}, one key of 8 slots, alpha 1e-6. An attack "
        f"gives up after {result['most_queries']:,} queries. The budget is "
        f"{result['near_duplicates_an_hour']} nearly equal texts an hour and network.",
        "",
        "| scheme | attack | tier | worked | queries answered (median) | words changed (median) |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        if row["attack"] == "none":
            lines.append(
                f"| {row['scheme']} | none: median log10 p {row['log10_p_median']} | | | | |"
            )
            continue
        queries, edits = row["queries"], row["edits"]
        worked = row["reached"] if "texts" not in row else f"{row['reached']} of {row['texts']}"
        shown = [
            f"{statistics.median(value):,.0f}" if isinstance(value, list) else f"{value:,}"
            for value in (queries, edits)
        ]
        lines.append(
            f"| {row['scheme']} | {row['attack']} | {row['tier']} | {worked} | {shown[0]} | "
            f"{shown[1]} |"
        )
    lines += [
        "",
        "Random changes strip without asking anybody; what an oracle buys is fewer of them. The "
        "expert tier is all that a forger needs: give it to people, not to the public. The public "
        "answer moves only when a text is forged already.",
        "",
        "The budget is that of one identity or network: whoever has n of them is answered n times "
        "as often (fifty times at most, and then once each). Filler put behind or before a text, "
        "as measured here, does not evade it; fresh words between all the others would, and make "
        "the mark fainter as well. Memory is bounded: who sends enough other texts is forgotten.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
