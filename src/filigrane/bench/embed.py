"""One decoding step: from the logits of a batch to its next tokens."""

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from filigrane.bench import Case, Document, Report, describe, document, interleave, silent, summary
from filigrane.embedding import MarkedSampler, Sampling
from filigrane.errors import MissingDependency
from filigrane.keys import Key
from filigrane.schemes import SCHEMES, Gumbel, Scheme, Tournament

PLAIN = "plain"
PROTOCOL = (
    "One step: logits (batch, vocabulary) float32 in memory to one token id per row, one thread. "
    "Logits: normal with standard deviation 3, five tokens of each row raised by 8 to 14. plain is "
    "torch.softmax and torch.multinomial over the full vocabulary; ratio is the median over "
    "plain's median. Ours is MarkedSampler.sample, everything included, with every position "
    "marked. transformers: its logits processor, then plain."
)
_SYNTHID_MAX_BYTES = 1 << 29  # its int64 keys, batch x vocabulary x depth; it makes several such


def run(quick: bool = False, report: Report = silent) -> Document:
    """Time all schemes at batch 1 and 32 and two vocabularies; quick: tiny sizes, few runs.

    Raises MissingDependency without torch; without transformers its cases are left out.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingDependency(
            "bench embed compares with torch: pip install 'filigrane[torch]'"
        ) from error
    sizes = [(1, 50_257), (1, 151_936), (32, 50_257), (32, 151_936)]
    if quick:
        sizes = [(1, 500), (2, 500)]
    most, budget = (2, 0.05) if quick else (201, 2.0)
    machine = describe()
    rows: list[dict[str, Any]] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for number, (batch, vocab) in enumerate(sizes):
            rng = np.random.default_rng(number)
            logits = peaked_logits(rng, batch, vocab)
            samplers = _samplers(rng, batch)
            cases = _torch_cases(logits) | _others(rng, logits)
            for name, sampler in samplers.items():
                cases[name] = Case(sampler.sample, _fresh(sampler, rng, logits))

            def tell(name: str, done: int = number, where: str = f"{batch} x {vocab}") -> None:
                report(done, len(sizes), f"{where} {name}")

            seconds = interleave(cases, most=most, budget=budget, report=tell)
            plain = statistics.median(seconds[PLAIN])
            for name, times in seconds.items():
                row = {"batch": batch, "vocab": vocab, "case": name} | summary(times)
                row["ratio"] = float(f"{statistics.median(times) / plain:.3g}")
                if name in samplers:
                    row["marked"] = _share_marked(samplers[name])
                rows.append(row)
        report(len(sizes), len(sizes), "done")
    finally:
        torch.set_num_threads(threads)
    return document("embed", PROTOCOL, rows, quick=quick, machine=machine)


def peaked_logits(rng: np.random.Generator, batch: int, vocab: int) -> npt.NDArray[np.float32]:
    """Logits shaped like a language model's: a broad normal floor and a handful of peaks."""
    logits = (3.0 * rng.standard_normal((batch, vocab))).astype(np.float32)
    for row in logits:
        row[rng.choice(vocab, 5, replace=False)] += rng.uniform(8.0, 14.0, 5).astype(np.float32)
    return logits


def _samplers(rng: np.random.Generator, batch: int) -> dict[str, MarkedSampler]:
    key = Key.generate("bench", slots=1)

    def sampler(scheme: Scheme, top_k: int = 0, marked: bool = True) -> MarkedSampler:
        keys = [key if marked else None] * batch
        return MarkedSampler(scheme, keys, sampling=Sampling(top_k=top_k), rng=rng)

    result = {name: sampler(scheme()) for name, scheme in SCHEMES.items()}
    for top_k in (40, 100):
        result[f"tournament, top-k {top_k}"] = sampler(Tournament(), top_k)
    result["unmarked"] = sampler(Gumbel(), marked=False)
    return result


def _fresh(
    sampler: MarkedSampler, rng: np.random.Generator, logits: npt.NDArray[np.float32]
) -> Callable[[], npt.NDArray[np.float32]]:
    """Before each step: a random token in every row, so that the next window is a new one."""
    width = sampler.scheme.context_width

    def prepare() -> npt.NDArray[np.float32]:
        # Complete windows from the first step on.
        missing = max(1, width - len(sampler.histories[0]))
        for row in range(logits.shape[0]):
            for token in rng.integers(logits.shape[1], size=missing).tolist():
                sampler.push(row, token)
        return logits

    return prepare


def _share_marked(sampler: MarkedSampler) -> float:
    """Share of the drawn positions that were marked; pushed tokens, every second one, are not."""
    width = sampler.scheme.context_width
    drawn = [flag for flags in sampler.marked for flag in flags[width::2]]
    return round(sum(drawn) / len(drawn), 4)


def _torch_cases(logits: npt.NDArray[np.float32]) -> dict[str, Case]:
    import torch

    rows = torch.from_numpy(logits)  # the same memory

    def plain(_: object) -> object:
        return torch.multinomial(torch.softmax(rows, -1), 1)

    def truncated(top_k: int) -> object:
        values, ids = torch.topk(rows, top_k)
        return ids.gather(-1, torch.multinomial(torch.softmax(values, -1), 1))

    return {
        PLAIN: Case(plain),
        "plain, top-k 40": Case(lambda _: truncated(40)),
        "plain, top-k 100": Case(lambda _: truncated(100)),
    }


def _others(rng: np.random.Generator, logits: npt.NDArray[np.float32]) -> dict[str, Case]:
    """The processors of transformers, each followed by plain sampling."""
    import torch

    try:
        from transformers import (
            SynthIDTextWatermarkLogitsProcessor,
            WatermarkLogitsProcessor,
        )
    except ImportError:
        return {}
    batch, vocab = logits.shape
    rows = torch.from_numpy(logits)

    def case(processor: Any) -> Case:
        def step(ids: Any) -> object:
            return torch.multinomial(torch.softmax(processor(ids, rows), -1), 1)

        return Case(step, lambda: torch.from_numpy(rng.integers(vocab, size=(batch, 8))))

    def green(seeding: str, width: int) -> Any:
        return WatermarkLogitsProcessor(
            vocab, device="cpu", seeding_scheme=seeding, context_width=width
        )

    cases = {
        "transformers lefthash": case(green("lefthash", 1)),
        "transformers selfhash": case(green("selfhash", 4)),
    }
    if batch * vocab * 30 * 8 <= _SYNTHID_MAX_BYTES:
        synthid = SynthIDTextWatermarkLogitsProcessor(
            ngram_len=5,
            keys=rng.integers(1, 2**31, 30).tolist(),
            sampling_table_size=2**16,
            sampling_table_seed=0,
            context_history_size=1024,
            device=torch.device("cpu"),
        )
        cases["transformers synthid"] = case(synthid)
    return cases
