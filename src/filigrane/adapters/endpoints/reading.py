"""Reading mode over a network: the log-probabilities that an endpoint gives for a prompt's tokens.

    prompt_probabilities   the law after every token of a text, as far as the endpoint tells it
    read_endpoint          documents -> Readings, as `adapters.reading.read` makes them of a model

Two forms are about: `prompt_logprobs` (vLLM), and completions with `echo` and `logprobs` (others).
Which positions count is decided by `radioactivity.rules`; nothing here knows a key.

**The trap.** Servers add the prompt's own next token to what they list, however unlikely it is. In
a marked text that token is green by construction, so a law that lists it because the text goes on
with it is no law of the suspect, and a clean model tests positive. Here two tokens more are asked
for than are kept, and kept are those strictly above the (top + 1)-th largest probability: a rule
that yields the same whatever the text's next token is, with ties as well.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from filigrane.adapters.endpoints.answers import Unusable, choice_of, token_of
from filigrane.adapters.endpoints.client import Endpoint, Unanswered
from filigrane.adapters.endpoints.workers import in_order
from filigrane.contexts import as_token_ids
from filigrane.errors import EndpointError, VocabularyMismatch
from filigrane.radioactivity.evidence import Document, Reading
from filigrane.radioactivity.rules import read_positions, windows_of

Form = Literal["prompt_logprobs", "echo"]

Law: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]
"""Ids (j,) and their probabilities (j,), falling; of equal ones the lower id comes first."""

Report = Callable[[int, int | None, str], None]
"""Takes what is done, what there is to do (None if unknown) and a few words."""

NO_LAW = "no prediction of the endpoint there"
"""The rule under which positions stand in a ledger for which it gave none."""

_EXTRA = 2


def find_form(endpoint: Endpoint, tokens: npt.ArrayLike, top: int) -> Form:
    """How this endpoint tells the probabilities of a prompt's tokens; asks it about a few.

    Raises EndpointError if it tells none, with what it said.
    """
    few = as_token_ids(tokens)[:3]
    said = []
    for form in ("prompt_logprobs", "echo"):
        try:
            prompt_probabilities(endpoint, few, top, form=form)
            return form
        except Unanswered as error:
            said.append(f"{form}: {error}")
    raise EndpointError(
        f"this endpoint does not give {top + _EXTRA} log-probabilities of a prompt. If it allows "
        f"fewer, lower top to that less {_EXTRA}, or raise its limit (vLLM: --max-logprobs); if it "
        f"knows none, test its answers (closed mode). It said: {' '.join(said)}"
    )


def prompt_probabilities(
    endpoint: Endpoint,
    tokens: npt.ArrayLike,
    top: int,
    *,
    form: Form = "prompt_logprobs",
    vocabulary: Mapping[str, int] | None = None,
) -> list[Law | None]:
    """The laws after every token of a text: entry t is that of the token after tokens[: t + 1].

    tokens: (n,) ids of the endpoint's own tokenizer, sent as they are; top: how many ids each law
    lists at most (fewer where several tie for the last place). Servers limit it: vLLM's own limit
    is 20, for top = 18, and --max-logprobs raises it. vocabulary: ids by text (`token_strings`),
    for servers that name tokens so; what is not in it is left out. An entry is None where the
    endpoint gave nothing. The endpoint has to be one of completions.

    Raises Unanswered if it gives no such probabilities or wants fewer of them, else as
    Endpoint.ask; TokenError for no token ids.
    """
    ids = as_token_ids(tokens)
    if top < 1:
        raise ValueError(f"top must be at least 1; got {top}.")
    if endpoint.api != "completions":
        raise EndpointError(
            "log-probabilities of a prompt come from completions, not from chat; open the "
            "endpoint with api='completions'."
        )
    if ids.size == 0:
        return []
    asked = top + _EXTRA
    body: dict[str, Any] = {
        "prompt": ids.tolist(),
        "max_tokens": 1,
        "temperature": 0.0,
        "logprobs": asked,
        "return_tokens_as_token_ids": True,
    }
    body |= {"prompt_logprobs": asked} if form == "prompt_logprobs" else {"echo": True}

    def read(found: dict[str, Any], model: str) -> list[Law | None]:
        choice = choice_of(found)
        given = choice.get("logprobs")
        listed = given.get("top_logprobs") if isinstance(given, dict) else None
        listed = listed if isinstance(listed, list) else []
        if form == "prompt_logprobs":
            rows = choice.get("prompt_logprobs") or found.get("prompt_logprobs")
            if not isinstance(rows, list):
                raise Unusable("the answer holds no prompt_logprobs", tries=1)
            if len(rows) != ids.size:
                raise Unusable(
                    f"the answer holds {len(rows)} prompt_logprobs for {ids.size} tokens: the "
                    "endpoint has read something else than what was sent",
                    tries=1,
                )
            # The law after the last token is that of the one token which was generated.
            rows = [*rows[1:], listed[0] if listed else None]
        else:
            if len(listed) not in (ids.size, ids.size + 1):
                raise Unusable(
                    f"the answer lists {len(listed)} log-probabilities for {ids.size} echoed "
                    "tokens: the endpoint does not echo, or has read something else",
                    tries=1,
                )
            rows = [*listed, None][1 : ids.size + 1]
        laws = [_law(row, top, vocabulary) for row in rows]
        if all(law is None for law in laws):
            raise Unusable("the answer names no token of which the id is known", tries=1)
        return laws

    return endpoint.post(body, read)


def _law(row: object, top: int, vocabulary: Mapping[str, int] | None) -> Law | None:
    """What is kept of one position's list; None if that is nothing.

    Does not use what a server says of ranks: with ties it depends on the server.
    """
    if not isinstance(row, dict):
        return None
    found: dict[int, float] = {}
    values: list[float] = []
    for name, entry in row.items():
        # vLLM: {"17": {"logprob": -1.2, ...}}; elsewhere {" the": -1.2} or {"token_id:17": -1.2}.
        plain = not isinstance(entry, dict)
        value = entry if plain else entry.get("logprob")
        if not isinstance(value, int | float) or not value <= 1e-3:
            raise Unusable("a log-probability is not a number at or below 0", tries=1)
        values.append(value)
        token = token_of(name) if plain else int(name) if name.isdigit() else None
        if isinstance(token, str):
            token = None if vocabulary is None else vocabulary.get(token)
        if token is not None:
            found[token] = value
    if len(values) < top + _EXTRA:
        # With fewer the text's own next token could not be told from those of the law.
        raise Unusable(
            f"a position lists {len(values)} log-probabilities where {top + _EXTRA} were asked "
            f"for; lower top to at most {max(1, len(values) - 1 - _EXTRA)}",
            tries=1,
        )
    values.sort(reverse=True)
    least = values[top]
    kept = sorted((-value, token) for token, value in found.items() if value > least)
    if not kept:
        return None
    chances = np.exp(np.array([-value for value, _ in kept]))
    return np.array([token for _, token in kept], dtype=np.int64), np.minimum(chances, 1.0)


def token_strings(tokenizer: Any) -> dict[str, int]:
    """The ids of all tokens that a server can name by their text without mistake.

    tokenizer: one of transformers. Left out are parts of characters and texts that several tokens
    share: which of them a server means cannot be known.
    """
    # Behind another token, or some tokenizers would take the space off its beginning.
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = range(len(tokenizer))
    options = {"clean_up_tokenization_spaces": False}
    before = tokenizer.decode(anchor, **options)
    found: dict[str, int] = {}
    shared: set[str] = set()
    for token, text in zip(
        ids, tokenizer.batch_decode([[*anchor, token] for token in ids], **options), strict=True
    ):
        name = text.removeprefix(before)
        if not name or not text.startswith(before) or "\N{REPLACEMENT CHARACTER}" in name:
            continue
        if name in found:
            shared.add(name)
        found[name] = token
    return {name: token for name, token in found.items() if name not in shared}


def read_endpoint(
    endpoint: Endpoint,
    documents: Sequence[Document],
    width: int,
    *,
    vocab_size: int,
    base_endpoint: Endpoint | None = None,
    top: int = 18,
    form: Form | None = None,
    vocabulary: Mapping[str, int] | None = None,
    attention_rule: bool = True,
    first: int = 0,
    concurrency: int = 4,
    report: Report | None = None,
) -> Iterator[Reading]:
    """Read texts with a suspect behind an endpoint, and a presumed base model behind another.

    One Reading per document, in their order, so that a caller can store each and go on where it
    stopped: read_endpoint(endpoint, documents[n:], ..., first=n). width: tokens of a window;
    vocab_size: of the documents' ids, which have to be those of the endpoint's tokenizer. With a
    base, a position lists what either of the two laws lists; what one of them does not list counts
    as zero there. form, vocabulary, top: see `prompt_probabilities`; form None is found out, for
    the suspect and the base alike.

    Raises VocabularyMismatch if the endpoint names ids at or above vocab_size, otherwise what
    `prompt_probabilities` does, after the Readings of all documents that come before.
    """
    endpoints = [endpoint] if base_endpoint is None else [endpoint, base_endpoint]
    forms: list[Form] = []

    def one(item: tuple[int, Document]) -> Reading:
        number, document = item
        ids = as_token_ids(document.tokens, vocab_size)
        positions, ledger = read_positions(
            ids, document.start, width, earlier=document.earlier, attention_rule=attention_rule
        )
        laws: list[list[Law | None]] = []
        if positions.size:
            # Nothing after the last position that counts can change what comes before it.
            shown = ids[: positions[-1] + 1]
            laws = [
                prompt_probabilities(each, shown, top, form=how, vocabulary=vocabulary)
                for each, how in zip(endpoints, forms, strict=True)
            ]
        known = np.array([all(law[t] is not None for law in laws) for t in positions], dtype=bool)
        ledger[NO_LAW] = ledger.pop("scored") - int(known.sum())
        ledger["scored"] = int(known.sum())
        positions = positions[known]
        picked = [_pick([law[t] for law in laws], vocab_size) for t in positions]
        lengths = [tokens.shape[0] for tokens, _ in picked]
        chances = np.concatenate(
            [np.empty((len(endpoints), 0), dtype=np.float32), *(part for _, part in picked)], axis=1
        )
        return Reading(
            windows=windows_of(ids, width)[positions - (width - 1)],
            documents=np.full(positions.shape, number, dtype=np.int64),
            starts=np.cumsum([0, *lengths], dtype=np.int64),
            tokens=np.concatenate([np.empty(0, dtype=np.uint32), *(part for part, _ in picked)]),
            suspect=chances[0],
            base=None if base_endpoint is None else chances[1],
            vocab_size=vocab_size,
            ledger=ledger,
        )

    if not documents:
        return
    for each in endpoints:
        forms.append(form or find_form(each, documents[0].tokens, top))
    if report is not None:
        report(0, len(documents), "reading")
    for done, reading in enumerate(
        in_order(one, enumerate(documents, start=first), concurrency), start=1
    ):
        if report is not None:
            report(done, len(documents), "reading")
        yield reading


def _pick(
    laws: Sequence[Law | None], vocab_size: int
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.float32]]:
    """Ids (j,) of one position by falling P_B, and their probabilities (number of laws, j)."""
    given = [law for law in laws if law is not None]
    tokens = np.unique(np.concatenate([ids for ids, _ in given]))
    if tokens[-1] >= vocab_size:
        raise VocabularyMismatch(
            f"the endpoint names token id {tokens[-1]}, the documents' vocabulary has "
            f"{vocab_size}: its model has another tokenizer. Test its answers instead (closed "
            "mode), re-tokenised with the documents' tokenizer."
        )
    chances = np.zeros((len(given), tokens.shape[0]))
    for row, (ids, values) in enumerate(given):
        chances[row, np.searchsorted(tokens, ids)] = values
    # Stable: of equal probabilities the lowest id comes first, a rule that knows no key.
    order = np.argsort(-chances[0], kind="stable")
    return tokens[order].astype(np.uint32), chances[:, order].astype(np.float32)
