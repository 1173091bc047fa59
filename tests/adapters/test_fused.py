"""The fused kernel draws the tokens of the CPU twins: in Triton's interpreter, and on a GPU.

    pytest tests/adapters/test_fused.py             anywhere with triton: interpreter and compiler
    pytest -m gpu tests/adapters/test_fused.py      on a machine with a CUDA device

Triton decides at its import whether it interprets: `test_the_kernels_in_the_interpreter` runs this
file once more in a process of its own. There, and on a GPU, the tests that take `device` run.
"""

import json
import math
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import filigrane as fg
from filigrane import prf
from filigrane.bench.embed import peaked_logits
from filigrane.embedding import bias_logits
from filigrane.errors import (
    LogitsError,
    MissingDependency,
    SchemeError,
    SecretLeakError,
    UnsupportedDecoding,
)
from filigrane.kernels.draw import NOT_FINITE, Workspace, drawable, race
from filigrane.schemes.base import Candidates, Scheme, private_uniform

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

import triton  # noqa: E402

from filigrane.adapters import fused, fused_kernels  # noqa: E402
from filigrane.adapters.fused import Cut, FusedSampler, Rows, sample  # noqa: E402

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
# A row costs the interpreter 0.1 s and a GPU nothing; FILIGRANE_FUSED_ROWS=20 multiplies what the
# interpreter is given.
PATIENCE = 100 if CUDA else int(os.environ.get("FILIGRANE_FUSED_ROWS", "1"))
RACE_ROWS, LAW_ROWS, TIED_ROWS, BORDER_ROWS = (n * PATIENCE for n in (60, 24, 30, 12))

if INTERPRETED:
    from triton.runtime import interpreter

    # For every call of one jitted function by another the interpreter patches the language anew: 5
    # of the 6 ms that a call takes. Once per module is enough.
    _PATCHED: set[int] = set()

    def call(self: object, *args: object, **named: object) -> object:
        if id(self.fn.__globals__) not in _PATCHED:
            _PATCHED.add(id(self.fn.__globals__))
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **named)

    interpreter.InterpretedFunction.__call__ = call

DEVICES = [
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's process"),
        id="interpreter",
    ),
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")],
    ),
]
on_devices = pytest.mark.parametrize("device", DEVICES)
if INTERPRETED:
    # The interpreter computes with numpy, which warns of NaN and infinity; the tests mean them.
    pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
compiler = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in the interpreter")

RACES: list[Scheme | None] = [
    fg.Gumbel(),
    fg.Gumbel(context_width=7),
    fg.GreenList(context_width=1),
    fg.GreenList(gamma=0.9, delta=0.5),
    None,
]
LAW_SCHEMES: list[Scheme | None] = [
    fg.DeltaReweight(),
    fg.GammaReweight(context_width=5),
    fg.Tournament(),
    fg.Tournament(depth=32, scoring="mean"),
    fg.Tournament(depth=3, context_width=1),
    fg.Tournament(depth=11),
]


def test_the_kernels_in_the_interpreter() -> None:
    """All tests of this file that need a device, with the CPU as Triton's device."""
    if INTERPRETED:
        pytest.skip("this is that process")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) >= 30, done.stdout[-2000:]


# --- the reference --------------------------------------------------------------------------------


def expected(
    schemes: Sequence[Scheme | None],
    keys: np.ndarray,
    windows: Sequence[np.ndarray | None],
    noise: np.ndarray,
    temperatures: Sequence[float],
    logits: np.ndarray,
) -> list[int]:
    """What the compiled CPU twins draw, row by row: logits (batch, V) float32."""
    vocab = logits.shape[1]
    ids, workspace = np.arange(vocab, dtype=np.uint32), Workspace(vocab)
    tokens = []
    for row, (scheme, window) in enumerate(zip(schemes, windows, strict=True)):
        values = np.ascontiguousarray(logits[row])
        if not drawable(values):
            tokens.append(NOT_FINITE)
            continue
        marked = scheme is not None and window is not None
        block = prf.block(keys[row], window) if marked else np.zeros(8, np.uint32)
        if marked and scheme.acts_on == "logits":
            out = np.empty_like(values)
            values = bias_logits(scheme, values, ids, block, out)
        if temperatures[row] == 0:
            tokens.append(int(np.argmax(values)))
            continue
        candidates = Candidates(values, ids, 1.0 / temperatures[row])
        if marked:
            tokens.append(scheme.draw(candidates, block, noise[row], workspace))
        else:
            tokens.append(int(race(*candidates, *noise[row])))
    return tokens


def batch(
    rng: np.random.Generator, schemes: Sequence[Scheme | None], vocab: int
) -> tuple[np.ndarray, list[np.ndarray | None], np.ndarray, list[float]]:
    """Keys, windows, noise and temperatures at random."""
    size = len(schemes)
    keys = rng.integers(0, 2**32, (size, 8), dtype=np.uint32)
    windows = [
        None if scheme is None else rng.integers(0, vocab, scheme.context_width)
        for scheme in schemes
    ]
    noise = rng.integers(0, 2**32, (size, 4), dtype=np.uint32)
    return keys, windows, noise, rng.choice([0.3, 0.7, 1.0, 1.3, 3.0], size).tolist()


def compare(
    device: str,
    schemes: Sequence[Scheme | None],
    logits: "torch.Tensor",
    rng: np.random.Generator,
    parts: int | None = None,
    temperatures: Sequence[float] | None = None,
) -> list[int]:
    """Draw on the device and assert that the CPU twins draw the same; returns the tokens."""
    keys, windows, noise, warm = batch(rng, schemes, logits.shape[1])
    temperatures = temperatures or warm
    rows = Rows.of(schemes, keys, windows, noise, temperatures, device)
    found = sample(logits.to(device), rows, parts=parts).tolist()
    values = logits.float().cpu().numpy()
    assert found == expected(schemes, keys, windows, noise, temperatures, values)
    return found


def cycle(schemes: Sequence[Scheme | None], size: int) -> list[Scheme | None]:
    return [schemes[row % len(schemes)] for row in range(size)]


# --- the same tokens ------------------------------------------------------------------------------


@on_devices
def test_blocks_have_the_bits_of_the_reference(device: str) -> None:
    rng = np.random.default_rng(0)
    schemes = [fg.Gumbel(context_width=width) for width in (1, 2, 3, 4, 5, 8, 9, 17, 64)]
    keys, windows, noise, temperatures = batch(rng, schemes, prf.MAX_TOKEN_ID + 1)
    rows = Rows.of(schemes, keys, windows, noise, temperatures, device)
    blocks = torch.zeros((len(schemes), 8), dtype=torch.int32, device=device)
    fused._hash(rows, rows.races, blocks)
    found = blocks.cpu().numpy().view(np.uint32)[:, :5]
    assert (found == [prf.block(k, w)[:5] for k, w in zip(keys, windows, strict=True)]).all()


@on_devices
def test_a_mixed_batch_of_races(device: str) -> None:
    rng = np.random.default_rng(1)
    schemes = cycle(RACES, RACE_ROWS)
    logits = torch.from_numpy(peaked_logits(rng, RACE_ROWS, 300))
    tokens = compare(device, schemes, logits, rng)
    assert len(set(tokens)) > 12


@on_devices
def test_a_mixed_batch_of_laws(device: str) -> None:
    rng = np.random.default_rng(2)
    logits = torch.from_numpy(peaked_logits(rng, LAW_ROWS, 200) * np.float32(0.4))
    tokens = compare(device, cycle(LAW_SCHEMES, LAW_ROWS), logits, rng)
    assert len(set(tokens)) > 12


@on_devices
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab", [1, 1024, 2503])
def test_types_strides_widths_and_parts(device: str, vocab: int, dtype: "torch.dtype") -> None:
    rng = np.random.default_rng(vocab)
    schemes = [*RACES, *LAW_SCHEMES[:3]]
    # Rows start where no load is aligned, and what lies between them is poison.
    wide = torch.full((len(schemes), vocab + 7), math.nan, dtype=dtype)
    logits = wide[:, 3 : 3 + vocab]
    spread = 4.0 * rng.standard_normal(tuple(logits.shape))
    logits[:] = torch.from_numpy(spread).to(dtype)
    on_device = wide.to(device)[:, 3 : 3 + vocab]
    keys, windows, noise, temperatures = batch(rng, schemes, vocab)
    rows = Rows.of(schemes, keys, windows, noise, temperatures, device)
    values = logits.float().numpy()
    wanted = expected(schemes, keys, windows, noise, temperatures, values)
    for parts in (1, None):
        assert sample(on_device, rows, parts=parts).tolist() == wanted


@on_devices
def test_truncated_rows(device: str) -> None:
    rng = np.random.default_rng(3)
    schemes = cycle([*RACES, *LAW_SCHEMES], 22)
    values = peaked_logits(rng, 22, 1500)
    for row, kept in enumerate([1, 2, 5, 40, 600] * 4 + [1, 2]):
        values[row, rng.permutation(1500)[kept:]] = -np.inf
    tokens = compare(device, schemes, torch.from_numpy(values), rng)
    assert (values[np.arange(22), tokens] > -np.inf).all()


@on_devices
def test_what_cannot_be_drawn_from(device: str) -> None:
    rng = np.random.default_rng(4)
    schemes = cycle([*RACES, *LAW_SCHEMES[:3]], 40)
    values = peaked_logits(rng, 40, 1100)
    for row, damage in enumerate(rng.permutation([0, 1, 2, 3, 4] * 8)):
        if damage == 0:
            values[row, rng.integers(1100)] = np.nan
        elif damage == 1:
            values[row, rng.integers(1100)] = np.inf
        elif damage == 2:
            values[row] = -np.inf
        elif damage == 3:  # nothing else than NaN and impossible tokens
            values[row] = -np.inf
            values[row, 1099] = -np.nan
    tokens = compare(device, schemes, torch.from_numpy(values), rng)
    assert tokens.count(NOT_FINITE) == 32


@on_devices
def test_numbers_at_the_end_of_float32(device: str) -> None:
    rng = np.random.default_rng(5)
    schemes = cycle([*RACES, *LAW_SCHEMES[:3]], 24)
    values = rng.uniform(-3.0e38, -1.0e38, (24, 64)).astype(np.float32)
    values[8:16, 5] = 3e38
    values[16:, :62] = -np.inf
    logits = torch.from_numpy(values)
    compare(device, schemes, logits, rng, temperatures=[1.0, 1e6] * 12)
    # Divided by 1e-6, all of this is -inf or +inf in float32. A law only looks at differences from
    # the highest, a race refuses +inf, and of what is left it finds the highest in float64.
    keys, windows, noise, _ = batch(rng, schemes, 64)
    rows = Rows.of(schemes, keys, windows, noise, [1e-6] * 24, device)
    wanted = values.argmax(axis=1)
    is_race = np.array([scheme in RACES for scheme in schemes])
    wanted[is_race & (values.max(axis=1) > 0.0)] = NOT_FINITE
    assert sample(logits.to(device), rows).tolist() == wanted.tolist()


@on_devices
def test_greedy_rows(device: str) -> None:
    rng = np.random.default_rng(6)
    schemes = cycle([None, fg.GreenList(delta=1.0)], 10)
    values = rng.integers(0, 5, (10, 2100)).astype(np.float32)  # ties everywhere: the lowest id
    compare(device, schemes, torch.from_numpy(values), rng, temperatures=[0.0] * 10)


# --- near-ties ------------------------------------------------------------------------------------


def clocks(noise: np.ndarray, vocab: int) -> np.ndarray:
    """log(-log(1 - x)) of every token, float64."""
    x = prf.open_uniform(prf.field(noise, np.arange(vocab)))
    return np.log(-np.log1p(-x))


@on_devices
def test_races_that_float32_cannot_decide(device: str) -> None:
    """Sixteen tokens of each row have scores that differ by the rounding of their logits only."""
    rng = np.random.default_rng(7)
    size, vocab = TIED_ROWS, 2300
    noise = rng.integers(0, 2**32, (size, 4), dtype=np.uint32)
    values = np.full((size, vocab), -60.0, dtype=np.float32)
    naive = np.empty(size, dtype=np.int64)
    margins = np.empty(size)
    for row in range(size):
        clock = clocks(noise[row], vocab)
        near = rng.choice(1024, 8, replace=False)
        near = np.concatenate([near, near + 1024])  # and pairs that share a lane
        values[row, near] = (clock[near] + rng.choice([0.0, 5.0, 100.0])).astype(np.float32)
        scores = values[row].astype(np.float64) - clock
        naive[row] = np.argmax(values[row] - clock.astype(np.float32))
        margins[row] = np.diff(np.sort(scores)[-2:])[0]
    rows = Rows.of(
        [None] * size, np.zeros((size, 8), np.uint32), [None] * size, noise, [1.0] * size, device
    )
    ids = np.arange(vocab, dtype=np.uint32)
    wanted = np.array([race(values[row], ids, 1.0, *noise[row]) for row in range(size)])
    for parts in (1, 3):
        found = sample(torch.from_numpy(values).to(device), rows, parts=parts).tolist()
        assert found == wanted.tolist()
    assert np.median(margins) < 1e-6 and (naive != wanted).mean() > 0.1


@on_devices
def test_races_decided_in_the_thirteenth_digit(device: str) -> None:
    """Two tokens with almost the same clock, and logits so small that they make up for it."""
    rng = np.random.default_rng(8)
    size, vocab = BORDER_ROWS, 4000
    noise = rng.integers(0, 2**32, (size, 4), dtype=np.uint32)
    values = np.full((size, vocab), -60.0, dtype=np.float32)
    wanted = []
    for row in range(size):
        clock = clocks(noise[row], vocab)
        order = np.argsort(clock)
        middle = order[1000:3000]  # clocks of size one: their own rounding is far below 1e-13
        gap = np.diff(clock[middle])
        k = int(np.argmin(np.abs(gap - 5e-6)))  # a float32 of this size is given to 5e-13
        first, second = middle[k], middle[k + 1]
        difference = clock[second] - clock[first]
        values[row, first] = 0.0
        # A step or two of float32 beside a tie, on either side.
        value, side = np.float32(difference), np.float32(rng.choice([-1.0, 1.0]))
        while (float(value) - difference) * side < 1e-13:
            value = np.nextafter(value, side)
        values[row, second] = value
        ahead = float(value) - difference
        assert abs(ahead) < 2e-12
        wanted.append(int(second if ahead > 0 else first))
    rows = Rows.of(
        [None] * size, np.zeros((size, 8), np.uint32), [None] * size, noise, [1.0] * size, device
    )
    assert sample(torch.from_numpy(values).to(device), rows).tolist() == wanted


def test_the_slack_covers_what_the_fast_score_may_be_off() -> None:
    """`_fast_score` in numpy, with the errors that PTX allows lg2.approx at their worst."""
    rng = np.random.default_rng(9)
    n = 1_000_000
    f32 = np.float32
    number = rng.integers(0, 2**32, n, dtype=np.uint32)
    number[: n // 2] >>= rng.integers(0, 32, n // 2, dtype=np.uint32)
    number[n // 4 : n // 2] ^= np.uint32(0xFFFFFFFF)
    number[:6] = [0, 1, 0x0FFFFFFF, 0x10000000, 0xFFFFFFFE, 0xFFFFFFFF]
    logit = (rng.standard_normal(n) * 10.0 ** rng.uniform(-3, 4, n)).astype(f32)
    inverse = 10.0 ** rng.uniform(-2, 2, n)

    def fma(a: np.ndarray, b: np.ndarray | float, c: np.ndarray | float) -> np.ndarray:
        return (np.float64(a) * np.float64(f32(b)) + np.float64(f32(c))).astype(f32)

    def log2(x: np.ndarray) -> np.ndarray:
        exact = np.log2(x.astype(np.float64))
        inside = (x >= 0.5) & (x <= 2.0)
        # 2**-22, absolute in [1/2, 2] and relative elsewhere: PTX ISA, lg2.approx.f32.
        error = np.where(inside, 1.0, np.abs(exact)) * 2.0**-22
        return (exact + rng.choice([-1.0, 1.0], n) * error).astype(f32)

    small = number < 0x10000000
    z = np.where(small, number, ~number).astype(f32)
    z = fma(z, 2.0**-32, 2.0**-33)
    series = fma(z, 0.288539, 0.36067376)
    for term in (0.48089835, 0.7213475, 1.442695):
        series = (z.astype(np.float64) * series.astype(np.float64) + f32(term)).astype(f32)
    clock = np.where(small, z * series, -log2(z))
    scale = (inverse * math.log2(math.e)).astype(f32)
    fast = (logit.astype(np.float64) * scale - log2(clock)).astype(f32).astype(np.float64)
    rest = (4294967295.5 - number) * 2.0**-32
    exact = (logit.astype(np.float64) * inverse - np.log(-np.log(rest))) / math.log(2)
    exact += math.log2(math.log(2))  # the constant by which all fast scores differ
    allowed = fused_kernels.SLACK.value + fused_kernels.RELATIVE_SLACK.value * (np.abs(fast) + 64.0)
    # Two scores may be off, so each may use half; a third of that is kept in reserve.
    assert (np.abs(fast - exact) / (allowed / 2)).max() < 0.67


@on_devices
def test_quantiles_beside_their_borders(device: str) -> None:
    """gamma: a private number a hair below or above a token's share decides for or against it."""
    rng = np.random.default_rng(10)
    size, vocab = BORDER_ROWS, 120
    scheme = fg.GammaReweight()
    keys, windows, noise, _ = batch(rng, [scheme] * size, vocab)
    values = (2.0 * rng.standard_normal((size, vocab))).astype(np.float32)
    wanted = []
    for row in range(size):
        number = prf.field(prf.block(keys[row], windows[row])[prf.FIELD], np.arange(vocab))
        order = np.argsort(number)
        weights = np.exp(values[row].astype(np.float64) - values[row].max())[order]
        shares = np.cumsum(weights) / math.fsum(weights)
        k = int(rng.choice(np.flatnonzero((shares > 0.51) & (shares < 0.98))))
        side = int(rng.choice([-1, 1]))
        v = shares[k] + side * 1e-13
        set_private_uniform(noise[row], 2.0 * v - 1.0)
        wanted.append(int(order[k if side < 0 else k + 1]))
    rows = Rows.of([scheme] * size, keys, windows, noise, [1.0] * size, device)
    assert sample(torch.from_numpy(values).to(device), rows).tolist() == wanted


@on_devices
def test_tournaments_beside_their_borders(device: str) -> None:
    rng = np.random.default_rng(11)
    size, vocab = BORDER_ROWS, 120
    scheme = fg.Tournament()
    keys, windows, noise, _ = batch(rng, [scheme] * size, vocab)
    values = rng.standard_normal((size, vocab)).astype(np.float32)
    wanted = []
    for row in range(size):
        weights = np.exp(values[row].astype(np.float64) - values[row].max())
        law = scheme.reweight(weights / weights.sum(), prf.block(keys[row], windows[row]))
        shares = np.cumsum(law) / math.fsum(law)
        # Neighbours with some probability, so that the border lies between these two.
        inner = np.flatnonzero((law[:-1] > 1e-9) & (law[1:] > 1e-9) & (shares[:-1] < 1 - 1e-9))
        k, side = int(rng.choice(inner)), int(rng.choice([-1, 1]))
        set_private_uniform(noise[row], shares[k] + side * 2e-12)
        wanted.append(k if side < 0 else k + 1)
    rows = Rows.of([scheme] * size, keys, windows, noise, [1.0] * size, device)
    assert sample(torch.from_numpy(values).to(device), rows).tolist() == wanted


def set_private_uniform(noise: np.ndarray, v: float) -> None:
    """Noise words whose `private_uniform` is v, to 53 bits."""
    bits = int(v * 2.0**53)
    noise[0], noise[1] = (bits >> 26) << 5, (bits & 0x3FFFFFF) << 6
    assert private_uniform(noise) == bits * 2.0**-53


# --- the sampler, and what is refused -------------------------------------------------------------


@on_devices
@pytest.mark.parametrize("name", fg.SCHEMES)
def test_the_sampler_writes_what_marked_sampler_writes(name: str, device: str) -> None:
    scheme = fg.SCHEMES[name](context_width=2)
    keys = [fg.Key.generate("a", slots=2), fg.Key.generate("b").user(3), None]
    sampling = fg.Sampling(temperature=0.8)
    seeds = {"sampling": sampling, "slots": [1, None, None]}
    one = FusedSampler(scheme, keys, rng=np.random.default_rng(12), **seeds)
    two = fg.MarkedSampler(scheme, keys, rng=np.random.default_rng(12), **seeds)
    rng = np.random.default_rng(13)
    for _ in range(4):
        logits = peaked_logits(rng, 3, 90)
        tokens = one.sample(torch.from_numpy(logits).to(device))
        assert tokens.tolist() == two.sample(logits).tolist()
    assert one.marked == two.marked and any(one.marked[0]) and not any(one.marked[2])


@on_devices
def test_the_sampler_remembers_nothing_of_a_failed_step(device: str) -> None:
    rng = np.random.default_rng(14)
    sampler = FusedSampler(fg.Gumbel(), [fg.Key.generate("a")] * 2, rng=rng)
    logits = torch.zeros((2, 10), device=device)
    logits[1, 3] = math.nan
    with pytest.raises(LogitsError, match="row 1"):
        sampler.sample(logits)
    assert len(sampler.histories[0]) == 0
    sampler = FusedSampler(fg.Gumbel(), [None], rng=rng, sampling=fg.Sampling(top_k=5))
    with pytest.raises(UnsupportedDecoding, match="-inf"):
        sampler.sample(logits[:1])


def some_rows(
    scheme: Scheme | None = None, window: object = None, temperature: float = 1.0
) -> Rows:
    keys, noise = np.full((1, 8), 0xC0FFEE11, np.uint32), np.zeros((1, 4), np.uint32)
    return Rows.of([scheme], keys, [window], noise, [temperature], "cpu")


def test_rows_refuse_what_makes_no_sense() -> None:
    with pytest.raises(SchemeError, match="looks at 4 tokens"):
        some_rows(fg.Gumbel(), [1, 2, 3])
    with pytest.raises(SchemeError, match="no token id"):
        some_rows(fg.Gumbel(), [1, 2, 3, -1])
    with pytest.raises(UnsupportedDecoding, match="greedy"):
        some_rows(fg.Gumbel(), [1, 2, 3, 4], 0.0)
    with pytest.raises(UnsupportedDecoding, match="1e-6"):
        some_rows(None, None, -1.0)
    with pytest.raises(SchemeError, match="one of each"):
        Rows.of([None], np.zeros((2, 8), np.uint32), [None], np.zeros((1, 4)), [1.0], "cpu")


def test_logits_that_do_not_fit_are_refused() -> None:
    rows = some_rows()
    for logits, message in (
        (torch.zeros((1, 5), dtype=torch.float64), "float32"),
        (torch.zeros((2, 5)), "shape"),
        (torch.zeros(5), "shape"),
        (torch.zeros((1, 0)), "shape"),
        (torch.zeros((5, 2)).t()[:1], "contiguous"),
    ):
        with pytest.raises(LogitsError, match=message):
            sample(logits, rows)
    if not INTERPRETED:
        with pytest.raises(LogitsError, match="CUDA"):
            sample(torch.zeros((1, 5)), rows)


def test_rows_do_not_show_their_keys() -> None:
    rows = some_rows(fg.Gumbel(), [1, 2, 3, 4])
    shown = repr(rows)
    for secret in ("C0FFEE11", "c0ffee11", str(0xC0FFEE11), str(0xC0FFEE11 - 2**32)):
        assert secret not in shown
    with pytest.raises(SecretLeakError):
        pickle.dumps(rows)


def test_cuts_cover_the_vocabulary() -> None:
    for vocab in (1, 1024, 1025, 32_000, 49_152, 151_936, 256_000, fused.MAX_VOCAB):
        for rows in (1, 16, 256, 5000):
            cut = Cut.of(rows, vocab, 132)
            assert (cut.parts - 1) * cut.span < vocab <= cut.parts * cut.span
            assert cut.span % fused._BLOCK == 0 and cut.parts <= fused._MAX_PARTS


# --- the compiler ---------------------------------------------------------------------------------

POINTERS = {
    "table": "*i32", "rows": "*i32", "blocks": "*i32", "peaks": "*fp32", "sums": "*fp32",
    "factors": "*fp64", "prefixes": "*i32", "counters": "*i64", "chunks": "*i64",
    "targets": "*i64", "out": "*i64", "tops": "*fp32", "lanes": "*i32", "seconds": "*fp32",
}  # fmt: skip
TILE = {"BLOCK": fused._BLOCK}
SPECIALISED = [
    *(("race_partials", {"HASH": hash_, **TILE}) for hash_ in (False, True)),
    *(("race_winners", {"HASH": True, "PARTS": 256, "TILES": tiles, **TILE}) for tiles in (1, 16)),
    ("race_winners", {"HASH": False, "PARTS": 16, "TILES": 16, **TILE}),
    ("window_seeds", {"LANES": fused._HASH_LANES}),
    ("law_peaks", TILE),
    *(("law_masses", {"SWEEP": sweep, "PARTS": 16, **TILE}) for sweep in range(3)),
    *(("law_digits", {"SWEEP": sweep}) for sweep in range(3)),
    ("law_chunks", {"PARTS": 16, **TILE}),
    ("law_tokens", {"PARTS": 256, **TILE}),
]


def compiled(
    name: str, constants: dict[str, object], capability: int, dtype: str = "fp32", aligned: int = 1
) -> "triton.compiler.CompiledKernel":
    """A kernel made for a GPU that need not be there."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(fused_kernels, name)
    types = {}
    for parameter in kernel.arg_names:
        if parameter in constants:
            types[parameter] = "constexpr"
        elif parameter == "logits":
            types[parameter] = f"*{dtype}"
        else:
            types[parameter] = POINTERS.get(parameter, "i32")
    divisible = [
        place
        for place, parameter in enumerate(kernel.arg_names)
        if parameter in POINTERS
        or parameter == "span"
        or (aligned and parameter in ("logits", "stride", "vocab"))
    ]
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs=constants,
        attrs={(place,): [["tt.divisibility", 16]] for place in divisible},
    )
    warps = 1 if name == "window_seeds" else fused._WARPS
    options = {"num_warps": warps, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@compiler
@pytest.mark.parametrize(("name", "constants"), SPECIALISED)
@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_for_a_gpu(
    capability: int, name: str, constants: dict[str, object],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # or it may only be looked up
    kernel = compiled(name, constants, capability)
    assert ".visible .entry" in kernel.asm["ptx"] and f"sm_{capability}" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= 48 * 1024
    assert len(kernel.asm["cubin"]) > 1000  # ptxas took it too


@compiler
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("aligned", [0, 1])
@pytest.mark.parametrize("name", ["race_partials", "race_winners", "law_masses"])
def test_every_type_and_alignment_compiles(
    name: str, aligned: int, dtype: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = next(c for n, c in SPECIALISED if n == name)
    kernel = compiled(name, constants, 90, dtype, aligned)
    # The offset of a row is a product of 64 bits: batch * vocabulary may pass 2**31.
    assert re.search(r"%base = arith\.extsi %stride : i32 to i64", kernel.asm["ttir"])
    assert re.search(r"arith\.muli %row\w*, %base : i64", kernel.asm["ttir"])
    if name != "race_partials":
        return
    ptx = kernel.asm["ptx"]
    # Eight tokens per thread: whole 16 bytes per load where rows are aligned.
    loads = 2 if dtype == "fp32" else 1
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == (loads if aligned else 0)
    # Two logarithms and one maximum per token, and no float64 but 1 / temperature.
    assert len(re.findall(r"lg2\.approx\.(ftz\.)?f32", ptx)) == 16
    assert len(re.findall(r"max\.NaN\.f32", ptx)) == 8
    assert len(re.findall(r"(mul|add|fma|div)\.rn\.f64", ptx)) == 1


# --- what only a GPU shows ------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
@pytest.mark.parametrize("vocab", [32_000, 151_936, 256_000])
def test_real_vocabularies(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    schemes = cycle([*RACES, *LAW_SCHEMES], 66)
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.from_numpy(peaked_logits(rng, 66, vocab)).to(dtype)
        for parts in (None, 7):
            compare("cuda", schemes, logits, rng, parts)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_logits_of_more_than_two_to_the_31_elements() -> None:
    rng = np.random.default_rng(15)
    far = torch.empty(2**31 + 5000, dtype=torch.bfloat16, device="cuda")
    logits = far.as_strided((2, 5000), (2**31, 1))
    values = torch.from_numpy(peaked_logits(rng, 2, 5000)).to(torch.bfloat16)
    logits.copy_(values)
    for schemes in ([fg.Gumbel(), None], [fg.DeltaReweight(), fg.Tournament()]):
        keys, windows, noise, temperatures = batch(rng, schemes, 5000)
        rows = Rows.of(schemes, keys, windows, noise, temperatures, "cuda")
        wanted = expected(schemes, keys, windows, noise, temperatures, values.float().numpy())
        assert sample(logits, rows).tolist() == wanted


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_the_same_step_a_hundred_times() -> None:
    """Atomic additions meet in another order each time; of integers that changes nothing."""
    rng = np.random.default_rng(16)
    schemes = cycle([*RACES, *LAW_SCHEMES], 64)
    logits = torch.from_numpy(peaked_logits(rng, 64, 50_257)).cuda()
    keys, windows, noise, temperatures = batch(rng, schemes, 50_257)
    rows = Rows.of(schemes, keys, windows, noise, temperatures, "cuda")
    first = sample(logits, rows).tolist()
    for turn in range(100):
        assert sample(logits, rows, parts=1 + turn % 9).tolist() == first


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_no_memory_as_large_as_the_logits() -> None:
    rng = np.random.default_rng(17)
    logits = torch.randn((256, 151_936), device="cuda")
    for scheme, bytes_per_row in ((fg.Gumbel(), 4096), (fg.Tournament(), 65_536)):
        schemes = [scheme] * 256
        keys, windows, noise, temperatures = batch(rng, schemes, 151_936)
        rows = Rows.of(schemes, keys, windows, noise, temperatures, "cuda")
        sample(logits, rows)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        sample(logits, rows)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - before < 256 * bytes_per_row


# --- the benchmark --------------------------------------------------------------------------------


@compiler
@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_the_benchmark_invents_nothing() -> None:
    from filigrane.bench import fused as bench

    with pytest.raises(MissingDependency, match="nothing was measured"):
        bench.run(quick=True)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="no CUDA device")
def test_the_benchmark_runs() -> None:
    from filigrane.bench import fused as bench

    document = bench.run(quick=True)
    assert document == json.loads(json.dumps(document, allow_nan=False))
    cases = {row["case"] for row in document["rows"]}
    assert {"plain", "copy", "unmarked", "all schemes", "pack", *fg.SCHEMES} <= cases
    assert all(row["median_us"] > 0 for row in document["rows"])
