"""The fused kernel on a GPU, beside plain sampling, a copy of the same bytes and vLLM's own kernel.

Needs a CUDA device: without one `run` raises MissingDependency and measures nothing.
"""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from filigrane.bench import Document, Report, describe, document, silent, summary
from filigrane.bench.embed import PLAIN
from filigrane.errors import MissingDependency
from filigrane.schemes import SCHEMES, Scheme

PROTOCOL: Final = (
    "One step on a GPU: logits (batch, vocabulary) in its memory to one token id per row. plain is "
    "torch.softmax in float32 and torch.multinomial; copy is logits to a second buffer, the same "
    "bytes read and written. vllm is its philox_gumbel_sample on the same logits, if installed. "
    "Ours: fused.sample with every row marked, all rows with keys, windows and noise of their own, "
    "already packed (pack is Rows.of alone, on the host). Cases take turns; before each timed call "
    "a buffer larger than the second-level cache is overwritten, so logits come from memory. "
    "Times are of CUDA events around the launches; host_us is the time until the call returned. "
    "ratio is the median over plain's. floor_share is half of copy's median over it: a copy "
    "moves every byte twice, a sampler has to read it once. extra_mb is peak memory beyond the "
    "logits and the packed rows. Logits: normal, standard deviation 3, five peaks per row."
)
SIZES: Final = [(b, v) for v in (32_000, 49_152, 151_936) for b in (1, 16, 64, 256)]
GOAL: Final = 0.70
"""Share of the memory floor aimed at for gumbel, float32, 256 x 151,936."""


def run(quick: bool = False, report: Report = silent) -> Document:
    """Time all schemes at twelve sizes in float32 and bfloat16; quick: two tiny sizes, few runs.

    Raises MissingDependency without torch, triton or a CUDA device.
    """
    try:
        import torch
        import triton
    except ImportError as error:
        raise MissingDependency(
            "bench fused needs torch and triton: pip install 'filigrane[torch]' triton"
        ) from error
    if not torch.cuda.is_available():
        raise MissingDependency(
            "bench fused needs a CUDA device and there is none here: nothing was measured. Run it "
            "on a machine with a GPU; which tokens the kernel draws is tested anywhere, by "
            "tests/adapters/test_fused.py."
        )
    sizes = [(1, 1000), (4, 1000)] if quick else SIZES
    runs = 3 if quick else 50
    machine = describe() | {"triton": triton.__version__} | _device()
    rows: list[dict[str, Any]] = []
    for number, (batch, vocab) in enumerate(sizes):
        for dtype in (torch.float32, torch.bfloat16):
            report(number, len(sizes), f"{batch} x {vocab} {dtype}")
            rows += _size(batch, vocab, dtype, runs)
    report(len(sizes), len(sizes), "done")
    return document("fused", PROTOCOL, rows, quick=quick, machine=machine)


def reached(rows: list[dict[str, Any]]) -> float | None:
    """The share of the memory floor that GOAL speaks of, or None if that size was not run."""
    for row in rows:
        where = (row["case"], row["batch"], row["vocab"], row["dtype"])
        if where == ("gumbel", 256, 151_936, "float32"):
            return float(row["floor_share"])
    return None


def _device() -> dict[str, Any]:
    """The GPU and what drives it, for the document's machine."""
    import torch

    facts = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": facts.name,
        "gpu_cores": facts.multi_processor_count,
        "gpu_memory_gb": round(facts.total_memory / 2**30, 1),
        "gpu_cache_mb": round(facts.L2_cache_size / 2**20, 1),
        "cuda": torch.version.cuda,
    }


def _size(batch: int, vocab: int, dtype: Any, runs: int) -> list[dict[str, Any]]:
    """All cases of one size and type."""
    import torch

    generator = torch.Generator("cuda").manual_seed(batch * vocab)
    logits = 3.0 * torch.randn((batch, vocab), device="cuda", generator=generator)
    peaks = torch.randint(vocab, (batch, 5), device="cuda", generator=generator)
    heights = 8.0 + 6.0 * torch.rand((batch, 5), device="cuda", generator=generator)
    logits = logits.scatter_add_(1, peaks, heights).to(dtype)
    cases = _cases(logits)
    device, host = _times(cases, runs)
    plain = statistics.median(device[PLAIN])
    floor = statistics.median(device["copy"]) / 2.0
    rows: list[dict[str, Any]] = []
    for name, call in cases.items():
        median = statistics.median(device[name])
        row = {"batch": batch, "vocab": vocab, "dtype": str(dtype).removeprefix("torch.")}
        row |= {"case": name} | summary(device[name], 1e-6, "us")
        row["host_us"] = float(f"{statistics.median(host[name]) * 1e6:.4g}")
        row["ratio"] = float(f"{median / plain:.3g}")
        if name not in ("copy", "pack"):
            row["floor_share"] = float(f"{floor / median:.3g}")
        row["extra_mb"] = _extra(call)
        rows.append(row)
    return rows


def _cases(logits: Any) -> dict[str, Callable[[], object]]:
    import torch

    from filigrane.adapters import fused

    batch, vocab = logits.shape
    rng = np.random.default_rng(batch)
    target = torch.empty_like(logits)

    def packed(schemes: list[Scheme | None]) -> fused.Rows:
        windows = [
            None if scheme is None else rng.integers(0, vocab, scheme.context_width)
            for scheme in schemes
        ]
        return fused.Rows.of(
            schemes,
            rng.integers(0, 2**32, (batch, 8), dtype=np.uint32),
            windows,
            rng.integers(0, 2**32, (batch, 4), dtype=np.uint32),
            [0.8] * batch,
            logits.device,
        )

    def drawn(schemes: list[Scheme | None]) -> Callable[[], object]:
        rows = packed(schemes)
        return lambda: fused.sample(logits, rows)

    def plain() -> object:
        return torch.multinomial(torch.softmax(logits.float(), -1), 1)

    names = list(SCHEMES)
    mixed = [SCHEMES[names[row % len(names)]]() for row in range(batch)]
    cases: dict[str, Callable[[], object]] = {PLAIN: plain, "copy": lambda: target.copy_(logits)}
    cases |= {name: drawn([scheme()] * batch) for name, scheme in SCHEMES.items()}
    cases |= {"unmarked": drawn([None] * batch), "all schemes": drawn([*mixed])}
    cases["pack"] = lambda: packed([*mixed])
    return cases | _vllm(logits)


def _vllm(logits: Any) -> dict[str, Callable[[], object]]:
    """vLLM's fused Philox race, one key for the batch; nothing without vllm."""
    import torch

    try:
        from vllm.v1.worker.gpu.sample.watermark import philox_gumbel_sample
    except ImportError:
        return {}
    batch, vocab = logits.shape
    contexts = torch.randint(vocab, (batch, 4), device=logits.device)
    # It takes float32: engines hand it logits that have been processed.
    values = logits.float()
    return {"vllm gumbel (float32)": lambda: philox_gumbel_sample(values, contexts, 0x1234567890AB)}


def _times(
    cases: dict[str, Callable[[], object]], runs: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds on the device and on the host, cases in turn."""
    import torch

    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    flood = torch.empty(max(2 * cache, 2**26), dtype=torch.uint8, device="cuda")
    for call in cases.values():  # compiles
        for _ in range(3):
            call()
    device: dict[str, list[float]] = {name: [] for name in cases}
    host: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(runs):
        for name, call in cases.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            # Not a fill: the device is still busy with it when the launches arrive, so that the
            # host's time between two launches does not count as the device's.
            for _ in range(8):
                flood.add_(1)
            start.record()
            before = time.perf_counter()
            call()
            host[name].append(time.perf_counter() - before)
            end.record()
            torch.cuda.synchronize()
            device[name].append(start.elapsed_time(end) * 1e-3)
    assert all(math.isfinite(seconds) for times in device.values() for seconds in times)
    return device, host


def _extra(call: Callable[[], object]) -> float:
    """Peak memory that a call takes, in MB (2**20)."""
    import torch

    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return float(f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.3g}")
