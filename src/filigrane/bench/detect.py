"""A complete test of a text: windows, deduplication, key derivation, scores, exact p-value."""

import statistics
from collections.abc import Callable
from itertools import cycle
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt

from filigrane.bench import Case, Document, Report, describe, document, interleave, silent, summary
from filigrane.contexts import collect
from filigrane.detection import detect, totals
from filigrane.keys import Key
from filigrane.schemes import SCHEMES, Scheme

VOCAB = 50_257
PROTOCOL = (
    "One call of detect() per text: token ids (int64) to the corrected exact p-value, one thread; "
    "tokens_per_s is the length over the median. Texts are uniform random ids, a new one for each "
    "call. stages_us (one slot): medians of the parts, timed on their own. transformers kgw: its "
    "WatermarkDetector (lefthash, repeated n-grams counted once, approximate p-value); "
    "transformers synthid: g-values, repetition mask and masked mean, no p-value."
)


def run(quick: bool = False, report: Report = silent) -> Document:
    """Time all schemes at 200, 1,000 and 100,000 tokens with 1 and 8 slots; quick: 20 tokens."""
    sizes = [(n, slots) for n in ((20,) if quick else (200, 1_000, 100_000)) for slots in (1, 8)]
    most, budget = (2, 0.05) if quick else (401, 1.5)
    machine = describe()
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for number, (tokens, slots) in enumerate(sizes):
        key = Key.generate("bench", slots=slots)
        text = _texts(rng, tokens, most)
        cases = {name: Case(_ours(scheme(), key), text) for name, scheme in SCHEMES.items()}
        if number == 0:
            cases |= _others(text)

        def tell(name: str, done: int = number, where: str = f"{tokens}, {slots} slots") -> None:
            report(done, len(sizes), f"{where} {name}")

        seconds = interleave(cases, most=most, budget=budget, report=tell)
        for name, times in seconds.items():
            row = {"case": name, "tokens": tokens, "slots": slots} | summary(times, 1e-6, "us")
            row["tokens_per_s"] = float(f"{tokens / statistics.median(times):.4g}")
            if slots == 1 and name in SCHEMES:
                row["stages_us"] = _stages(SCHEMES[name](), key, text(), most, budget)
            rows.append(row)
    report(len(sizes), len(sizes), "done")
    return document("detect", PROTOCOL, rows, quick=quick, machine=machine)


def _texts(
    rng: np.random.Generator, tokens: int, count: int
) -> Callable[[], npt.NDArray[np.int64]]:
    """Gives another text at every call; long ones come round again."""
    texts = cycle(
        [rng.integers(VOCAB, size=tokens) for _ in range(min(count, 4_000_000 // tokens))]
    )
    return lambda: next(texts)


def _ours(scheme: Scheme, key: Key) -> Callable[[Any], object]:
    return lambda text: detect(text, key, scheme)


def _stages(
    scheme: Scheme, key: Key, text: npt.NDArray[np.int64], most: int, budget: float
) -> dict[str, float]:
    """Median microseconds of the four parts of detect()."""
    evidence = collect(text, scheme.context_width)
    words = key.prf_keys(scheme.label)
    total = totals(evidence, words, scheme)[0]
    stages = {
        "windows": Case(lambda _: collect(text, scheme.context_width)),
        "keys": Case(lambda _: key.prf_keys(scheme.label)),
        "scores": Case(lambda _: totals(evidence, words, scheme)),
        "tail": Case(lambda _: scheme.log_sf(total, evidence.n_scored)),
    }
    seconds = interleave(stages, most=most, budget=budget / 4, report=lambda name: None)
    return {name: summary(times, 1e-6, "us")["median_us"] for name, times in seconds.items()}


def _others(text: Callable[[], npt.NDArray[np.int64]]) -> dict[str, Case]:
    """The detectors of transformers."""
    try:
        import torch
        from transformers import (
            SynthIDTextWatermarkLogitsProcessor,
            WatermarkDetector,
            WatermarkingConfig,
        )
    except ImportError:
        return {}
    config = SimpleNamespace(vocab_size=VOCAB, bos_token_id=-1, is_encoder_decoder=False)
    kgw = WatermarkDetector(config, "cpu", WatermarkingConfig(), ignore_repeated_ngrams=True)
    synthid = SynthIDTextWatermarkLogitsProcessor(
        ngram_len=5,
        keys=list(range(1, 31)),
        sampling_table_size=2**16,
        sampling_table_seed=0,
        context_history_size=1024,
        device=torch.device("cpu"),
    )

    def mean_score(ids: Any) -> float:
        values = synthid.compute_g_values(ids)
        mask = synthid.compute_context_repetition_mask(ids)
        return float(values.float().mean(-1)[mask.bool()].mean())

    def single(run: Callable[[Any], object]) -> Callable[[Any], object]:
        def alone(ids: Any) -> object:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return run(ids)
            finally:
                torch.set_num_threads(threads)

        return alone

    def tensor() -> Any:
        return torch.from_numpy(text())[None]

    return {
        "transformers kgw": Case(single(lambda ids: kgw(ids, return_dict=True)), tensor),
        "transformers synthid": Case(single(mean_score), tensor),
    }
