"""Re-derive every value of the golden vectors with Python's standard library only.

    python -I -S vectors/verify.py              all files of vectors/v1
    python -I -S vectors/verify.py FILE ...     these copies of them

One line per file; the exit status is 1 if anything differs, 2 if a file cannot be read. Nothing
here imports filigrane: this is a second implementation of SPEC.md, made for reading, in integers,
fractions and decimals. PROVENANCE.md says which code made the files.
"""

import base64
import hashlib
import hmac
import json
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "v1"
MASK = 0xFFFFFFFF
TWO32 = 1 << 32
DIGITS = 120  # of every decimal; results are kept to 30


# --- bytes and words -------------------------------------------------------------------------


def lp(data: bytes) -> bytes:
    """The data with its length as 2 big-endian bytes before it."""
    return len(data).to_bytes(2, "big") + data


def expand(key: bytes, info: bytes, length: int = 32) -> bytes:
    """RFC 5869 HKDF-Expand with SHA-256 for up to 32 bytes: the first block is all of it."""
    return hmac.new(key, info + b"\x01", hashlib.sha256).digest()[:length]


def words_of(data: bytes) -> list[int]:
    """Bytes as little-endian 32-bit words."""
    return [int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4)]


def as_hex(words: Iterable[int]) -> list[str]:
    """Words as 8 hex digits each, as the files hold them."""
    return [f"{word:08x}" for word in words]


# --- keys ------------------------------------------------------------------------------------


def key_text(secret: bytes, name: str, slots: int) -> str:
    """The text form of a key."""
    head = b"filigrane/v1/key-text" + lp(name.encode()) + bytes([slots])
    body = base64.b32encode(secret + hashlib.sha256(head + secret).digest()[:4]).decode()
    return f"filigrane-key-1:{name}:{slots}:{body.rstrip('=').lower()}"


def parse_key(text: str) -> tuple[bytes, str, int]:
    """Secret, name and slots of a key's text, which must be the text they have."""
    _, name, slots, body = text.split(":")
    secret = base64.b32decode(body.upper() + "======")[:32]
    if key_text(secret, name, int(slots)) != text:
        raise ValueError(f"the checksum of key {name!r} does not fit")
    return secret, name, int(slots)


def scheme_key(secret: bytes, label: str, slot: int) -> bytes:
    """The key of one slot of a root key."""
    return expand(secret, b"filigrane/v1/mark" + lp(label.encode()) + bytes([slot]))


def users_parent(secret: bytes, label: str, slot: int) -> bytes:
    """What the user keys of one slot are derived from."""
    return expand(secret, b"filigrane/v1/users" + lp(label.encode()) + bytes([slot]))


def user_key(parent: bytes, index: int) -> bytes:
    """The key of one user, from the parent of the same slot."""
    return expand(parent, b"filigrane/v1/user" + index.to_bytes(8, "big"))


def marking_keys(text: str, user: str | None, label: str) -> list[bytes]:
    """The keys of all slots, for a root key (user None) or one of its users."""
    secret, _, slots = parse_key(text)
    if user is None:
        return [scheme_key(secret, label, slot) for slot in range(slots)]
    return [user_key(users_parent(secret, label, slot), int(user)) for slot in range(slots)]


def derive(
    secret: bytes, name: str, slots: int, labels: Sequence[str], indices: Sequence[int]
) -> dict[str, Any]:
    """One case of keys.json, all from its arguments."""
    marks = []
    for label in labels:
        scheme = [scheme_key(secret, label, slot) for slot in range(slots)]
        parents = [users_parent(secret, label, slot) for slot in range(slots)]
        users = [
            {
                # A string: JSON readers that know only doubles would round an index of 64 bits.
                "index": str(index),
                "name": f"{name}/{index}",
                "keys": [user_key(parent, index).hex() for parent in parents],
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


# --- keys of a provider ------------------------------------------------------------------------


def version_case(case: dict[str, Any]) -> dict[str, Any]:
    """A case of custody.json, `versions`."""
    root = bytes.fromhex(case["root"])
    tenant = hmac.new(root, b"filigrane/v1/tenant" + lp(case["tenant"].encode()), "sha256").digest()
    info = b"filigrane/v1/tenant-key"
    for field_name in ("name", "model", "tokenizer", "mark"):
        info += lp(case[field_name].encode())
    info += case["version"].to_bytes(4, "big") + bytes.fromhex(case["salt"])
    secret = expand(tenant, info)
    return {
        "tenant_secret": tenant.hex(),
        "secret": secret.hex(),
        "id": "{tenant}.{name}@{version}".format_map(case),
        "commitment": expand(secret, b"filigrane/v1/commitment").hex(),
        "fingerprint": expand(secret, b"filigrane/v1/check", 8).hex(),
    }


def imported_case(case: dict[str, Any]) -> dict[str, Any]:
    """A case of custody.json, `imported`."""
    key = lp(case["key"].encode())
    data = b"filigrane/v1/imported-commitment" + bytes.fromhex(case["opening"]) + key
    return {"commitment": hashlib.sha256(data).hexdigest()}


def content_case(case: dict[str, Any]) -> dict[str, Any]:
    """A case of custody.json, `content`."""
    key = expand(bytes.fromhex(case["tenant_secret"]), b"filigrane/v1/content")
    return {
        "content_hash": hmac.new(key, bytes.fromhex(case["content_sha256"]), "sha256").hexdigest()
    }


def tree(leaves: Sequence[bytes]) -> bytes:
    """The root of a Merkle tree, RFC 6962: level by level, an odd one moves up as it is."""
    level = [hashlib.sha256(b"\0" + leaf).digest() for leaf in leaves]
    while len(level) > 1:
        pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
        level = [hashlib.sha256(b"\1" + b"".join(p)).digest() if p[1:] else p[0] for p in pairs]
    return level[0] if level else hashlib.sha256().digest()


def log_case(case: dict[str, Any]) -> dict[str, Any]:
    """A case of custody.json, `logs`."""
    chain = [hashlib.sha256(b"filigrane/v1/audit/genesis" + lp(case["tenant"].encode())).digest()]
    for record in case["records"]:
        line = json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        data = b"filigrane/v1/audit/record" + chain[-1] + line.encode("utf-8")
        chain.append(hashlib.sha256(data).digest())
    root = base64.b64encode(tree(chain[1:])).decode()
    where = f"filigrane/{case['tenant']}\n{len(case['records'])}\n{root}\n"
    secret = bytes.fromhex(case["root"])
    return {
        "hashes": [value.hex() for value in chain[1:]],
        "checkpoint": f"{where}head {chain[-1].hex()}\nat {case['at']}\n",
        "seed": hmac.new(secret, b"filigrane/v1/sign/log", "sha256").hexdigest(),
    }


# --- the PRF ---------------------------------------------------------------------------------


def rotate(word: int, n: int) -> int:
    """A 32-bit word rotated left."""
    return ((word << n) | (word >> (32 - n))) & MASK


def quarter_round(x: list[int], a: int, b: int, c: int, d: int) -> None:
    """RFC 8439, section 2.1, on four words of the state."""
    x[a] = (x[a] + x[b]) & MASK
    x[d] = rotate(x[d] ^ x[a], 16)
    x[c] = (x[c] + x[d]) & MASK
    x[b] = rotate(x[b] ^ x[c], 12)
    x[a] = (x[a] + x[b]) & MASK
    x[d] = rotate(x[d] ^ x[a], 8)
    x[c] = (x[c] + x[d]) & MASK
    x[b] = rotate(x[b] ^ x[c], 7)


def chacha(key: Sequence[int], inputs: Sequence[int], rounds: int) -> list[int]:
    """RFC 8439, section 2.3, with another number of rounds: 8 key words, 4 input words -> 16."""
    start = [*words_of(b"expand 32-byte k"), *key, *inputs]
    x = list(start)
    for _ in range(rounds // 2):
        for i in range(4):
            quarter_round(x, i, 4 + i, 8 + i, 12 + i)
        for i in range(4):
            quarter_round(x, i, 4 + (i + 1) % 4, 8 + (i + 2) % 4, 12 + (i + 3) % 4)
    return [(a + b) & MASK for a, b in zip(x, start, strict=True)]


def block(key: bytes, context: Sequence[int]) -> list[int]:
    """The 8 words of a context; seeds of the field are words 0 to 3, the coin is word 4."""
    if not all(0 <= token < MASK for token in context):
        raise ValueError("a token id is out of range")
    padded = list(context) + [MASK] * (-len(context) % 4)
    state = words_of(key)
    for i in range(0, len(padded), 4):
        state = chacha(state, padded[i : i + 4], 8)[:8]
    return state


def field(seed: Sequence[int], token: int) -> int:
    """The keyed number of a token."""
    h = (token + seed[0]) & MASK
    h = ((h ^ (h >> 17)) * 0xED5AD4BB & MASK) ^ seed[1]
    h = ((h ^ (h >> 11)) * 0xAC4C1B51 & MASK) ^ seed[2]
    h = ((h ^ (h >> 15)) * 0x31848BAB & MASK) ^ seed[3]
    return h ^ (h >> 14)


# --- contexts --------------------------------------------------------------------------------


def scored(texts: Sequence[Sequence[int]], width: int) -> tuple[list[tuple[int, int]], int]:
    """(text, position) of all scored positions, and how many were dropped as repeated."""
    seen: set[tuple[int, ...]] = set()
    found = []
    repeated = 0
    for number, text in enumerate(texts):
        for t in range(width, len(text)):
            window = tuple(text[t - width : t])
            if window in seen:
                repeated += 1
            else:
                seen.add(window)
                found.append((number, t))
    return found, repeated


def seal(inputs: dict[str, Any]) -> str:
    """SHA-256 of a case's inputs: a mistyped one shows even where it would change no result."""
    return hashlib.sha256(
        json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


# --- decimals --------------------------------------------------------------------------------


def thirty(value: Decimal) -> str:
    """30 significant digits."""
    return f"{value:.29e}" if value else "0"


def ln1p(x: Decimal) -> Decimal:
    """log(1 + x) without cancellation."""
    if abs(x) < Decimal("1e-20"):
        return sum(((-1) ** (k + 1) * x**k / k for k in range(1, 5)), Decimal(0))
    return (1 + x).ln()


def expm1(x: Decimal) -> Decimal:
    """exp(x) - 1 without cancellation."""
    if abs(x) < Decimal("1e-20"):
        return sum((x**k / math.factorial(k) for k in range(1, 5)), Decimal(0))
    return x.exp() - 1


def log1mexp(x: Decimal) -> Decimal:
    """log(1 - exp(x)), x <= 0."""
    if x == 0:
        return Decimal("-Infinity")
    return (-expm1(x)).ln() if x > -1 else ln1p(-x.exp())


def ln_ratio(numerator: int, denominator: int) -> Decimal:
    """log of the quotient of two positive integers of any size."""
    # The top 500 bits are more than DIGITS digits; decimals of millions of bits would be slow.
    ln = Decimal(0)
    for sign, number in ((1, numerator), (-1, denominator)):
        shift = max(0, number.bit_length() - 500)
        ln += sign * (Decimal(number >> shift).ln() + shift * Decimal(2).ln())
    return ln


def ln_tail(ways: int, everything: int) -> Decimal:
    """log(ways / everything), from the complement when that is the smaller."""
    if 2 * ways <= everything:
        return ln_ratio(ways, everything)
    rest = everything - ways
    return ln1p(-ln_ratio(rest, everything).exp()) if rest else Decimal(0)


# --- laws ------------------------------------------------------------------------------------


@cache
def ln_factorial(n: int) -> Decimal:
    """log n!, by Stirling's series for large n (DLMF 5.11.1)."""
    if n < 1000:
        return Decimal(math.factorial(n)).ln()
    bernoulli = [Fraction(1)]
    for m in range(1, 43):
        terms = (math.comb(m + 1, j) * bernoulli[j] for j in range(m))
        bernoulli.append(-sum(terms, Fraction(0)) / (m + 1))
    x = Decimal(n)
    total = x * x.ln() - x + (2 * pi() * x).ln() / 2
    for k in range(1, 22):
        b = bernoulli[2 * k] / (2 * k * (2 * k - 1))
        total += Decimal(b.numerator) / b.denominator / x ** (2 * k - 1)
    return total


@cache
def pi() -> Decimal:
    """Machin 1706."""

    def arctan(inverse: int) -> Decimal:
        terms = (
            Decimal((-1) ** k) / ((2 * k + 1) * inverse ** (2 * k + 1)) for k in range(2 * DIGITS)
        )
        return sum(terms, Decimal(0))

    return 4 * (4 * arctan(5) - arctan(239))


def series(first: Decimal, ratio: Callable[[int], Decimal]) -> Decimal:
    """log of exp(first) (1 + r_0 + r_0 r_1 + ...), terms positive and falling."""
    total = term = Decimal(1)
    step = 0
    while term > total * Decimal("1e-60"):
        term *= ratio(step)
        total += term
        step += 1
    return first + total.ln()


def binomial_tail(k: int, n: int, p: Fraction) -> Decimal:
    """log P(Bin(n, p) >= k)."""
    if k <= 0:
        return Decimal(0)
    if n <= 2000 and p.denominator <= TWO32:
        hit, all_ = p.numerator, p.denominator
        ways = sum(math.comb(n, j) * hit**j * (all_ - hit) ** (n - j) for j in range(k, n + 1))
        return ln_tail(ways, all_**n)
    upper = k > n * p
    if not upper:
        k, p = n - k + 1, 1 - p
    ln_p, ln_q = ln_ratio(p.numerator, p.denominator), Decimal(0)
    if p < 1:
        rest = 1 - p
        ln_q = (
            ln_ratio(rest.numerator, rest.denominator)
            if rest < Fraction(1, 2)
            else ln1p(-Decimal(p.numerator) / p.denominator)
        )
    first = ln_factorial(n) - ln_factorial(k) - ln_factorial(n - k) + k * ln_p + (n - k) * ln_q
    odds = (ln_p - ln_q).exp()
    tail = series(first, lambda j: odds * (n - k - j) / (k + 1 + j))
    return tail if upper else log1mexp(tail)


def gamma_tail(s: Decimal, n: int) -> Decimal:
    """log P(Gamma(n, 1) >= s) = log P(Poisson(s) <= n - 1)."""
    if s <= 0:
        return Decimal(0)
    if s > n:
        first = -s + (n - 1) * s.ln() - ln_factorial(n - 1)
        return series(first, lambda j: (n - 1 - j) / s)
    first = -s + n * s.ln() - ln_factorial(n)
    return log1mexp(series(first, lambda j: s / (n + 1 + j)))


def two_gammas_tail(s: Decimal, n: int, share: Decimal) -> Decimal:
    """log P(share A + (1 - share) B >= s), both Gamma(n, 1), s > 0.

    In units of the smaller scale it is Gamma(2n + K, 1), where K counts failures before n successes
    of probability smaller/larger.
    """
    smaller, larger = sorted((share, 1 - share))
    hit = smaller / larger
    x = s / smaller
    poisson = (-x).exp()
    tail = Decimal(0)
    for j in range(2 * n):
        tail += poisson
        poisson *= x / (j + 1)
    weight, total, k = hit**n, Decimal(0), 0
    while True:
        term = weight * tail
        total += term
        if k > n / hit and term < total * Decimal("1e-100"):
            break
        tail += poisson
        poisson *= x / (2 * n + k + 1)
        weight *= (1 - hit) * (n + k) / (k + 1)
        k += 1
    return total.ln() if s > n else ln1p(-(1 - total))


def irwin_hall_tail(s: Fraction, n: int) -> Decimal:
    """log P(U_1 + ... + U_n >= s), by the alternating sum in integers."""
    if s <= 0:
        return Decimal(0)
    upper = 2 * s >= n
    x = n - s if upper else s
    top, unit = x.numerator, x.denominator
    ways = sum((-1) ** j * math.comb(n, j) * (top - j * unit) ** n for j in range(top // unit + 1))
    everything = math.factorial(n) * unit**n
    return ln_tail(ways if upper else everything - ways, everything)


def irwin_hall_corner(s: Fraction, n: int) -> Decimal:
    """The same for long sums near an end, where few terms count and little cancels."""
    upper = 2 * s >= n
    x = n - s if upper else s
    top = Decimal(x.numerator) / x.denominator
    total = term = Decimal(1)
    j = 0
    while j + 1 < x and term > Decimal("1e-60"):
        j += 1
        ln_choose = ln_factorial(n) - ln_factorial(j) - ln_factorial(n - j)
        term = (ln_choose + n * (1 - j / top).ln()).exp()
        total += (-1) ** j * term
    tail = n * top.ln() - ln_factorial(n) + total.ln()
    return tail if upper else log1mexp(tail)


@cache
def packed_counts(n: int, weights: tuple[int, ...]) -> tuple[int, int]:
    """prod_l (1 + x**w_l)**n as one integer, x = 2**width; the coefficients are its digits."""
    width = n * len(weights) + 1
    packed = 1
    for _ in range(n):
        for weight in weights:
            packed += packed << (weight * width)
    return packed, width


def bits_tail(total: int, n: int, weights: tuple[int, ...]) -> Decimal:
    """log P(sum_l w_l B_l >= total), B_l ~ Bin(n, 1/2), by counting all outcomes."""
    if total <= 0:
        return Decimal(0)
    if set(weights) == {1}:
        return binomial_tail(total, n * len(weights), Fraction(1, 2))
    packed, width = packed_counts(n, weights)
    # The sum of the digits of a number to a base is its remainder modulo the base less one.
    ways = (packed >> (total * width)) % ((1 << width) - 1)
    return ln_tail(ways, 1 << (n * len(weights)))


def top_bits_tail(deficit: int, n: int, weights: tuple[int, ...]) -> Decimal:
    """The same at `deficit` below the largest sum: the few ways to miss so little, counted."""
    size = deficit + 1
    width = 64 + (deficit // min(weights) + 1) * (n * len(weights)).bit_length()
    packed = 1
    for weight in weights:
        factor = 0
        for i in range(deficit // weight, -1, -1):
            factor = (factor << (weight * width)) + (math.comb(n, i) if i <= n else 0)
        packed = packed * factor & ((1 << (size * width)) - 1)
    return ln_ratio(packed % ((1 << width) - 1), 1 << (n * len(weights)))


def sidak(log_p: Decimal, k: int) -> Decimal:
    """log(1 - (1 - p)**k)."""
    return log1mexp(k * log1mexp(log_p)) if log_p < 0 else Decimal(0)


# --- schemes ---------------------------------------------------------------------------------

DEFAULTS: dict[str, dict[str, Any]] = {
    "gumbel": {"context_width": 4},
    "greenlist": {"context_width": 4, "gamma": 0.25, "delta": 2.0},
    "tournament": {"context_width": 4, "depth": 30, "scoring": "weighted"},
    "gamma": {"context_width": 4},
    "delta": {"context_width": 4},
}


class Scheme:
    """A scheme's tag, read; scores are exact (integers, fractions or logarithms as decimals)."""

    def __init__(self, tag: str) -> None:
        self.name, _, rest = tag.partition(":")
        defaults = DEFAULTS[self.name]
        given = dict(item.split("=") for item in rest.split(",") if item)
        self.values = {key: type(old)(given.pop(key, old)) for key, old in defaults.items()}
        if given:
            raise ValueError(f"{self.name} has no parameter {', '.join(given)}")
        self.width: int = self.values["context_width"]
        self.label = f"{self.name}/{self.width}"
        if self.name == "greenlist":
            # A float is a fraction; the threshold is rounded down, in exact arithmetic.
            self.threshold = math.floor(Fraction(self.values["gamma"]) * TWO32)
        if self.name == "tournament":
            depth = self.values["depth"]
            if self.values["scoring"] == "mean" or depth == 1:
                self.weights: tuple[int, ...] = (1,) * depth
            else:
                self.weights = tuple(10 * (depth - 1) - 9 * layer for layer in range(depth))

    def score(self, number: int, coin: int) -> Any:
        """The score of one position: an integer, or for 'gumbel' a decimal.

        'gamma' is in units of 2**-32, 'delta' in units of 2**-64.
        """
        if self.name == "gumbel":
            return -(Decimal(number + 1) / TWO32).ln()
        if self.name == "greenlist":
            return int(number < self.threshold)
        if self.name == "tournament":
            return sum(w * (number >> layer & 1) for layer, w in enumerate(self.weights))
        if self.name == "gamma":
            return number
        distance = abs(number - coin)
        return (TWO32 - distance) * (TWO32 - distance - 1)

    def log_p(self, total: Any, n: int) -> Decimal:
        """log of the tail of the sum's law, in the units of `score`."""
        if self.name == "gumbel":
            return gamma_tail(total, n)
        if self.name == "greenlist":
            return binomial_tail(total, n, Fraction(self.threshold, TWO32))
        if self.name == "tournament":
            return bits_tail(total, n, self.weights)
        return irwin_hall_tail(Fraction(total, TWO32 if self.name == "gamma" else TWO32**2), n)

    def law(self, words: Sequence[int], probs: Sequence[Decimal]) -> list[Decimal]:
        """The marked law of the next token, from the block of its context."""
        numbers = [field(words[:4], token) for token in range(len(probs))]
        order = sorted(range(len(probs)), key=numbers.__getitem__)
        out = [Decimal(0)] * len(probs)
        if self.name == "gumbel":
            out[max(range(len(probs)), key=lambda i: race(probs[i].ln(), numbers[i]))] += 1
        elif self.name == "greenlist":
            boost = Decimal(self.values["delta"]).exp()
            out = [
                p * (boost if r < self.threshold else 1)
                for p, r in zip(probs, numbers, strict=True)
            ]
            out = [p / sum(out) for p in out]
        elif self.name == "tournament":
            out = list(probs)
            for layer in range(self.values["depth"]):
                bits = [r >> layer & 1 for r in numbers]
                ones = sum(p * g for p, g in zip(out, bits, strict=True))
                out = [p * (1 + g - ones) for p, g in zip(out, bits, strict=True)]
        elif self.name == "gamma":
            below = Decimal(0)
            for token in order:
                above = below + probs[token]
                out[token] = max(2 * above - 1, Decimal(0)) - max(2 * below - 1, Decimal(0))
                below = above
        else:
            coin = (words[4] + Decimal("0.5")) / TWO32
            below = Decimal(0)
            for token in order:
                below += probs[token]
                if below > coin:
                    out[token] += 1
                    break
        return out


def race(log_weight: Decimal, number: int) -> Decimal:
    """log(p / E), E = -log(1 - (r + 1/2) / 2**32): the largest wins."""
    x = (number + Decimal("0.5")) / TWO32
    return log_weight - (-ln1p(-x)).ln()


def logit(token: int, position: int) -> int:
    """The test generator's logits times 2**16: 20 bits of an integer rule."""
    return (token * 2654435761 + position * 2246822519) % TWO32 >> 12


def generate(case: dict[str, Any]) -> tuple[list[int], list[bool]]:
    """The tokens of one deterministic generation, and where they are marked (slot 0)."""
    scheme = Scheme(case["scheme"])
    key = marking_keys(case["key"], case["user"], scheme.label)[0]
    temperature = Decimal(case["temperature"])
    tokens: list[int] = []
    marked: list[bool] = []
    seen: set[tuple[int, ...]] = set()
    for position in range(case["length"]):
        window = tuple(tokens[-scheme.width :])
        fresh = len(window) == scheme.width and window not in seen
        seen.add(window)
        marked.append(fresh)
        if not fresh:
            # What a generator draws privately; here it is told.
            tokens.append(case["forced"][str(position)])
            continue
        words = block(key, window)
        logits = [Decimal(logit(i, position)) / 65536 for i in range(case["vocab_size"])]
        if scheme.name == "greenlist":
            boost = Decimal(scheme.values["delta"])
            logits = [
                value + (boost if field(words[:4], token) < scheme.threshold else 0)
                for token, value in enumerate(logits)
            ]
        if temperature == 0:
            tokens.append(logits.index(max(logits)))
            continue
        kept = range(len(logits))
        if case["top_k"]:
            limit = sorted(logits)[-case["top_k"]]
            kept = [i for i in kept if logits[i] >= limit]
        weights = [(logits[i] / temperature).exp() for i in kept]
        # Outside the kept tokens nothing has a weight, and the field is the same for all.
        probs = [Decimal(0)] * len(logits)
        for i, weight in zip(kept, weights, strict=True):
            probs[i] = weight / sum(weights)
        if scheme.name == "gumbel":
            numbers = {i: field(words[:4], i) for i in kept}
            tokens.append(max(kept, key=lambda i: race(probs[i].ln(), numbers[i])))
        else:
            tokens.append(scheme.law(words, probs).index(1))
    return tokens, marked


# --- one case of each file -------------------------------------------------------------------


def chacha_case(case: dict[str, Any]) -> dict[str, Any]:
    """A case of prf.json, `chacha`."""
    inputs = [int(word, 16) for word in case["input"]]
    output = chacha(words_of(bytes.fromhex(case["key"])), inputs, case["rounds"])
    return {"output": as_hex(output)}


def block_case(case: dict[str, Any]) -> dict[str, Any]:
    """A case of prf.json, `block`."""
    words = block(bytes.fromhex(case["key"]), case["context"])
    return {"words": as_hex(words), "seed": as_hex(words[:4]), "coin": f"{words[4]:08x}"}


def field_case(case: dict[str, Any]) -> dict[str, Any]:
    """A case of prf.json, `field`."""
    seed = [int(word, 16) for word in case["seed"]]
    return {"numbers": as_hex(field(seed, token) for token in case["tokens"])}


def contexts_case(case: dict[str, Any]) -> dict[str, Any]:
    """A case of contexts.json."""
    found, repeated = scored(case["texts"], case["width"])
    starts = [sum(len(text) for text in case["texts"][:i]) for i in range(len(case["texts"]))]
    return {
        "n_tokens": sum(len(text) for text in case["texts"]),
        "positions": [starts[number] + t for number, t in found],
        "n_repeated": repeated,
        "too_short": not found,
    }


def slot_sums(scheme: Scheme, key: bytes, texts: Any, found: Any) -> dict[str, Any]:
    """Numbers, scores and total of one key over the scored positions."""
    numbers, coins, scores = [], [], []
    for text, t in found:
        words = block(key, texts[text][t - scheme.width : t])
        numbers.append(field(words[:4], texts[text][t]))
        coins.append(words[4])
        scores.append(scheme.score(numbers[-1], words[4]))
    return {"numbers": numbers, "coins": coins, "scores": scores, "total": sum(scores)}


def written(value: Any) -> Any:
    """A score or a total as the file holds it; integers above 2**53 as text."""
    if isinstance(value, Decimal):
        return thirty(value)
    return value if value < 1 << 53 else str(value)


def detect_case(case: dict[str, Any]) -> dict[str, Any]:
    """A case of schemes.json, `detect`."""
    scheme = Scheme(case["scheme"])
    found, repeated = scored(case["texts"], scheme.width)
    slots = []
    logs = []
    for key in marking_keys(case["key"], case["user"], scheme.label):
        sums = slot_sums(scheme, key, case["texts"], found)
        logs.append(scheme.log_p(sums["total"], len(found)))
        slot = {"numbers": as_hex(sums["numbers"])}
        if scheme.name == "delta":
            slot["coins"] = as_hex(sums["coins"])
        slot["scores"] = [written(score) for score in sums["scores"]]
        slot["total"] = written(sums["total"])
        slots.append({**slot, "log_p": thirty(logs[-1])})
    best = logs.index(min(logs))
    return {
        "label": scheme.label,
        "n_scored": len(found),
        "n_repeated": repeated,
        "slots": slots,
        "slot": best,
        "log_p": thirty(sidak(logs[best], len(logs))),
    }


def trace_case(case: dict[str, Any]) -> dict[str, Any]:
    """A case of schemes.json, `trace`: Holm-Sidak over users and slots."""
    scheme = Scheme(case["scheme"])
    found, _ = scored(case["texts"], scheme.width)
    best = []
    for user in range(case["users"]):
        keys = marking_keys(case["key"], str(user), scheme.label)
        total = max(slot_sums(scheme, key, case["texts"], found)["total"] for key in keys)
        best.append((scheme.log_p(total, len(found)), user, len(keys)))
    best.sort()
    adjusted: list[Decimal] = []
    for rank, (log_p, _, slots) in enumerate(best):
        value = sidak(log_p, (len(best) - rank) * slots)
        adjusted.append(max(value, adjusted[-1]) if adjusted else value)
    return {
        "order": [user for _, user, _ in best],
        "log_ps": [thirty(value) for value in adjusted],
    }


def law_case(case: dict[str, Any]) -> dict[str, Any]:
    """A case of schemes.json, `laws`."""
    whole = sum(case["weights"])
    probs = [Decimal(weight) / whole for weight in case["weights"]]
    words = [int(word, 16) for word in case["block"]]
    return {"law": [f"{p:.30f}" for p in Scheme(case["scheme"]).law(words, probs)]}


def generate_case(case: dict[str, Any]) -> dict[str, Any]:
    """A case of schemes.json, `generate`."""
    tokens, marked = generate(case)
    marks = [int(mark) for mark in marked]
    return {"tokens": tokens, "marked": marks}


# --- the tails of stats.json, for whatever integers and series can reach ----------------------


def near(found: str, wanted: Decimal) -> bool:
    """Whether a number of 30 digits is right but for the last two."""
    return abs(Decimal(found) - wanted) <= abs(wanted) * Decimal("1e-28")


def stats_value(section: str, row: dict[str, Any]) -> Decimal | list[Decimal] | None:
    """What a row of stats.json must hold, or None if it takes more than this script has."""
    if section == "binomial":
        return binomial_tail(row["k"], row["n"], Fraction(row["p"]))
    if section == "gamma":
        return gamma_tail(Decimal(row["s"]), row["n"])
    if section == "two_gammas":
        if row["n"] > 60:  # a series too long for this script
            return None
        return two_gammas_tail(Decimal(row["s"]), row["n"], Decimal(row["share"]))
    if section == "irwin_hall":
        s, n = Fraction(row["s"]), row["n"]
        if n <= 1000:
            return irwin_hall_tail(s, n)
        # The terms after the first are about (n exp(-n/x))**j / j!.
        in_corner = n * math.exp(-n / min(s, n - s)) < 10
        return irwin_hall_corner(s, n) if in_corner else None
    if section == "weighted_bits":
        weights, n, total = tuple(row["weights"]), row["n"], row["total"]
        if (n * len(weights)) ** 2 * n * sum(weights) < 1e10 or len(set(weights)) == 1:
            scale = weights[0] if len(set(weights)) == 1 else 1
            return bits_tail(-(-total // scale), n, tuple(w // scale for w in weights))
        deficit = n * sum(weights) - total
        return top_bits_tail(deficit, n, weights) if deficit < 2000 else None
    if section == "sidak":
        return sidak(Decimal(row["log_p"]), row["k"])
    if section == "bonferroni":
        return min(Decimal(0), Decimal(row["log_p"]) + Decimal(row["k"]).ln())
    if section == "monte_carlo_log_pvalue":
        return ln_tail(row["count"] + 1, row["n"] + 1)
    if section == "log1mexp":
        return log1mexp(Decimal(row["x"]))
    if section in ("holm", "benjamini_hochberg"):
        family = [Decimal(value) for value in row["log_ps"]]
        k = len(family)
        order = sorted(range(k), key=family.__getitem__)
        out = [Decimal(0)] * k
        for rank, i in enumerate(order):
            if section == "holm":
                steps = [family[j] + Decimal(k - r).ln() for r, j in enumerate(order[: rank + 1])]
                out[i] = min(Decimal(0), max(steps))
            else:
                steps = [
                    family[j] + (Decimal(k) / (r + 1)).ln()
                    for r, j in enumerate(order)
                    if r >= rank
                ]
                out[i] = min(Decimal(0), *steps)
        return out
    raise ValueError(f"unknown section {section!r}")


# --- files -----------------------------------------------------------------------------------

CASES: dict[str, dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "prf": {"chacha": chacha_case, "block": block_case, "field": field_case},
    "contexts": {"cases": contexts_case},
    "custody": {
        "versions": version_case,
        "imported": imported_case,
        "content": content_case,
        "logs": log_case,
    },
    "schemes": {
        "detect": detect_case,
        "trace": trace_case,
        "laws": law_case,
        "generate": generate_case,
    },
}


class Report:
    """What was compared in one file."""

    def __init__(self) -> None:
        self.checked = 0
        self.skipped = 0
        self.problems: list[str] = []

    def compare(self, found: Any, wanted: Any, where: str) -> None:
        """Count the leaves of two JSON values and note where they differ."""
        if isinstance(wanted, dict):
            for key, value in wanted.items():
                inner = found.get(key) if isinstance(found, dict) else None
                self.compare(inner, value, f"{where}.{key}")
        elif isinstance(wanted, list) and isinstance(found, list) and len(found) == len(wanted):
            for i, (f, w) in enumerate(zip(found, wanted, strict=True)):
                self.compare(f, w, f"{where}[{i}]")
        else:
            self.checked += 1
            # The types too: 1 equals True and 1.0 in Python, not in JSON.
            if found != wanted or type(found) is not type(wanted):
                self.problems.append(f"{where}: the file has {found!r}, derived is {wanted!r}")


def check_keys(content: dict[str, Any], report: Report) -> None:
    """All cases of keys.json."""
    for i, case in enumerate(content["cases"]):
        labels = [mark["label"] for mark in case["marks"]]
        indices = [[int(user["index"]) for user in mark["users"]] for mark in case["marks"]]
        if any(other != indices[0] for other in indices):
            report.problems.append(f"cases[{i}]: labels with different users")
        secret = bytes.fromhex(case["secret"])
        wanted = derive(secret, case["name"], case["slots"], labels, indices[0])
        report.compare(case, wanted, f"cases[{i}]")


def check_stats(content: dict[str, Any], report: Report) -> None:
    """All rows of stats.json that integers and series reach; the others are counted."""
    for section, rows in content.items():
        if section in ("provenance", "about"):
            continue
        for i, row in enumerate(rows):
            wanted = stats_value(section, row)
            if wanted is None:
                report.skipped += 1
                continue
            found = row.get("log_p") if isinstance(row.get("log_p"), str) else None
            found = row.get("adjusted", row.get("value", found))
            pairs = (
                zip(found, wanted, strict=True) if isinstance(wanted, list) else [(found, wanted)]
            )
            for have, want in pairs:
                report.checked += 1
                if not near(have, want):
                    where = f"{section}[{i}]"
                    report.problems.append(f"{where}: the file has {have}, derived is {want:.32g}")


def verify(path: Path) -> Report:
    """Compare one file with what its own inputs derive to. Its name says what it holds."""
    report = Report()
    content = json.loads(path.read_text("utf-8"))
    with localcontext() as context:
        context.prec = DIGITS
        context.Emin, context.Emax = -(10**15), 10**15
        if path.stem == "keys":
            check_keys(content, report)
        elif path.stem == "stats":
            check_stats(content, report)
        else:
            for section, derive_case in CASES[path.stem].items():
                if not content[section]:
                    report.problems.append(f"{section} is empty")
                for i, case in enumerate(content[section]):
                    wanted = derive_case(case)
                    said = (*wanted, "about", "source", "sha256")
                    inputs = {key: value for key, value in case.items() if key not in said}
                    report.compare(case, {**wanted, "sha256": seal(inputs)}, f"{section}[{i}]")
    if not report.checked:
        report.problems.append("there is nothing to compare")
    return report


def main(arguments: Sequence[str]) -> int:
    """Verify the named files, or all; the exit status."""
    paths = [Path(argument) for argument in arguments] or sorted(FOLDER.glob("*.json"))
    status = 0
    for path in paths:
        try:
            report = verify(path)
        except Exception as error:
            print(f"{path.name}: cannot be verified, {type(error).__name__}: {error}")
            status = 2
            continue
        line = f"{path.name}: {report.checked} values re-derived"
        if report.skipped:
            line += f", {report.skipped} skipped (only mpmath reaches them)"
        if report.problems:
            line += f", {len(report.problems)} DIFFER, first {report.problems[0]}"
            status = max(status, 1)
        print(line)
    return status if paths else 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
