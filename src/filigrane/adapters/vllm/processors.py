"""The marks in vLLM: two logits processors, each for both of vLLM's interfaces.

    GreenListProcessor   biases raw logits, before penalties and temperature
    SamplingProcessor    all other schemes: draws the token itself and leaves vLLM nothing else

Under interface V1, vLLM calls the second one after temperature and min-p; it applies top-k and
top-p itself. Under V2 every processor comes before temperature, so there it applies all four.
Either way one token remains, which vLLM's own truncation and draw then cannot change. Positions
without a mark are left to vLLM.

V1 tells which tokens a request has, on the host; a text's state is a `serving.MarkedText` there.
Under V2 tokens live on the device, and everything about them is computed there without waiting for
it. What vLLM preempted says itself, when it comes back, which slot it is marked with.
"""

import itertools
import logging
import weakref
from typing import Any, ClassVar, Final

import numpy as np

from filigrane.adapters.vllm import admission, launch
from filigrane.embedding import Sampling
from filigrane.errors import LogitsError, MissingDependency, NotReady, TokenError
from filigrane.schemes.base import Scheme
from filigrane.serving.drawing import Drawer, only
from filigrane.serving.live import current
from filigrane.serving.orders import Mark
from filigrane.serving.readiness import known_answers
from filigrane.serving.texts import MarkedText, blocks

try:
    import torch
    from vllm.v1.sample.logits_processor import LogitsProcessor as ProcessorV1
    from vllm.v1.sample.logits_processor.builtin import process_dict_updates
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as ProcessorV2
except ImportError as error:
    raise MissingDependency(
        "marking inside vLLM needs vLLM 0.30 or newer: pip install 'filigrane[vllm]'"
    ) from error

from filigrane.adapters.torch import block, draw_quantile, fresh_at, reweight_logits, to_words

try:
    from filigrane.adapters import fused
except MissingDependency:  # no Triton: the operations of torch do the same
    fused = None  # type: ignore[assignment]

_log = logging.getLogger("vllm.filigrane")

_COUNT_EVERY: Final = 64
"""Steps of V2 between two looks at what was marked."""


class _Row:
    """One request in the batch (V1): what vLLM has written, and how it is marked and drawn."""

    __slots__ = ("mark", "nonce", "sampling", "seed", "text", "written")

    def __init__(
        self, mark: Mark, written: list[int], sampling: Sampling, seed: int | None, nonce: str
    ) -> None:
        self.mark, self.written, self.sampling = mark, written, sampling
        self.seed, self.nonce = seed, nonce
        self.text: MarkedText | None = None

    def now(self) -> MarkedText:
        """The text as it stands. Made at its first step: before, vLLM may not show all of it."""
        if self.text is None:
            self.text = MarkedText(
                self.mark, seed=self.seed, nonce=self.nonce, written=self.written
            )
        if len(self.written) < len(self.text):
            # vLLM takes tokens back when it could not load what they were computed from.
            self.text.back_to(len(self.written))
        self.text.advance(self.written)
        return self.text


class _Processor(ProcessorV1, ProcessorV2):
    """What both processors share. vLLM makes one of each in every process that runs the model."""

    stage: ClassVar[str]
    """What `Scheme.acts_on` says of the schemes that a processor marks."""
    _made: ClassVar[dict[str, Any]] = {}

    def __init__(self, vllm_config: Any, where: Any, is_pin_memory: bool | None = None) -> None:
        """Called by vLLM: where is a device (V1) or the requests' state (V2).

        Raises NotReady if marks made here would not be found, or text would go unmarked.
        """
        self._v2: _DeviceRows | None = None
        self._rows: dict[int, _Row] = {}
        self._drawer: Drawer | None = None
        self._numbers = itertools.count()
        self._told = False
        keys = admission.live_engine()
        ring = current(keys)
        self._active = ring is not None and not self._loaded_twice(vllm_config)
        if ring is None or not self._active:
            return
        of_stage = [scheme for scheme in ring.schemes if scheme.acts_on == self.stage]
        self._check_placeholders(vllm_config, v1=isinstance(where, torch.device))
        answers = known_answers(of_stage)
        self._nonce = _nonce(vllm_config)
        if not isinstance(where, torch.device):
            self._v2 = _DeviceRows(where, of_stage)
        self._sign = launch.Sign(self.stage)
        _log.info(
            "filigrane: %s is ready, known answers found (%s).",
            type(self).__name__,
            ", ".join(f"{name} log10 p {value:.0f}" for name, value in answers.items()) or "none",
        )

    @classmethod
    def _loaded_twice(cls, vllm_config: Any) -> bool:
        """Whether this engine has one already: by entry point and by --logits-processors."""
        known = cls._made.get(cls.stage)
        if known is not None and known() is vllm_config:
            return True
        _Processor._made[cls.stage] = weakref.ref(vllm_config)
        return False

    @classmethod
    def _check_placeholders(cls, vllm_config: Any, *, v1: bool) -> None:
        """With asynchronous scheduling, V1 shows -1 for the last tokens unless asked by option."""
        if not v1 or not vllm_config.scheduler_config.async_scheduling:
            return
        if vllm_config.model_config.logits_processors:
            return
        names = " ".join(
            f"{__name__}:{c.__name__}" for c in (GreenListProcessor, SamplingProcessor)
        )
        raise NotReady(
            "filigrane: with asynchronous scheduling vLLM hides the last tokens from processors "
            f"that it finds by entry point. Start it with --logits-processors {names}, "
            "or with --no-async-scheduling."
        )

    def is_argmax_invariant(self) -> bool:
        """V1: whether vLLM calls it after temperature and min-p (or before penalties)."""
        return self.stage == "distribution"

    # ---------------------------------------------------------------- interface V1

    def update_state(self, batch_update: Any) -> None:
        """V1: requests that came, left and moved."""
        if self._active:
            process_dict_updates(self._rows, batch_update, self._row)

    def _row(self, params: Any, prompt: object, written: list[int]) -> _Row | None:
        mark = self._mark(params)
        if mark is None:
            return None
        sampling = Sampling(top_k=min(max(params.top_k, 0), 2**31 - 1), top_p=params.top_p)
        return _Row(mark, written, sampling, params.seed, self._next_nonce())

    def _mark(self, params: Any) -> Mark | None:
        decided = admission.admitted(params)
        if isinstance(decided, Mark) and decided.scheme.acts_on == self.stage:
            return decided
        return None

    def _next_nonce(self) -> str:
        return f"{self._nonce}:{self.stage}:{next(self._numbers)}"

    def apply(self, logits: torch.Tensor, context: Any = None) -> torch.Tensor:
        """One step: logits (rows, V) float32, changed in place. context: V2's view of the rows."""
        if self._v2 is not None:
            return self._v2.apply(logits, context, self._sign.counts)
        if not self._rows:
            return logits
        rows, texts = [], []
        for index, row in self._rows.items():
            try:
                text = row.now()
            except TokenError as error:
                # An exception here would end the engine for everybody.
                self._tell(index, error)
                continue
            if text.window is not None:
                rows.append(index)
                texts.append(text)
        self._sign.counts += (len(rows), len(self._rows) - len(rows))
        if not rows:
            return logits
        if logits.device.type == "cpu":
            self._on_host(logits, rows, texts)
        else:
            self._on_device(logits, rows, texts)
        return logits

    def _on_host(self, logits: torch.Tensor, rows: list[int], texts: list[MarkedText]) -> None:
        values = logits.numpy()  # the same memory
        if self._drawer is None or self._drawer.vocab_size != values.shape[1]:
            self._drawer = Drawer(values.shape[1])
        for index, text, words in zip(rows, texts, blocks(texts), strict=True):
            if self.stage == "logits":
                self._drawer.bias(text, words, values[index])
                continue
            try:
                token = self._drawer.draw(text, words, values[index], self._rows[index].sampling)
            except LogitsError as error:
                # The model's failure, or one request's masks: the others go on, this one is noise.
                self._tell(index, error)
                self._sign.counts += (-1, 1)
                continue
            only(values[index], token)

    def _tell(self, index: int, error: Exception) -> None:
        # Once: whoever can bring it about could fill the log.
        if not self._told:
            _log.error("filigrane: a step of row %d is unmarked: %s", index, error)
            self._told = True

    def _on_device(self, logits: torch.Tensor, rows: list[int], texts: list[MarkedText]) -> None:
        index = torch.tensor(rows, device=logits.device)
        samplings = [self._rows[row].sampling for row in rows]
        pool = logits.index_select(0, index)
        if self.stage == "distribution":
            pool = _truncate(
                pool,
                np.array([s.top_k for s in samplings]),
                np.array([s.top_p for s in samplings]),
            )
            if logits.device.type == "cuda" and fused is not None:
                _leave_only(pool, fused.sample(pool, _fused_rows(texts, logits.device)))
                logits.index_copy_(0, index, pool)
                return
        words = to_words(blocks(texts), logits.device)
        noise = to_words(np.stack([text.noise() for text in texts]), logits.device)
        for scheme in dict.fromkeys(text.scheme for text in texts):
            member = torch.tensor([t.scheme == scheme for t in texts], device=logits.device)
            changed = _marked_logits(scheme, pool, words, noise)
            pool = torch.where(member[:, None], changed, pool)
        logits.index_copy_(0, index, pool)

    # ---------------------------------------------------------------- interface V2

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: a request takes a place, which another may have had; True if it is marked."""
        if self._v2 is None:
            return False
        mark = self._mark(sampling_params)
        self._v2.put(req_idx, mark, sampling_params, "" if mark is None else self._next_nonce())
        return mark is not None

    def apply_staged_writes(self) -> None:
        """V2: once a step, after vLLM's own tables are on the device."""
        if self._v2 is not None:
            self._v2.upload()


class GreenListProcessor(_Processor):
    """Marks with green lists: a bias on raw logits."""

    stage: ClassVar[str] = "logits"


class SamplingProcessor(_Processor):
    """Marks with all schemes that act on the distribution; also checks and counts requests."""

    stage: ClassVar[str] = "distribution"

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Called by vLLM for each request, whatever marks it. Raises RequestRefused: HTTP 400."""
        admission.admit(sampling_params)


def _truncate(
    logits: torch.Tensor, top_k: np.ndarray[Any, Any], top_p: np.ndarray[Any, Any]
) -> torch.Tensor:
    """vLLM's own top-k and top-p, in place; top_k 0 and top_p 1 are off."""
    size = logits.shape[1]
    k = p = None
    if top_k.any():
        kept = np.where((top_k > 0) & (top_k < size), top_k, size).astype(np.int32)
        k = torch.from_numpy(kept).to(logits.device)
    if (top_p < 1.0).any():
        p = torch.from_numpy(top_p.astype(np.float32)).to(logits.device)
    truncated: torch.Tensor = apply_top_k_top_p(logits, k, p)
    return truncated


def _marked_logits(
    scheme: Scheme, logits: torch.Tensor, words: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    """Logits (rows, V) with the mark: biased, or all but the drawn token at -inf."""
    law = reweight_logits(scheme, logits, words)
    if scheme.acts_on == "logits" or scheme.deterministic:
        return law
    drawn = draw_quantile(law, noise)
    marked = torch.full_like(logits, -torch.inf).scatter_(-1, drawn[:, None], 0.0)
    return torch.where(torch.isfinite(logits.amax(dim=-1, keepdim=True)), marked, logits)


def _fused_rows(texts: list[MarkedText], device: torch.device) -> Any:
    return fused.Rows.of(
        [text.scheme for text in texts],
        np.stack([np.asarray(text.key_words) for text in texts]),
        [text.window for text in texts],
        np.stack([text.noise() for text in texts]),
        [1.0] * len(texts),  # vLLM has applied it
        device,
    )


def _leave_only(logits: torch.Tensor, tokens: torch.Tensor) -> None:
    """Leave one token of each row, in place; a row without one (NaN, +inf) stays as it is."""
    kept = torch.full_like(logits, -torch.inf).scatter_(-1, tokens.clamp_min(0)[:, None], 0.0)
    logits.copy_(torch.where((tokens >= 0)[:, None], kept, logits))


def _nonce(vllm_config: Any) -> str:
    """The same on all ranks of one engine, which must draw alike; new with every engine.

    `instance_id` is drawn by vLLM for each configuration, and travels with it. Replicas of data
    parallelism share it; their rank is 0 for models without experts, their index is not.
    """
    parallel = vllm_config.parallel_config
    replica = getattr(parallel, "data_parallel_index", parallel.data_parallel_rank)
    return f"{launch.folder()}:{vllm_config.instance_id}:{replica}"


class _DeviceRows:
    """What V2 needs on the device: one line for each place that a request can take."""

    def __init__(self, states: Any, schemes: list[Scheme]) -> None:
        self._states = states
        self._schemes: Final = schemes
        places = states.max_num_reqs
        self._scheme = np.full(places, -1, np.int32)
        self._words = np.zeros((places, 8), np.uint32)
        self._noise = np.zeros((places, 8), np.uint32)
        # Temperature, min-p, top-p; top-k.
        self._numbers = np.ones((places, 3), np.float32)
        self._top_k = np.zeros(places, np.int32)
        self._resumed: list[tuple[int, Mark, int | None, str]] = []
        self._changed = True
        self._device: tuple[torch.Tensor, ...] = ()
        # Marked and other rows of marked texts; read every so often, because reading waits.
        self._seen = torch.zeros(2, dtype=torch.int64, device=states.device)
        self._steps = 0

    def put(self, place: int, mark: Mark | None, params: Any, nonce: str) -> None:
        self._changed = True
        self._resumed = [waiting for waiting in self._resumed if waiting[0] != place]
        if mark is None:
            self._scheme[place] = -1
            return
        if mark.scheme not in self._schemes:  # of a key that came later
            self._schemes.append(mark.scheme)
        self._scheme[place] = self._schemes.index(mark.scheme)
        self._numbers[place] = (params.temperature or 1.0, params.min_p, params.top_p)
        self._top_k[place] = min(max(params.top_k, 0), self._states.vocab_size)
        if self._states.prefill_len.np[place] > self._states.prompt_len.np[place]:
            self._resumed.append((place, mark, params.seed, nonce))
        else:
            self._take(place, MarkedText(mark, seed=params.seed, nonce=nonce))

    def _take(self, place: int, text: MarkedText) -> None:
        self._words[place] = text.key_words
        self._noise[place] = text.noise_key

    def upload(self) -> None:
        for place, mark, seed, nonce in self._resumed:
            # Rare, and the one time that the host waits for the device.
            start, end = self._states.prompt_len.np[place], self._states.prefill_len.np[place]
            written = self._states.all_token_ids.gpu[place, start:end].tolist()
            self._take(place, MarkedText(mark, seed=seed, nonce=nonce, written=written))
        self._resumed.clear()
        if self._changed:
            device = self._states.device
            self._device = (
                torch.from_numpy(self._scheme.copy()).to(device),
                to_words(self._words, device),
                to_words(self._noise, device),
                torch.from_numpy(self._numbers.copy()).to(device),
            )
            self._changed = False

    def apply(
        self, logits: torch.Tensor, context: Any, counts: np.ndarray[Any, Any]
    ) -> torch.Tensor:
        requests = context.idx_mapping_np
        if (self._scheme[requests] < 0).all():
            return logits
        scheme, words, noise_keys, numbers = self._device
        places = context.expanded_idx_mapping.long()
        ends = context.pos.long() + 1
        tokens = self._tokens(context, places, ends)
        starts = self._states.prompt_len.gpu[places].long()
        on_host = self._scheme[requests]
        noise = block(noise_keys[places], (ends - starts)[:, None])[:, :4]
        pool = None
        self._count(counts)
        for number in sorted(set(on_host[on_host >= 0].tolist())):
            law = self._schemes[number]
            width = law.context_width
            own = scheme[places] == number
            marked = fresh_at(tokens, starts, ends, width) & own
            self._seen += torch.stack([marked.sum(), (own & ~marked).sum()])
            columns = (ends[:, None] + torch.arange(-width, 0, device=ends.device)).clamp_min(0)
            keyed = block(words[places], tokens.gather(1, columns))
            if law.acts_on == "logits":
                changed = _marked_logits(law, logits, keyed, noise)
            else:
                if pool is None:
                    pool = self._truncated(logits, places, numbers, context, requests)
                changed = _marked_logits(law, pool, keyed, noise)
            logits = torch.where(marked[:, None], changed, logits)
        return logits

    def _count(self, counts: np.ndarray[Any, Any]) -> None:
        self._steps += 1
        if self._steps % _COUNT_EVERY == 0:
            counts += self._seen.cpu().numpy()
            self._seen.zero_()

    def _tokens(self, context: Any, places: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """Each row's tokens up to its own, (rows, longest): committed ones, then drafts."""
        longest = int(context.seq_lens_upper_bound_np.max()) + 1
        tokens = self._states.all_token_ids.gpu[:, :longest][places].long()
        local = context.expanded_local_pos.long()
        rows = torch.arange(len(places), device=places.device)
        # The input of a request's j-th row is its j-th draft (of row 0: the last committed token).
        for back in range(int(len(places) - len(context.idx_mapping_np)) + 1):
            has = local >= back
            source = (rows - back).clamp_min(0)
            column = (ends - 1 - back).clamp(0, longest - 1)
            value = torch.where(has, context.input_ids.long()[source], tokens[rows, column])
            tokens[rows, column] = value
        return tokens

    def _truncated(
        self,
        logits: torch.Tensor,
        places: torch.Tensor,
        numbers: torch.Tensor,
        context: Any,
        requests: np.ndarray[Any, Any],
    ) -> torch.Tensor:
        own = numbers[places]
        pool = logits / own[:, :1]
        top = pool.amax(dim=-1, keepdim=True)
        low = top + torch.log(own[:, 1:2])
        pool = pool.masked_fill(pool < low, -torch.inf)
        k, p = self._top_k[requests], self._numbers[requests, 2]
        if not k.any() and (p >= 1.0).all():
            return pool
        size = logits.shape[1]
        table = np.where((self._top_k > 0) & (self._top_k < size), self._top_k, size)
        kept = torch.from_numpy(table.astype(np.int32)).to(logits.device)[places]
        truncated: torch.Tensor = apply_top_k_top_p(pool, kept, own[:, 2].contiguous())
        return truncated
