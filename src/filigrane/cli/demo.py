"""filigrane demo: the whole story on a real model, and an exit code that says whether it held."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.text import Text as Words

from filigrane.cli import render
from filigrane.cli.options import Json

if TYPE_CHECKING:
    from rich.table import Table

    from filigrane.contexts import TokenIds
    from filigrane.keys import Key, MarkingKey
    from filigrane.schemes import Scheme

PROMPTS: Final = (
    "Describe a long walk through Venice at dawn, with all its details.",
    "Write a story about a lighthouse keeper who finds a message in a bottle.",
    "Explain how bread is made, from the field to the table.",
)
ALPHA: Final = 1e-6
"""Level of every claim: a right key must reach it, everything else must stay above it."""


@dataclass(frozen=True, slots=True)
class Text:
    """One text of the demonstration and everything that is claimed about it."""

    scheme: str
    prompt: int
    user: str | None
    tokens: int
    scored: int
    statistic: float
    log10_p: float
    log10_p_wrong_key: float
    named: tuple[str, ...]
    n_candidates: int
    wrong: tuple[str, ...]


def write(
    model: Any,
    jobs: Sequence[tuple["Scheme", "MarkingKey | None", int]],
    n_tokens: int,
    report: Callable[[int], None],
) -> list["TokenIds"]:
    """Write one text per (scheme, key, prompt), all in one batch, a sampler per scheme.

    The model's stop tokens are held back, so that all texts have the same length.
    """
    import numpy as np

    from filigrane import MarkedSampler
    from filigrane.adapters.models import chat_prompt
    from filigrane.adapters.transformers import TransformersModel

    lm = TransformersModel(model)
    prompts = [chat_prompt(model, PROMPTS[prompt]) for _, _, prompt in jobs]
    rng = np.random.default_rng()
    groups: list[tuple[list[int], MarkedSampler]] = []
    for scheme in dict.fromkeys(scheme for scheme, _, _ in jobs):
        rows = [row for row, job in enumerate(jobs) if job[0] == scheme]
        groups.append((rows, MarkedSampler(scheme, [jobs[row][1] for row in rows], rng=rng)))
    drawn = np.empty((len(jobs), n_tokens), dtype=np.int64)
    logits, state = lm.prefill(prompts)
    for step in range(n_tokens):
        logits[:, list(lm.stop_ids)] = -np.inf
        for rows, sampler in groups:
            drawn[rows, step] = sampler.sample(logits[rows])
        report(step + 1)
        if step + 1 < n_tokens:
            logits, state = lm.step(drawn[:, step], state)
    return list(drawn)


def examine(
    tokens: "TokenIds",
    scheme: "Scheme",
    prompt: int,
    root: "Key",
    owner: int | None,
    strangers: tuple["MarkingKey", "MarkingKey"],
    n_users: int,
) -> Text:
    """Detect with the right key and wrong ones, trace, and list what is not as claimed.

    owner: the user whose key wrote the text, None for unmarked; strangers: another user's key, also
    tried as the right key of an unmarked text, and an unrelated key.
    """
    import filigrane as fg

    neighbour, unrelated = strangers
    right = neighbour if owner is None else root.user(owner)
    own = fg.detect(tokens, right, scheme)
    others = [unrelated] if owner is None else [neighbour, unrelated]
    wrong_key = min(fg.detect(tokens, key, scheme).log10_pvalue for key in others)
    found = fg.trace(tokens, root.users(n_users), scheme)
    named = found.named(ALPHA)
    expected = () if owner is None else (root.user(owner).name,)
    wrong = []
    if owner is not None and own.pvalue > ALPHA:
        wrong.append("the mark was not found with its key")
    if owner is None and own.pvalue <= ALPHA:
        wrong.append("a mark was found in unmarked text")
    if wrong_key <= -6:
        wrong.append("a wrong key found a mark")
    if named != expected:
        wrong.append(f"traced to {', '.join(named) or 'nobody'}")
    return Text(
        scheme=scheme.tag,
        prompt=prompt,
        user=None if owner is None else root.user(owner).name,
        tokens=own.n_tokens,
        scored=own.n_scored,
        statistic=own.statistic,
        log10_p=own.log10_pvalue,
        log10_p_wrong_key=wrong_key,
        named=named,
        n_candidates=found.n_candidates,
        wrong=tuple(wrong),
    )


def demo(
    model: Annotated[
        str, typer.Option(help="smollm2, a transformers folder, a .gguf file or a hub id.")
    ] = "smollm2",
    tokens: Annotated[int, typer.Option(min=20, help="Tokens per text.")] = 300,
    users: Annotated[int, typer.Option(min=3, help="How many users to trace among.")] = 100_000,
    json: Json = False,
) -> None:
    """Mark, detect and trace texts of a real model, and check every claim.

    Writes texts for three prompts, unmarked and with each scheme under the keys of two users; tests
    each with the right key, another user's and an unrelated one; traces each among all users. Exit
    code 0 if every claim held, 1 if one did not (they are listed), 2 if it could not run.
    """
    import numpy as np

    import filigrane as fg
    from filigrane.adapters.models import load

    started = time.perf_counter()
    if not json:
        render.notice(f"loading {model} (the first time takes longer)")
    loaded = load(model)
    root, unrelated = fg.Key.generate("demo", slots=4), fg.Key.generate("unrelated", slots=4)
    rng = np.random.default_rng()
    alice, bob, carol = (int(user) for user in rng.choice(users, size=3, replace=False))
    schemes = [scheme() for scheme in fg.SCHEMES.values()]
    jobs: list[tuple[Scheme, MarkingKey | None, int]] = []
    owners: list[int | None] = []
    for scheme in schemes:
        for user in (alice, bob):
            for prompt in range(len(PROMPTS)):
                jobs.append((scheme, root.user(user), prompt))
                owners.append(user)
    for prompt in range(len(PROMPTS)):
        jobs.append((schemes[0], None, prompt))
        owners.append(None)

    with render.progress("tokens each") as report:
        what = f"writing {len(jobs)} texts"
        drawn = write(loaded, jobs, tokens, lambda done: report(done, tokens, what))
    results: list[Text] = []
    with render.progress("texts") as report:
        for (scheme, _, prompt), owner, ids in zip(jobs, owners, drawn, strict=True):
            # As a reader would: from the text, not from the ids that were drawn.
            text = loaded.tokenizer.decode(ids, skip_special_tokens=True)
            read = loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
            tests = [scheme] if owner is not None else schemes
            for test in tests:
                strangers = (root.user(carol), unrelated)
                results.append(examine(read, test, prompt, root, owner, strangers, users))
            report(len(results), None, "detecting and tracing")
    seconds = time.perf_counter() - started
    false = [result for result in results if result.wrong]
    if json:
        render.dump(
            {
                "model": model,
                "alpha": ALPHA,
                "users": users,
                "seconds": round(seconds, 1),
                "claims_hold": not false,
                "texts": [dataclasses.asdict(result) for result in results],
            }
        )
    else:
        show(results, users, seconds)
    raise typer.Exit(1 if false else 0)


def show(results: Sequence[Text], users: int, seconds: float) -> None:
    """Two tables and one line of verdict."""
    order = list(dict.fromkeys(result.scheme for result in results))
    for title, marked in (("Marked texts", True), ("Unmarked texts, tested for each mark", False)):
        render.stdout().print(Words(title, style="bold"))
        # The sort is stable: prompts and users stay in order within a scheme.
        rows = [result for result in results if (result.user is not None) == marked]
        render.stdout().print(grid(sorted(rows, key=lambda row: order.index(row.scheme))))
    false = [result for result in results if result.wrong]
    for row in false:
        where = f"{row.scheme.partition(':')[0]}, text {row.prompt + 1}, {row.user or 'unmarked'}"
        render.warn(f"{where}: {'; '.join(row.wrong)}")
    if false:
        render.fail(f"{len(false)} of {len(results)} rows are not as claimed")
        return
    render.stdout().print(
        f"All {len(results)} rows as claimed: every marked text was found with its key and traced "
        f"to its user among {users:,}; no wrong key and no unmarked text reached p = {ALPHA:g}. "
        f"{seconds:.0f} s."
    )


def grid(rows: Sequence[Text]) -> "Table":
    """Scheme, text, tokens, statistic, log10 p with the right key and the worst wrong one, user."""
    numbers = ("text", "tokens", "statistic", "log10 p", "wrong key")
    table = render.table("scheme", *numbers, "traced to", "", right=numbers)
    last = ""
    for row in rows:
        name = row.scheme.partition(":")[0]
        verdict = Words("false", style="red") if row.wrong else Words("ok", style="green")
        table.add_row(
            Words("" if name == last else name, style="bold"),
            str(row.prompt + 1),
            str(row.tokens),
            f"{row.statistic:,.{0 if row.statistic >= 1e4 else 1}f}",
            render.log10(row.log10_p),
            render.log10(row.log10_p_wrong_key),
            ", ".join(row.named) or "nobody",
            verdict,
        )
        last = name
    return table
