"""Write vectors/v1/keys.json, prf.json, contexts.json and schemes.json.

    python vectors/generate.py

keys.json is derived here with hmac and hashlib. The others come from filigrane's numpy reference
(`prf`, `contexts.scored_positions`, `Scheme.score`, `Scheme.reweight`), never from its compiled
kernels, and their tails from mpmath at 60 digits (the functions of generate_stats.py), never from
filigrane.stats. vectors/verify.py derives all of it again with neither.
"""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import generate_stats as tails
import numpy as np
from mpmath import mp, mpf

from filigrane import prf
from filigrane.contexts import Corpus, History, scored_positions
from filigrane.keys import Key, MarkingKey
from filigrane.schemes import Gumbel, Tournament, from_tag
from filigrane.schemes.base import Scheme

FOLDER = Path(__file__).parent / "v1"
WARNING = "The secrets are public: never mark with them."
MAX_ID = prf.MAX_TOKEN_ID


def lp(data: bytes) -> bytes:
    """The data with its length as 2 big-endian bytes before it."""
    return len(data).to_bytes(2, "big") + data


def expand(key: bytes, info: bytes, length: int = 32) -> bytes:
    """RFC 5869 HKDF-Expand with SHA-256, one block."""
    return hmac.digest(key, info + b"\x01", "sha256")[:length]


def hexes(words: Any) -> list[str]:
    """Words as 8 hex digits each."""
    return [f"{int(word):08x}" for word in words]


def sealed(inputs: dict[str, Any], results: dict[str, Any], **said: str) -> dict[str, Any]:
    """A case: what is said about it, inputs, results, and a hash that shows a mistyped input."""
    text = json.dumps(inputs, sort_keys=True, separators=(",", ":"))
    return {**said, **inputs, **results, "sha256": hashlib.sha256(text.encode()).hexdigest()}


def thirty(value: mpf) -> str:
    """30 significant digits, in one form."""
    return f"{Decimal(mp.nstr(value, 50)):.29e}" if value else "0"


# --- keys ------------------------------------------------------------------------------------

# (secret, name, slots, labels, user indices)
KEYS: list[tuple[bytes, str, int, list[str], list[int]]] = [
    (bytes(range(32)), "alpha", 8, ["gumbel/4", "greenlist/1", "é"], [0, 1, 255, 2**32 - 1]),
    (b"\xff" * 32, "Team_2.key@host-9", 1, ["tournament/4"], [0, 2**40, 2**64 - 1]),
    (hashlib.sha256(b"filigrane vectors").digest(), "z" * 64, 64, ["x" * 200], [123456789]),
]


def key_text(secret: bytes, name: str, slots: int) -> str:
    """The text form of a key."""
    head = b"filigrane/v1/key-text" + lp(name.encode()) + bytes([slots])
    body = base64.b32encode(secret + hashlib.sha256(head + secret).digest()[:4]).decode()
    return f"filigrane-key-1:{name}:{slots}:{body.rstrip('=').lower()}"


def key_case(
    secret: bytes, name: str, slots: int, labels: Sequence[str], indices: Sequence[int]
) -> dict[str, Any]:
    """One case of keys.json."""
    marks = []
    for label in labels:
        info = b"filigrane/v1/mark" + lp(label.encode())
        scheme = [expand(secret, info + bytes([slot])) for slot in range(slots)]
        info = b"filigrane/v1/users" + lp(label.encode())
        parents = [expand(secret, info + bytes([slot])) for slot in range(slots)]
        users = [
            {
                # A string: JSON readers that know only doubles would round an index of 64 bits.
                "index": str(index),
                "name": f"{name}/{index}",
                "keys": [
                    expand(parent, b"filigrane/v1/user" + index.to_bytes(8, "big")).hex()
                    for parent in parents
                ],
            }
            for index in indices
        ]
        marks.append({"label": label, "scheme_keys": [k.hex() for k in scheme], "users": users})
    return {
        "secret": secret.hex(),
        "name": name,
        "slots": slots,
        "text": key_text(secret, name, slots),
        "fingerprint": expand(secret, b"filigrane/v1/check", 8).hex(),
        "marks": marks,
    }


def keys_file() -> str:
    """The content of keys.json."""
    about = (
        f"Known answers for filigrane v1 keys. Each key is 32 bytes in hex. {WARNING} "
        "vectors/verify.py derives every value again."
    )
    content = {"about": about, "cases": [key_case(*case) for case in KEYS]}
    return json.dumps(content, indent=1, ensure_ascii=True) + "\n"


# --- the PRF ---------------------------------------------------------------------------------

COUNTING = bytes(range(32))

# (source, rounds, key, state words 12 to 15 as bytes, output bytes): not made here.
PUBLISHED = [
    (
        "RFC 8439, section 2.3.2",
        20,
        COUNTING.hex(),
        "01000000" + "000000090000004a00000000",
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e",
    ),
    (
        "draft-strombergsson-chacha-test-vectors, TC1, 256-bit key, 8 rounds",
        8,
        "00" * 32,
        "00" * 16,
        "3e00ef2f895f40d67f5bb8e81f09a5a12c840ec3ce9a7f3b181be188ef711a1e"
        "984ce172b9216f419f445367456d5619314a42a3da86b001387bfdb80e0cfe42",
    ),
]


def bytes_of(tag: str) -> bytes:
    """32 bytes that come from nowhere."""
    return hashlib.sha256(b"filigrane vectors/" + tag.encode()).digest()


def words(data: bytes) -> prf.Words:
    """Bytes as little-endian words."""
    return np.frombuffer(data, "<u4").astype(np.uint32)


def ids(tag: str, count: int, below: int) -> list[int]:
    """Token ids that come from nowhere."""
    stream = (bytes_of(f"{tag}/{i}") for i in range(count))
    return [int.from_bytes(data[:8], "big") % below for data in stream]


def prf_file() -> str:
    """The content of prf.json."""
    chacha = []
    for source, rounds, key, given, output in PUBLISHED:
        made = prf.chacha_block(words(bytes.fromhex(key)), words(bytes.fromhex(given)), rounds)
        assert made.astype("<u4").tobytes().hex() == output, source
        inputs = {"rounds": rounds, "key": key, "input": hexes(words(bytes.fromhex(given)))}
        chacha.append(sealed(inputs, {"output": hexes(made)}, source=source))
    for key_, given_ in (
        (COUNTING, b"\0" * 16),
        (COUNTING, b"\xff" * 16),
        (b"\xff" * 32, b"\xff" * 16),
        (bytes_of("key"), bytes_of("input")[:16]),
    ):
        made = prf.chacha_block(words(key_), words(given_))
        inputs = {"rounds": 8, "key": key_.hex(), "input": hexes(words(given_))}
        chacha.append(sealed(inputs, {"output": hexes(made)}, source="filigrane.prf"))
    contexts = [[0], [MAX_ID], [7], [1, 2], [2, 1], [0, 0, 0], [0, 0, 0, 0], [MAX_ID] * 4]
    contexts += [[1, 2, 3], [1, 2, 3, 4], [4, 3, 2, 1], [50256, 11, 262, 464]]
    contexts += [[1, 2, 3, 4, 5], [0] * 5, [0] * 8, list(range(8)), list(range(9)), [MAX_ID] * 9]
    contexts += [list(range(64)), ids("long", 64, MAX_ID + 1), ids("nine", 9, 152064)]
    contexts += [ids("four", 4, 152064), ids("one", 1, 152064), ids("three", 3, 152064)]
    block = []
    for number, context in enumerate(contexts):
        key_ = COUNTING if number % 3 == 0 else bytes_of(f"block/{number}")
        made = prf.block(words(key_), context)
        results = {"words": hexes(made), "seed": hexes(made[prf.FIELD])}
        results["coin"] = f"{made[prf.COIN]:08x}"
        block.append(sealed({"key": key_.hex(), "context": context}, results))
    tokens = [0, 1, 2, 3, 255, 256, 65535, 65536, 50256, 151935, 2**31 - 1, 2**31, MAX_ID]
    field = []
    for seed in (
        np.zeros(4, np.uint32),
        np.full(4, 0xFFFFFFFF, np.uint32),
        np.array([1, 0, 0, 0], np.uint32),
        np.array([0, 0, 0, 0x80000000], np.uint32),
        words(bytes_of("seed"))[:4],
        prf.block(words(COUNTING), [1, 2, 3, 4])[prf.FIELD],
    ):
        numbers = hexes(prf.field(seed, tokens))
        field.append(sealed({"seed": hexes(seed), "tokens": tokens}, {"numbers": numbers}))
    about = (
        "SPEC.md, section 2. Keys are 32 bytes in hex; words are numbers of 8 hex digits. chacha: "
        "the core, with published values first; block: key and context to 8 words; field: seed "
        f"and token to one word. {WARNING}"
    )
    return compact({"about": about, "chacha": chacha, "block": block, "field": field})


# --- contexts --------------------------------------------------------------------------------


def contexts_file() -> str:
    """The content of contexts.json."""
    cases: list[tuple[str, int, list[list[int]]]] = [
        ("all windows new: the first w tokens are not scored", 4, [[5, 6, 7, 8, 9, 10, 11]]),
        ("exactly one position", 4, [[1, 2, 3, 4, 5]]),
        ("as long as the window: too short", 4, [[1, 2, 3, 4]]),
        ("shorter", 4, [[1]]),
        ("empty", 1, [[]]),
        ("no text at all", 1, []),
        ("the same pair again and again", 1, [[1, 2, 1, 2, 1, 2, 1, 3]]),
        ("one token repeated: one window", 2, [[7] * 10]),
        ("a repeated passage counts once", 3, [[1, 2, 3, 4, 5, 1, 2, 3, 4, 6, 1, 2, 3, 9]]),
        ("the last window precedes nothing and is not used up", 2, [[1, 2], [1, 2, 3], [1, 2, 4]]),
        ("a corpus: seen in one text, dropped in the next", 2, [[1, 2, 3, 4], [9, 2, 3, 5, 1, 2]]),
        ("windows do not reach across a border", 2, [[1, 2], [3, 4], [5, 6, 7]]),
        ("order matters: the first text keeps its positions", 1, [[8, 1, 9], [1, 2], [8, 3, 8, 4]]),
        ("a text given twice counts once", 2, [[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]),
        ("short and empty texts among others", 3, [[], [1, 2], [1, 2, 3, 4], [1, 2, 3, 5, 6]]),
        ("extreme ids", 1, [[0, MAX_ID, 0, MAX_ID, 1, 0, 2]]),
        ("width beyond one chunk", 9, [list(range(12)) + list(range(12)) + [99]]),
        ("width 64", 64, [[i % 7 for i in range(150)]]),
        ("many repeats", 2, [ids("repeats", 120, 6)]),
        ("many repeats over texts", 1, [ids(f"corpus/{i}", 15, 12) for i in range(4)]),
    ]
    rows = []
    for about, width, texts in cases:
        claim = Corpus(texts)
        positions = scored_positions(claim, width).tolist()
        complete = sum(max(0, len(text) - width) for text in texts)
        results = {"n_tokens": sum(map(len, texts)), "positions": positions}
        results |= {"n_repeated": complete - len(positions), "too_short": not positions}
        rows.append(sealed({"width": width, "texts": texts}, results, about=about))
    about = (
        "SPEC.md, section 3: texts tested as one claim, and the positions (indices into all texts, "
        "concatenated) that are scored. Of the last text, these are the positions that a generator "
        "marks which was given the other texts as earlier ones."
    )
    return compact({"about": about, "cases": rows})


# --- schemes ---------------------------------------------------------------------------------

ONE = Key.from_text(key_text(bytes_of("one"), "vector-one", 1))
THREE = Key.from_text(key_text(bytes_of("three"), "vector-three", 3))


@cache
def bit_counts(n: int, weights: tuple[int, ...]) -> Any:
    """Outcomes of n positions at each sum, exact: (n * sum(weights) + 1,) of Python integers."""
    counts = np.zeros(n * sum(weights) + 1, dtype=object)
    counts[0] = 1
    reach = 0
    for weight in weights * n:
        counts[weight : reach + weight + 1] += counts[: reach + 1].copy()
        reach += weight
    return counts[::-1]


def tail(scheme: Scheme, total: Any, n: int) -> mpf:
    """log P(sum of n scores >= total) at 60 digits; total exact."""
    if scheme.name == "gumbel":
        return tails.gamma(total, n)
    if scheme.name == "greenlist":
        return tails.binomial(total, n, scheme.threshold / 2**32) if total > 0 else mpf(0)
    if isinstance(scheme, Tournament):
        if set(scheme.weights) == {1}:
            return tails.binomial(total, n * scheme.depth, 0.5) if total > 0 else mpf(0)
        counts = bit_counts(n, scheme.weights)
        return tails.bits_from_counts(total, n, scheme.weights, counts)
    return tails.irwin_hall_exact(total, n)


def exact_scores(
    scheme: Scheme, numbers: Sequence[int], coins: Sequence[int]
) -> tuple[list[Any], Any]:
    """Scores as the file holds them, and their exact total for `tail`."""
    n = 2**32
    if isinstance(scheme, Gumbel):
        logs = [-mp.log(mpf(r + 1) / n) for r in numbers]
        return [thirty(value) for value in logs], mp.fsum(logs)
    if scheme.name == "greenlist":
        green = [int(r < scheme.threshold) for r in numbers]
        return green, sum(green)
    if isinstance(scheme, Tournament):
        hits = [sum(w * (r >> i & 1) for i, w in enumerate(scheme.weights)) for r in numbers]
        return hits, sum(hits)
    if scheme.name == "gamma":
        return list(numbers), Fraction(sum(numbers), n)
    rest = [n - abs(r - c) for r, c in zip(numbers, coins, strict=True)]
    products = [d * (d - 1) for d in rest]
    return [str(value) for value in products], Fraction(sum(products), n * n)


def slot_tails(
    holder: MarkingKey, scheme: Scheme, texts: list[list[int]]
) -> tuple[int, list[dict[str, Any]], list[mpf]]:
    """Number of scored positions, and what every slot finds there, with its log p."""
    claim = Corpus(texts)
    joined = np.array([token for text in texts for token in text], dtype=np.uint32)
    width = scheme.context_width
    at = scored_positions(claim, width)
    windows = joined[at[:, None] + np.arange(-width, 0)]
    slots: list[dict[str, Any]] = []
    logs = []
    for words_ in holder.prf_keys(scheme.label):
        blocks = prf.block(words_, windows)
        numbers = prf.field(blocks[:, prf.FIELD], joined[at]).tolist()
        coins = blocks[:, prf.COIN].tolist()
        scores, total = exact_scores(scheme, numbers, coins)
        reference = scheme.score(blocks, joined[at])
        logs.append(tail(scheme, total, len(numbers)))
        # The library's doubles and the exact values of this file are the same numbers.
        assert abs(float(total) - reference.sum()) <= 1e-12 * abs(reference.sum())
        assert abs(scheme.log_sf(float(reference.sum()), len(numbers)) - logs[-1]) <= 1e-11 * abs(
            logs[-1]
        )
        slot: dict[str, Any] = {"numbers": hexes(numbers)}
        if scheme.name == "delta":
            slot["coins"] = hexes(coins)
        slot["scores"] = scores
        slot["total"] = (
            thirty(total) if scheme.name == "gumbel" else sum(int(score) for score in scores)
        )
        if scheme.name == "delta":
            slot["total"] = str(slot["total"])
        slots.append({**slot, "log_p": thirty(logs[-1])})
    return len(at), slots, logs


def detect_case(
    about: str, key: Key, user: int | None, scheme: Scheme, texts: list[list[int]]
) -> dict[str, Any]:
    """A text or corpus tested under every slot of a key."""
    holder: MarkingKey = key if user is None else key.user(user)
    n_scored, slots, logs = slot_tails(holder, scheme, texts)
    best = logs.index(min(logs))
    complete = sum(max(0, len(text) - scheme.context_width) for text in texts)
    inputs = {
        "key": key.export_text(),
        "user": None if user is None else str(user),
        "scheme": scheme.tag,
        "texts": texts,
    }
    results = {
        "label": scheme.label,
        "n_scored": n_scored,
        "n_repeated": complete - n_scored,
        "slots": slots,
        "slot": best,
        "log_p": thirty(sidak(logs[best], len(logs))),
    }
    return sealed(inputs, results, about=about)


def sidak(log_p: mpf, k: int) -> mpf:
    """log(1 - (1 - p)**k)."""
    return mpf(0) if log_p == 0 else tails.log1mexp(k * tails.log1mexp(log_p))


def logits(vocab_size: int, position: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """The test generator's logits: 20 bits of an integer rule over 2**16, exact in float32."""
    words_ = [(i * 2654435761 + position * 2246822519) % 2**32 >> 12 for i in range(vocab_size)]
    return (np.array(words_) / 65536).astype(np.float32)


def write(
    key_words: prf.Words,
    scheme: Scheme,
    length: int,
    vocab_size: int,
    temperature: float,
    top_k: int,
    seed: int,
) -> tuple[list[int], list[bool]]:
    """A marked text from `logits` by the numpy reference, and where it is marked."""
    rng = np.random.default_rng(seed)
    history = History(scheme.context_width)
    tokens: list[int] = []
    marked = []
    for position in range(length):
        window = history.window() if history.fresh() else None
        marked.append(window is not None)
        row = logits(vocab_size, position).astype(np.float64)
        if window is None:
            token = int(rng.integers(vocab_size))
        else:
            block = prf.block(key_words, window)
            if scheme.name == "greenlist":
                row = row + scheme.delta * scheme.is_green(block, np.arange(vocab_size))
            if temperature == 0:
                token = sure(row, 1e-3)
            else:
                weights = np.exp((row - row.max()) / temperature)
                if top_k:
                    weights[row < np.sort(row)[-top_k]] = 0.0
                probs = weights / weights.sum()
                law = probs if scheme.name == "greenlist" else scheme.reweight(probs, block)
                token = int(rng.choice(vocab_size, p=law / law.sum()))
                check_margin(scheme, probs, block)
        tokens.append(token)
        history.push(token)
    return tokens, marked


def sure(values: np.ndarray[Any, np.dtype[np.float64]], margin: float) -> int:
    """The argmax, which must not hang on rounding."""
    order = np.argsort(-values)
    assert values[order[0]] - values[order[1]] > margin
    return int(order[0])


def check_margin(scheme: Scheme, probs: Any, block: prf.Words) -> None:
    """Refuse a case whose outcome hangs on the rounding of doubles."""
    numbers = prf.field(block[prf.FIELD], np.arange(probs.shape[-1]))
    if scheme.name == "gumbel":
        with np.errstate(divide="ignore"):
            sure(np.log(probs) - np.log(-np.log1p(-prf.open_uniform(numbers))), 1e-4)
    elif scheme.name == "delta":
        cumulative = np.cumsum(probs[np.argsort(numbers)])
        assert np.abs(cumulative - prf.open_uniform(block[prf.COIN])).min() > 1e-6


def generate_case(
    about: str,
    key: Key,
    user: int | None,
    tag: str,
    vocab_size: int,
    length: int,
    temperature: str = "1",
    top_k: int = 0,
) -> dict[str, Any]:
    """A text of a deterministic scheme, slot 0; unmarked positions are forced."""
    scheme = from_tag(tag)
    holder: MarkingKey = key if user is None else key.user(user)
    tokens, marked = write(
        holder.prf_keys(scheme.label)[0],
        scheme,
        length,
        vocab_size,
        float(temperature),
        top_k,
        seed=7,
    )
    forced = {str(t): tokens[t] for t in range(length) if not marked[t]}
    inputs = {
        "key": key.export_text(),
        "user": None if user is None else str(user),
        "scheme": scheme.tag,
        "vocab_size": vocab_size,
        "length": length,
        "temperature": temperature,
        "top_k": top_k,
        "forced": forced,
    }
    results = {"tokens": tokens, "marked": [int(mark) for mark in marked]}
    return sealed(inputs, results, about=about)


def law_case(tag: str, weights: list[int], block: prf.Words) -> dict[str, Any]:
    """The marked law of a small vocabulary, at 60 digits, checked against `Scheme.reweight`."""
    scheme = from_tag(tag)
    probs = [mpf(w) / sum(weights) for w in weights]
    numbers = prf.field(block[prf.FIELD], np.arange(len(weights))).tolist()
    reference = scheme.reweight(np.array([float(p) for p in probs]), block)
    check_margin(scheme, np.array([float(p) for p in probs]), block)
    if scheme.deterministic:
        law = [mpf(round(value)) for value in reference]
    elif scheme.name == "greenlist":
        law = [
            p * mp.exp(scheme.delta * (r < scheme.threshold))
            for p, r in zip(probs, numbers, strict=True)
        ]
        law = [p / mp.fsum(law) for p in law]
    elif isinstance(scheme, Tournament):
        law = probs
        for layer in range(scheme.depth):
            ones = mp.fsum(p for p, r in zip(law, numbers, strict=True) if r >> layer & 1)
            law = [p * (1 + (r >> layer & 1) - ones) for p, r in zip(law, numbers, strict=True)]
    else:
        # In fractions: the part of [F - p, F] that lies above one half, twice.
        law = []
        for p, r in zip(weights, numbers, strict=True):
            below = Fraction(
                sum(w for w, s in zip(weights, numbers, strict=True) if s < r), sum(weights)
            )
            above = below + Fraction(p, sum(weights))
            part = 2 * max(Fraction(0), above - max(below, Fraction(1, 2)))
            law.append(mpf(part.numerator) / part.denominator)
    assert np.abs(np.array([float(p) for p in law]) - reference).max() < 1e-12
    inputs = {"scheme": scheme.tag, "weights": weights, "block": hexes(block)}
    return sealed(inputs, {"law": [f"{Decimal(mp.nstr(p, 50)).copy_abs():.30f}" for p in law]})


def trace_case(about: str, scheme: Scheme, users: int, texts: list[list[int]]) -> dict[str, Any]:
    """All users of a key tested on one text: Holm-Sidak over users and slots."""
    best = sorted((min(slot_tails(THREE.user(u), scheme, texts)[2]), u) for u in range(users))
    values: list[mpf] = []
    for rank, (log_p, _) in enumerate(best):
        value = sidak(log_p, (users - rank) * THREE.slots)
        values.append(max(value, values[-1]) if values else value)
    inputs = {"key": THREE.export_text(), "users": users, "scheme": scheme.tag, "texts": texts}
    results = {"order": [user for _, user in best], "log_ps": [thirty(value) for value in values]}
    return sealed(inputs, results, about=about)


TAGS = {
    # tag: tokens of its texts; the exact law of weighted bits limits the tournament's
    "gumbel": 60,
    "gumbel:context_width=1": 60,
    "gumbel:context_width=9": 40,
    "greenlist": 60,
    "greenlist:context_width=2,gamma=0.1,delta=3.5": 60,
    "tournament": 22,
    "tournament:scoring=mean": 60,
    "tournament:context_width=1,depth=32": 18,
    "tournament:depth=1": 40,
    "gamma": 60,
    "gamma:context_width=3": 40,
    "delta": 60,
    "delta:context_width=5": 40,
}


def schemes_file() -> str:
    """The content of schemes.json."""
    detect = []
    for number, (tag, length) in enumerate(TAGS.items()):
        scheme = from_tag(tag)
        own = THREE.user(number).prf_keys(scheme.label)[number % 3]
        text, _ = write(own, scheme, length, 40, 1.0, 0, seed=number)
        plain = ids(f"plain/{tag}", length - 10, 152064)
        detect.append(detect_case("marked for this user", THREE, number, scheme, [text]))
        detect.append(detect_case("the same text, the root key", THREE, None, scheme, [text]))
        detect.append(detect_case("never marked", ONE, None, scheme, [plain]))
    for tag, length in (("gumbel:context_width=2", 14), ("gamma:context_width=1", 10)):
        scheme = from_tag(tag)
        own = ONE.prf_keys(scheme.label)[0]
        texts = [write(own, scheme, length, 12, 1.0, 0, seed=i)[0] for i in range(4)]
        detect.append(detect_case("a corpus with repeats", ONE, None, scheme, texts))
        one = [plain[: scheme.context_width + 1]]
        detect.append(detect_case("a single position", ONE, None, scheme, one))
    extreme = [[0, MAX_ID, 0, 1, MAX_ID, MAX_ID, 2**31, 0, 0, 7]]
    detect.append(detect_case("extreme ids", ONE, None, from_tag("delta"), extreme))
    trace = []
    for tag, user in (("gumbel", 4), ("greenlist:context_width=2", 0)):
        scheme = from_tag(tag)
        own = THREE.user(user).prf_keys(scheme.label)[1]
        text, _ = write(own, scheme, 30, 40, 1.0, 0, seed=1)
        trace.append(trace_case(f"written for user {user}", scheme, 6, [text]))
        nobody = ids(f"nobody/{tag}", 30, 152064)
        trace.append(trace_case("written for nobody", scheme, 6, [nobody]))
    laws = []
    for tag in (*TAGS, "tournament:depth=2", "greenlist:gamma=0.5,delta=1.0"):
        for turn, weights in enumerate(([1, 2, 3, 4, 5, 6, 7, 8], [90, 1, 1, 0, 5, 3])):
            if 0 in weights and tag.startswith("gumbel"):
                weights = [weight + 1 for weight in weights]
            laws.append(law_case(tag, weights, words(bytes_of(f"law/{tag}/{turn}"))))
    make: Callable[..., dict[str, Any]] = generate_case
    generate = [
        make("plain sampling", ONE, None, "gumbel", 50, 40),
        make("repeats stay unmarked", ONE, None, "gumbel:context_width=1", 13, 60),
        make("temperature, top-k", THREE, 2**64 - 1, "gumbel", 300, 30, "0.5", 20),
        make("plain sampling", ONE, None, "delta", 50, 40),
        make("repeats stay unmarked", ONE, None, "delta:context_width=1", 13, 60),
        make("temperature, top-k", THREE, 2**64 - 1, "delta", 300, 30, "0.5", 20),
        make("greedy", ONE, None, "greenlist", 50, 40, "0"),
        make("greedy, repeats", ONE, None, "greenlist:context_width=1,delta=6.0", 13, 60, "0"),
    ]
    about = (
        "SPEC.md, sections 4 and 5. detect: texts under every slot of a key: the keyed numbers of "
        "the scored positions, their scores (gumbel: 30 digits; gamma: in units of 2**-32; delta: "
        "in units of 2**-64), total and log p, then the best slot and its Sidak-corrected log p. "
        "trace: users by their smallest p, Holm-Sidak adjusted. laws: p(token i) = weights[i] / "
        "sum, and the marked law. generate: logit of token i at position t is "
        "((i * 2654435761 + t * 2246822519) mod 2**32 >> 12) / 2**16; positions in `forced` are "
        f"told, not drawn; slot 0. Results have 30 digits. {WARNING}"
    )
    sections = {"detect": detect, "trace": trace, "laws": laws, "generate": generate}
    return compact({"about": about, **sections})


def compact(content: dict[str, Any]) -> str:
    """JSON, one case a line."""
    parts = []
    for name, value in content.items():
        if isinstance(value, str):
            parts.append(f"{json.dumps(name)}: {json.dumps(value)}")
        else:
            lines = ",\n".join(json.dumps(row) for row in value)
            parts.append(f"{json.dumps(name)}: [\n{lines}\n]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


FILES = {
    "keys.json": keys_file,
    "prf.json": prf_file,
    "contexts.json": contexts_file,
    "schemes.json": schemes_file,
}


def main() -> None:
    """Write all files."""
    for name, content in FILES.items():
        (FOLDER / name).write_text(content(), encoding="utf-8")


if __name__ == "__main__":
    main()
