"""Marked sampling in one pass over logits that lie on a GPU: the host's side of `fused_kernels`.

    Rows            what is to happen to each row of a step: scheme, key, window, temperature, noise
    sample          logits (batch, V) -> token ids (batch,); nothing read back, logits not copied
    FusedSampler    `embedding.MarkedSampler` for tensors on a GPU: the same tokens

Rows of one batch may differ in everything, and unmarked and greedy rows are rows like others.
Top-k, top-p, min-p, penalties and bans come before, as -inf in the logits; the temperature is
applied here. What "the same tokens" means, to the last digit: docs/design/0009-fused-kernel.md.
Knows nothing of engines, prompts or where keys come from.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Never

import numpy as np
import numpy.typing as npt

from filigrane import prf
from filigrane.contexts import TokenIds
from filigrane.embedding import MarkedSampler
from filigrane.errors import (
    LogitsError,
    MissingDependency,
    SchemeError,
    SecretLeakError,
    UnsupportedDecoding,
    VocabularyMismatch,
)
from filigrane.schemes.base import Scheme
from filigrane.schemes.greenlist import GreenList
from filigrane.schemes.gumbel import Gumbel
from filigrane.schemes.tournament import Tournament
from filigrane.schemes.unbiased import DeltaReweight, GammaReweight

try:
    import torch

    from filigrane.adapters import fused_kernels as kernels
except ImportError as error:
    raise MissingDependency(
        "the fused kernel needs torch and triton (Linux): pip install 'filigrane[torch]' triton"
    ) from error

__all__ = ["MAX_VOCAB", "NOT_FINITE", "FusedSampler", "Rows", "sample"]

NOT_FINITE: Final = -1
"""Instead of a token: the row holds NaN or +inf (perhaps after division by the temperature), or
nothing above -inf."""
MAX_VOCAB: Final = 2**20
"""Beyond any vocabulary; the bounds of the design note hold up to here."""

_BLOCK: Final = 1024
"""Tokens that a program looks at together, eight per thread: two loads of 16 bytes of float32."""
_WARPS: Final = 4
_PROGRAMS_PER_CORE: Final = 16
_CORES_OFF_DEVICE: Final = 4
"""Stands for a device in Triton's interpreter: rows are cut as on a very small one."""
_PROGRAMS_THAT_HASH: Final = 8
"""Up to so many programs per multiprocessor each hash their row's window themselves: that is faster
than another launch. More of them would hash the same windows over and over."""
_HASH_LANES: Final = 32
_MAX_PARTS: Final = 1024
_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
_SWEEPS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Rows:
    """What a step does to each row, where the logits are; made by `Rows.of`.

    size: rows; races: (r,) int32, the rows that are gumbel, greenlist, unmarked or greedy, or None
    if there are none; laws: the same for delta, gamma and tournament; tournaments: whether one of
    these is a tournament. Holds keys: it is not shown and cannot be pickled.
    """

    size: int
    races: torch.Tensor | None = field(repr=False)
    laws: torch.Tensor | None = field(repr=False)
    tournaments: bool
    table: torch.Tensor = field(repr=False)

    def __reduce_ex__(self, protocol: object) -> Never:
        raise SecretLeakError(
            "Rows hold keys and cannot be pickled; make them where they are used."
        )

    @classmethod
    def of(
        cls,
        schemes: Sequence[Scheme | None],
        keys: npt.NDArray[np.uint32],
        windows: Sequence[npt.ArrayLike | None],
        noise: npt.NDArray[np.uint32],
        temperatures: Sequence[float],
        device: "torch.device | str",
    ) -> "Rows":
        """Pack a batch and send it to a device in one copy.

        schemes: one per row, None for unmarked; keys (batch, 8) uint32, words of `prf_keys`, zeros
        where there is none; windows: the context_width ids before the position, oldest first, or
        None: the position is not marked; noise: (batch, 4) uint32, private and new in each step;
        temperatures: as `embedding.Sampling`, 0 is greedy. Raises SchemeError for schemes without a
        kernel and arguments that do not fit together, UnsupportedDecoding for temperatures that
        make no sense with the scheme.
        """
        size = len(schemes)
        if not len(windows) == len(temperatures) == size or not (
            keys.shape == (size, 8) and noise.shape == (size, 4)
        ):
            raise SchemeError(
                f"{size} schemes, {len(windows)} windows, {len(temperatures)} temperatures, keys "
                f"{keys.shape}, noise {noise.shape}; pass one of each per row, keys (batch, 8) and "
                "noise (batch, 4)."
            )
        widest = max((scheme.context_width for scheme in schemes if scheme is not None), default=1)
        chunks = -(-widest // prf.WORDS_PER_CHUNK)
        columns = kernels.TABLE_HEAD + chunks * prf.WORDS_PER_CHUNK
        table = np.zeros((size, columns), dtype=np.uint32)
        table[:, kernels.TABLE_HEAD :] = prf.PADDING
        table[:, kernels.KEY.value : kernels.KEY.value + 8] = keys
        table[:, kernels.NOISE.value : kernels.NOISE.value + 4] = noise
        races, laws, tournaments = [], [], False
        for row, (scheme, window, temperature) in enumerate(
            zip(schemes, windows, temperatures, strict=True)
        ):
            entry = table[row]
            entry[kernels.SCALE.value : kernels.SCALE.value + 2] = _scale(temperature).view("<u4")
            if scheme is None or window is None:
                races.append(row)
                continue
            _describe(entry, scheme, window)
            if isinstance(scheme, Gumbel | GreenList):
                races.append(row)
            else:
                laws.append(row)
                tournaments = tournaments or isinstance(scheme, Tournament)
            if temperature == 0 and scheme.acts_on == "distribution":
                raise UnsupportedDecoding(
                    f"row {row}: {scheme.name} cannot mark greedy decoding. Pass no window for "
                    "this row, sample with a temperature above 0, or use greenlist."
                )
        # One copy for everything: the two lists of rows travel behind the table.
        order = np.array(races + laws, dtype=np.int32)
        packed = np.concatenate([table.view(np.int32).reshape(-1), order])
        sent = torch.from_numpy(packed).to(device)
        rest = sent[table.size :]
        return cls(
            size=size,
            races=rest[: len(races)] if races else None,
            laws=rest[len(races) :] if laws else None,
            tournaments=tournaments,
            table=sent[: table.size].view(table.shape),
        )


def _scale(temperature: float) -> npt.NDArray[np.float64]:
    """1 / temperature, and 0.0 for greedy."""
    if temperature != 0 and not 1e-6 <= temperature < float("inf"):
        raise UnsupportedDecoding(
            f"temperature must be 0 (greedy) or between 1e-6 and infinity, got {temperature}."
        )
    return np.array([1.0 / temperature if temperature else 0.0], dtype="<f8")


def _describe(entry: npt.NDArray[np.uint32], scheme: Scheme, window: npt.ArrayLike) -> None:
    """Write scheme and window of a marked row into its line of the table."""
    ids = np.asarray(window)
    if ids.shape != (scheme.context_width,):
        raise SchemeError(
            f"{scheme.name} looks at {scheme.context_width} tokens, the window has shape "
            f"{ids.shape}; pass exactly these, oldest first, or None for an unmarked row."
        )
    if ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() > prf.MAX_TOKEN_ID:
        raise SchemeError(
            "a window holds something that is no token id (a placeholder such as -1?); "
            "pass None for this row until its tokens are known."
        )
    if isinstance(scheme, Gumbel):
        kind = kernels.GUMBEL
    elif isinstance(scheme, GreenList):
        kind = kernels.GREENLIST
        entry[kernels.THRESHOLD.value] = scheme.threshold
        bias = np.array([scheme.delta], dtype=np.float32)
        entry[kernels.BIAS.value] = bias.view(np.uint32)[0]
    elif isinstance(scheme, DeltaReweight):
        kind = kernels.DELTA
    elif isinstance(scheme, GammaReweight):
        kind = kernels.GAMMA
    elif isinstance(scheme, Tournament):
        kind = kernels.TOURNAMENT
        entry[kernels.DEPTH.value] = scheme.depth
    else:
        raise SchemeError(
            f"{scheme.name} has no fused kernel; use adapters.torch.reweight_logits for it."
        )
    entry[kernels.KIND.value] = kind.value
    entry[kernels.CHUNKS.value] = -(-scheme.context_width // prf.WORDS_PER_CHUNK)
    head = kernels.TABLE_HEAD
    entry[head : head + scheme.context_width] = ids.astype(np.uint32)


def sample(logits: torch.Tensor, rows: Rows, *, parts: int | None = None) -> torch.Tensor:
    """One token id per row: logits (batch, V) -> (batch,) int64 on the same device.

    logits: float32, bfloat16 or float16, any row stride, unit stride along V, before temperature;
    -inf for tokens that must not be drawn. They are only read. Rows from which nothing can be drawn
    get NOT_FINITE. Returns without waiting for the device. parts: into how many programs a row is
    cut; None chooses, the tokens are the same for all. Raises LogitsError for shapes and types.
    """
    vocab = _checked(logits, rows)
    out = torch.empty(rows.size, dtype=torch.int64, device=logits.device)
    if rows.races is not None:
        _run_races(logits, vocab, rows, rows.races, parts, out)
    if rows.laws is not None:
        _run_laws(logits, vocab, rows, rows.laws, parts, out)
    return out


def _checked(logits: torch.Tensor, rows: Rows) -> int:
    """The width of the vocabulary."""
    if not isinstance(logits, torch.Tensor) or logits.dtype not in _DTYPES:
        raise LogitsError("logits must be a torch tensor of float32, bfloat16 or float16.")
    if logits.ndim != 2 or logits.shape[0] != rows.size or logits.shape[1] == 0:
        raise LogitsError(
            f"logits must have shape ({rows.size}, vocabulary), got {tuple(logits.shape)}."
        )
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise LogitsError("a row of logits must be contiguous; pass logits.contiguous().")
    if logits.shape[1] > MAX_VOCAB:
        raise LogitsError(f"the kernel takes vocabularies of up to {MAX_VOCAB} tokens.")
    if logits.device != rows.table.device:
        raise LogitsError(
            f"logits are on {logits.device}, the rows on {rows.table.device}; make Rows with the "
            "device of the logits."
        )
    if logits.device.type != "cuda" and not kernels.INTERPRETED.value:
        raise LogitsError(
            f"logits are on {logits.device} and the fused kernel runs on CUDA devices; on a CPU "
            "use embedding.MarkedSampler."
        )
    return int(logits.shape[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How rows are cut: `parts` programs per row, each with `span` tokens (the last with fewer)."""

    parts: int
    span: int

    @classmethod
    def of(cls, rows: int, vocab: int, cores: int, parts: int | None = None) -> "Cut":
        """Enough programs for `cores` multiprocessors, but whole blocks."""
        blocks = -(-vocab // _BLOCK)
        wanted = parts or -(-_PROGRAMS_PER_CORE * cores // rows)
        tiles = -(-blocks // max(1, min(wanted, blocks, _MAX_PARTS)))
        return cls(parts=-(-blocks // tiles), span=tiles * _BLOCK)


def _cores(device: torch.device) -> int:
    if device.type != "cuda":
        return _CORES_OFF_DEVICE
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _run_races(
    logits: torch.Tensor,
    vocab: int,
    rows: Rows,
    races: torch.Tensor,
    parts: int | None,
    out: torch.Tensor,
) -> None:
    count = races.shape[0]
    cut = Cut.of(count, vocab, _cores(logits.device), parts)
    tops, seconds = torch.empty((2, count, cut.parts), device=logits.device)
    lanes = torch.empty((count, cut.parts), dtype=torch.int32, device=logits.device)
    blocks = torch.empty((count, 8), dtype=torch.int32, device=logits.device)
    columns = rows.table.shape[1]
    common = (logits, logits.stride(0), vocab, rows.table, columns, races, cut.span, blocks)
    alone = count * cut.parts <= _PROGRAMS_THAT_HASH * _cores(logits.device)
    tiles = {"HASH": alone, "BLOCK": _BLOCK, "num_warps": _WARPS, "enable_fp_fusion": False}
    with _on(logits.device):
        if not alone:
            _hash(rows, races, blocks)
        kernels.race_partials[(count, cut.parts)](*common, tops, lanes, seconds, **tiles)
        kernels.race_winners[(count,)](
            *common,
            tops,
            lanes,
            seconds,
            cut.parts,
            out,
            PARTS=_power(cut.parts),
            TILES=_power(cut.span // _BLOCK),
            **tiles,
        )


def _run_laws(
    logits: torch.Tensor,
    vocab: int,
    rows: Rows,
    laws: torch.Tensor,
    parts: int | None,
    out: torch.Tensor,
) -> None:
    count, device = laws.shape[0], logits.device
    cut = Cut.of(count, vocab, _cores(device), parts)
    blocks = torch.empty((count, 8), dtype=torch.int32, device=device)
    peaks, sums = torch.empty((2, count, cut.parts), device=device)
    counters = torch.zeros(
        (_SWEEPS, count, kernels.BUCKETS.value), dtype=torch.int64, device=device
    )
    prefixes = torch.zeros(count, dtype=torch.int32, device=device)
    targets = torch.zeros(count, dtype=torch.int64, device=device)
    factors = torch.ones((count, kernels.LAYERS.value, 2), dtype=torch.float64, device=device)
    columns = rows.table.shape[1]
    common = (logits, logits.stride(0), vocab, rows.table, columns, laws, cut.span)
    grid, padded = (count, cut.parts), _power(cut.parts)
    tiles = {"BLOCK": _BLOCK, "num_warps": _WARPS, "enable_fp_fusion": False}
    with _on(device):
        _hash(rows, laws, blocks)
        kernels.law_peaks[grid](*common, peaks, sums, **tiles)
        frame = (*common, cut.parts, blocks, peaks, sums)
        for sweep in range(_SWEEPS):
            kernels.law_masses[grid](
                *frame, prefixes, factors, counters[sweep], SWEEP=sweep, PARTS=padded, **tiles
            )
            kernels.law_digits[(count,)](
                rows.table,
                columns,
                laws,
                blocks,
                counters[sweep],
                prefixes,
                targets,
                factors,
                out,
                SWEEP=sweep,
                num_warps=_WARPS,
                enable_fp_fusion=False,
            )
        if rows.tournaments:
            chunks = torch.empty((count, cut.parts), dtype=torch.int64, device=device)
            kernels.law_chunks[grid](*frame, factors, chunks, PARTS=padded, **tiles)
            kernels.law_tokens[(count,)](*frame, factors, chunks, out, PARTS=padded, **tiles)


def _hash(rows: Rows, chosen: torch.Tensor, blocks: torch.Tensor) -> None:
    """Hash the windows of the chosen rows: blocks (chosen, 8) int32."""
    columns = rows.table.shape[1]
    most = (columns - kernels.TABLE_HEAD) // prf.WORDS_PER_CHUNK
    count = chosen.shape[0]
    kernels.window_seeds[(-(-count // _HASH_LANES),)](
        rows.table, columns, chosen, count, most, blocks, LANES=_HASH_LANES, num_warps=1
    )


def _on(device: torch.device) -> Any:
    """Launches go to the current device, which need not be that of the logits."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


class FusedSampler(MarkedSampler):
    """`MarkedSampler` for logits on a GPU: the same arguments, history, rule and tokens.

    sampling: the temperature only. Top-k and top-p are the caller's, as -inf in the logits.
    Waits for the device once per step, because the rule of windows needs the tokens.
    """

    def sample(self, logits: Any) -> TokenIds:
        """Draw one token per row and remember it: logits (batch, V) tensor -> (batch,) int64.

        Raises as `MarkedSampler.sample`, and UnsupportedDecoding for top-k and top-p.
        """
        if self.sampling.top_p != 1.0 or self.sampling.top_k > 0:
            raise UnsupportedDecoding(
                "the fused kernel applies no top-k and no top-p; set what they drop to -inf in the "
                "logits and pass Sampling(temperature=...)."
            )
        size = len(self.histories)
        if self._ids.shape[0] not in (0, logits.shape[-1]):
            raise VocabularyMismatch(
                f"logits are {logits.shape[-1]} wide, earlier steps had {self._ids.shape[0]}."
            )
        marked = self._has_key & np.array([history.fresh() for history in self.histories])
        windows = [
            history.window() if fresh else None
            for history, fresh in zip(self.histories, marked.tolist(), strict=True)
        ]
        noise = self._rng.integers(0, 2**32, size=(size, 4), dtype=np.uint32)
        rows = Rows.of(
            [self.scheme] * size,
            self._key_words,
            windows,
            noise,
            [self.sampling.temperature] * size,
            logits.device,
        )
        tokens: TokenIds = sample(logits, rows).cpu().numpy()
        if (tokens < 0).any():
            raise LogitsError(
                f"row {int(np.argmin(tokens))}: logits hold NaN or +inf (perhaps after division by "
                "the temperature), or nothing above -inf; no token can be drawn. Check the model's "
                "dtype (float16 overflows) and your logit masks."
            )
        self._ids = np.arange(logits.shape[-1], dtype=np.uint32)
        for row, token in enumerate(tokens.tolist()):
            self.push(row, token, marked=bool(marked[row]))
        return tokens
