"""Result documents, made by running the real tests on synthetic suspects with a bias or without."""

from typing import Any

import numpy as np

import filigrane as fg
from filigrane import radioactivity as ra
from filigrane.keys import Key
from filigrane.schemes.base import Scheme
from filigrane.study import documents
from keymaker import key_of

KEY = key_of(b"r" * 32, "acme-2026")
SCHEME = fg.GreenList(gamma=0.25, delta=3.0, context_width=2)
VOCAB = 2000
SUSPECT = {
    "name": "bob/helpful-7b", "access": "open", "vocab_size": VOCAB, "tokenizer_sha256": "a" * 64,
    "weights_sha256": None, "endpoint": None,
}  # fmt: skip
TOP = 6


def scores(windows: np.ndarray, tokens: np.ndarray, key: Key, scheme: Scheme) -> np.ndarray:
    """Keyed scores, (n, width) windows and (n, m) tokens -> (n, m)."""
    from filigrane.kernels.prf import blocks

    words = np.broadcast_to(key.prf_keys(scheme.label)[0], (windows.shape[0], 8))
    return scheme.score(blocks(words, windows)[:, None, :], tokens)


def reading(rng: np.random.Generator, n: int, bias: float, scheme: Scheme = SCHEME) -> ra.Reading:
    """A suspect whose law was tilted by `bias` nats towards what the key prefers."""
    windows = rng.integers(0, VOCAB, (n, scheme.context_width)).astype(np.uint32)
    tokens = np.argsort(rng.random((n, 40)), axis=1)[:, :TOP].astype(np.uint32)
    tokens += rng.integers(0, VOCAB - 40, (n, 1)).astype(np.uint32)
    base = rng.dirichlet(np.full(TOP + 1, 0.6), n)[:, :TOP]
    tilted = base * np.exp(bias * scores(windows, tokens, KEY, scheme))
    noise = rng.lognormal(0.0, 0.8, tilted.shape)
    suspect = tilted * noise
    suspect /= suspect.sum(1, keepdims=True) + 0.05
    order = np.argsort(-suspect, axis=1)
    tokens, suspect, base = (
        np.take_along_axis(part, order, axis=1) for part in (tokens, suspect, base)
    )
    ledger = {
        "candidates": int(1.9 * n) + 60,
        "incomplete window": 60,
        "window in the attended context": int(1.9 * n) - n,
        "scored": n,
    }
    return ra.Reading(
        windows=windows,
        documents=np.sort(rng.integers(0, 60, n)),
        starts=np.arange(n + 1, dtype=np.int64) * TOP,
        tokens=np.ascontiguousarray(tokens).reshape(-1),
        suspect=suspect.reshape(-1).astype(np.float32),
        base=base.reshape(-1).astype(np.float32),
        vocab_size=VOCAB,
        ledger=ledger,
    )


def answered(
    rng: np.random.Generator, count: int, bias: float, scheme: Scheme = SCHEME
) -> list[ra.Exchange]:
    """Answers of a suspect that takes the better of two tokens, by the key, in a share `bias`."""
    made = []
    width = scheme.context_width
    for _ in range(count):
        prompt = rng.integers(0, 60, 20)
        answer = list(rng.integers(0, 60, width))
        for _ in range(80):
            pair = rng.integers(0, 60, 2)
            window = np.array([answer[-width:]], dtype=np.uint32)
            both = scores(window, pair[None].astype(np.uint32), KEY, scheme)[0]
            best = int(np.argmax(both)) if rng.random() < bias else 0
            answer.append(int(pair[best]))
        made.append(ra.Exchange(prompt=prompt, answer=np.array(answer)))
    return made


def document(
    *, bias: float = 0.35, seed: int = 1, n: int = 4000, control: bool = False,
    scheme: Scheme = SCHEME, decoys: int = 200,
) -> dict[str, Any]:  # fmt: skip
    """Open and unsupervised: three statistics, of which differential is the primary one."""
    rng = np.random.default_rng(seed)
    seen = reading(rng, n, bias, scheme)
    results = [
        documents.result(ra.test(part, KEY, scheme, decoys=decoys), 1e-5, primary=number == 0)
        for number, part in enumerate((ra.differential(seen), ra.argmax(seen), ra.soft(seen)))
    ]
    clean, baseline = [], None
    if control:
        part = ra.soft(reading(rng, n, 0.0, scheme))
        clean = [documents.result(ra.test(part, KEY, scheme, decoys=decoys), 1e-5, primary=True)]
        losses = rng.normal(1.0, 0.1, 300)
        baseline = ra.baseline(losses[:150] - 0.05, losses[150:])
    suspect = SUSPECT | {"weights_sha256": "b" * 64}
    return _made(
        results, scheme, suspect, base=suspect | {"name": "a-base-model"}, control=clean,
        baseline=baseline, alignment={"rate": 0.874, "mass": 0.912, "refuse_below": 0.5},
    )  # fmt: skip


def closed_document(
    *, bias: float = 0.0, seed: int = 2, count: int = 60, pieces: int = 1, combination: str = "none"
) -> dict[str, Any]:
    """Closed and supervised, with an e-process; several pieces of evidence need a combination."""
    rng = np.random.default_rng(seed)
    results = []
    for _ in range(pieces):
        evidence = ra.answers(answered(rng, count, bias), SCHEME.context_width)
        process = ra.follow(evidence, KEY, SCHEME)
        found = ra.test(evidence, KEY, SCHEME)
        results.append(documents.result(found, 1e-5, primary=True, sequence=process))
    endpoint = "https://models.example/v1/chat/completions"
    suspect = SUSPECT | {"access": "closed", "endpoint": endpoint, "tokenizer_sha256": None}
    return _made(
        results, SCHEME, suspect, supervision="supervised", combination=combination,
        retokenized=True,
    )  # fmt: skip


def _made(
    results: list[dict[str, Any]], scheme: Scheme, suspect: dict[str, Any], **others: Any
) -> dict[str, Any]:
    made = documents.document(
        results, alpha=1e-5, key={"name": KEY.name, "fingerprint": KEY.fingerprint},
        scheme=scheme.tag, suspect=suspect,
        inputs=[
            {"name": "fresh.jsonl", "sha256": "d" * 64, "records": 60, "role": "texts"},
            {"name": "grams.filter", "sha256": "e" * 64, "records": None, "role": "filter"},
        ],
        **{"combination": "none", "supervision": "unsupervised", "base": None} | others,
    )  # fmt: skip
    return made | {"created": "2026-03-02T10:11:12+00:00"}
