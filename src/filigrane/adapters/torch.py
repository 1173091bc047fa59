"""The PRF and the schemes on torch tensors, on any device: the same bits, the same laws.

    block, field            twins of `prf.block` and `prf.field`, bit for bit
    fresh, fresh_at         twins of `contexts.History.fresh`, for a whole batch
    reweight_logits         twins of `scheme.reweight`, from logits to logits
    draw_quantile           a draw from such a law by private words

Words travel as int32 tensors that hold the bits of uint32: int32 is the only 32-bit type for which
torch has all the arithmetic, and it wraps. Laws are computed in float64. Nothing here reads a
tensor back to the host, so a GPU never waits. Knows nothing of transformers, keys or prompts.
"""

from typing import Final, cast

import numpy as np
import numpy.typing as npt

from filigrane import prf
from filigrane.errors import MissingDependency
from filigrane.schemes.base import Scheme
from filigrane.schemes.greenlist import GreenList
from filigrane.schemes.gumbel import Gumbel
from filigrane.schemes.tournament import Tournament
from filigrane.schemes.unbiased import DeltaReweight, GammaReweight

try:
    import torch
except ImportError as error:
    raise MissingDependency(
        "marking on torch tensors needs torch: pip install 'filigrane[torch]'"
    ) from error

__all__ = ["block", "draw_quantile", "field", "fresh", "fresh_at", "reweight_logits", "to_words"]

_SIGN: Final = -(2**31)


def _signed(word: int) -> int:
    """A 32-bit word as torch takes it: the int32 with the same bits."""
    return word - 2**32 if word >= 2**31 else word


_CONSTANTS: Final = tuple(_signed(c) for c in prf.CONSTANTS)
_MIX: Final = tuple(_signed(c) for c in (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB))


def to_words(array: npt.ArrayLike, device: "torch.device | str | None" = None) -> torch.Tensor:
    """uint32 numbers of numpy as an int32 tensor of the same bits and shape."""
    words = np.array(array, dtype=np.uint32).view(np.int32)
    return torch.from_numpy(words).to(device)


def _shift_right(x: torch.Tensor, n: int) -> torch.Tensor:
    # int32 shifts copy the sign bit down; the mask takes the copies away.
    return (x >> n) & ((1 << (32 - n)) - 1)


def _rotate_left(x: torch.Tensor, n: int) -> torch.Tensor:
    return (x << n) | _shift_right(x, 32 - n)


def _chacha_block(key: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    """The first 8 words of `prf.chacha_block`: key (n, 8) and inputs (n, 4), int32 -> (n, 8)."""
    # The state's 4 x 4 words as four rows, so that one instruction does four quarter rounds: a step
    # of generation waits for these operations one after another, not for their size.
    constants = torch.tensor(_CONSTANTS, dtype=torch.int32, device=key.device)
    a = first = constants.expand(inputs.shape)
    b, c, d = key[:, :4], key[:, 4:], inputs
    for round_ in range(prf.ROUNDS):
        a = a + b
        d = _rotate_left(d ^ a, 16)
        c = c + d
        b = _rotate_left(b ^ c, 12)
        a = a + b
        d = _rotate_left(d ^ a, 8)
        c = c + d
        b = _rotate_left(b ^ c, 7)
        # From columns to diagonals, and back.
        turn = 1 if round_ % 2 == 0 else -1
        b, c, d = b.roll(-turn, -1), c.roll(2, -1), d.roll(turn, -1)
    return torch.cat([a + first, b + key[:, :4]], dim=-1)


def block(keys: torch.Tensor, contexts: torch.Tensor) -> torch.Tensor:
    """`prf.block` row by row: keys (n, 8) int32 words, contexts (n, w) token ids, oldest first.

    contexts: any integer type. Returns (n, 8) int32 words on the same device.
    """
    inputs = contexts.to(torch.int32)
    missing = -inputs.shape[-1] % prf.WORDS_PER_CHUNK
    inputs = torch.nn.functional.pad(inputs, (0, missing), value=_signed(prf.PADDING))
    for chunk in inputs.split(prf.WORDS_PER_CHUNK, dim=-1):
        keys = _chacha_block(keys, chunk)
    return keys


def field(seeds: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """`prf.field`: seeds (..., 4) int32, words FIELD of a block; tokens (...) ids -> (...) int32.

    Leading axes broadcast.
    """
    h = tokens.to(torch.int32) + seeds[..., 0]
    h = (h ^ _shift_right(h, 17)) * _MIX[0] ^ seeds[..., 1]
    h = (h ^ _shift_right(h, 11)) * _MIX[1] ^ seeds[..., 2]
    h = (h ^ _shift_right(h, 15)) * _MIX[2] ^ seeds[..., 3]
    return h ^ _shift_right(h, 14)


def fresh(outputs: torch.Tensor, width: int) -> torch.Tensor:
    """Whether the next position of each row is to be marked: the rule of `contexts.History`.

    outputs: (batch, n) token ids written so far, without prompts. Returns (batch,) bool. Stateless:
    rows may be reordered between steps, as beam search does.
    """
    if outputs.shape[1] < width:
        return torch.zeros(outputs.shape[0], dtype=torch.bool, device=outputs.device)
    windows = outputs.unfold(1, width, 1)
    return ~(windows[:, :-1] == windows[:, -1:]).all(dim=-1).any(dim=-1)


def fresh_at(
    tokens: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, width: int
) -> torch.Tensor:
    """`fresh` for rows of different lengths, which hold their prompts too.

    tokens: (batch, n) ids; row i's text is tokens[i, starts[i] : ends[i]]. starts, ends: (batch,)
    int64. Returns (batch,) bool.
    """
    if tokens.shape[1] < width:
        return torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    windows = tokens.unfold(1, width, 1)
    last = (ends - width).clamp(0, windows.shape[1] - 1)
    own = windows.gather(1, last[:, None, None].expand(-1, 1, width))
    at = torch.arange(windows.shape[1], device=tokens.device)
    earlier = (at >= starts[:, None]) & (at < last[:, None])
    repeated = ((windows == own).all(dim=-1) & earlier).any(dim=-1)
    return (ends - starts >= width) & ~repeated


def reweight_logits(scheme: Scheme, logits: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """What a marked position is drawn from: logits (batch, V) and blocks (batch, 8) -> (batch, V).

    Schemes that act on logits return biased logits (for others to warp and draw from); the rest
    return the log-probabilities of `scheme.reweight(softmax(logits))`, -inf for no chance, with one
    0 per row if the scheme is deterministic. blocks: int32 words, from `block` or `to_words`. Type
    and device are those of logits. Rows from which nothing can be drawn (NaN, +inf, nothing above
    -inf) come back as they are, for the caller to refuse.
    """
    if isinstance(scheme, GreenList):
        limit = _signed(scheme.threshold) ^ _SIGN
        green = (_fields(blocks, logits) ^ _SIGN) < limit  # unsigned comparison
        return torch.where(green, logits + scheme.delta, logits)
    if isinstance(scheme, Gumbel):
        marked = _gumbel(logits, blocks)
    elif isinstance(scheme, Tournament):
        marked = _tournament(scheme, logits, blocks)
    elif isinstance(scheme, DeltaReweight):
        marked = _delta(logits, blocks)
    elif isinstance(scheme, GammaReweight):
        marked = _gamma(logits, blocks)
    else:
        marked = _by_definition(scheme, logits, blocks)
    peak = logits.amax(dim=-1, keepdim=True)
    return torch.where(torch.isfinite(peak), marked.to(logits.dtype), logits)


def draw_quantile(log_probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw a token from each row's law by its own private words: the quantile, by id.

    log_probs: (batch, V), as `reweight_logits` returns them; noise: (batch, 4) int32 words. Returns
    (batch,) int64.
    """
    probs = torch.softmax(log_probs.to(torch.float64), dim=-1)
    cumulative = probs.cumsum(dim=-1)
    high = _shift_right(noise[:, 0], 5).to(torch.float64)
    low = _shift_right(noise[:, 1], 6).to(torch.float64)
    target = (high * 2.0**26 + low)[:, None] * 2.0**-53 * cumulative[:, -1:]
    # Parallel sums are not monotone in their last digits: never land on an impossible token.
    return ((cumulative > target) & (probs > 0.0)).to(torch.int32).argmax(dim=-1)


def _fields(blocks: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The keyed number of every token: (batch, V) int32 words."""
    tokens = torch.arange(logits.shape[-1], dtype=torch.int32, device=logits.device)
    return field(blocks[:, None, prf.FIELD], tokens)


def _open_uniform(words: torch.Tensor) -> torch.Tensor:
    """`prf.open_uniform`: int32 words -> float64."""
    # Flipping the sign bit turns unsigned order into signed order, 2**31 lower.
    return ((words ^ _SIGN).to(torch.float64) + (2.0**31 + 0.5)) * 2.0**-32


def _one_hot(winners: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of certain tokens: winners (batch, 1) -> 0 there, -inf elsewhere."""
    return torch.full_like(like, -torch.inf).scatter_(-1, winners, 0.0)


def _gumbel(logits: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    x = _open_uniform(_fields(blocks, logits))
    race = logits.to(torch.float64) - torch.log(-torch.log1p(-x))
    return _one_hot(race.argmax(dim=-1, keepdim=True), logits)


def _tournament(scheme: Tournament, logits: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    numbers = _fields(blocks, logits)
    probs = torch.softmax(logits.to(torch.float64), dim=-1)
    for layer in range(scheme.depth):
        ones = ((numbers >> layer) & 1).to(torch.float64)
        mass = (probs * ones).sum(dim=-1, keepdim=True)
        probs = probs * (1.0 - mass + ones)
    # A layer's mass may round to just above one.
    return torch.log(probs.clamp_min(0.0))


def _in_keyed_order(
    logits: torch.Tensor, blocks: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Order of the tokens by keyed number; probabilities and cumulative sums in that order."""
    order = (_fields(blocks, logits) ^ _SIGN).argsort(dim=-1)
    probs = torch.softmax(logits.to(torch.float64), dim=-1).gather(-1, order)
    return order, probs, probs.cumsum(dim=-1)


def _delta(logits: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    order, probs, cumulative = _in_keyed_order(logits, blocks)
    target = _open_uniform(blocks[:, prf.COIN])[:, None] * cumulative[:, -1:]
    # Parallel sums are not monotone in their last digits: never land on an impossible token.
    beyond = (cumulative > target) & (probs > 0.0)
    rank = beyond.to(torch.int32).argmax(dim=-1, keepdim=True)
    return _one_hot(order.gather(-1, rank), logits)


def _gamma(logits: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    order, probs, cumulative = _in_keyed_order(logits, blocks)
    upper = (2.0 * cumulative / cumulative[:, -1:] - 1.0).clamp_min(0.0)
    mass = upper.diff(dim=-1, prepend=torch.zeros_like(upper[:, :1])).clamp_min(0.0)
    mass = torch.where(probs > 0.0, mass, 0.0)
    return torch.log(torch.zeros_like(mass).scatter_(-1, order, mass))


def _by_definition(scheme: Scheme, logits: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
    """Schemes without a twin here: their numpy reference, through the host."""
    probs = torch.softmax(logits.to(torch.float64), dim=-1).cpu().numpy()
    words = cast(npt.NDArray[np.uint32], blocks.cpu().numpy().view(np.uint32))
    with np.errstate(divide="ignore"):
        marked = np.log(scheme.reweight(probs, words))
    return torch.from_numpy(marked).to(logits.device)
