"""Fine-tuning a causal model of transformers on token ids: what Bob does with Alice's text.

    finetune     examples -> a folder that `adapters.models.load` reads, and training.json
    FineTuning   the settings: all weights, the top layers, or LoRA

A plain loop (AdamW, linear warm-up, cosine), the same on every machine as far as torch is. It can
be killed: the same call goes on from the last checkpoint and ends where it would have ended. Knows
nothing of keys, schemes or marks.
"""

import contextlib
import dataclasses
import hashlib
import importlib
import importlib.metadata
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from filigrane.adapters.models import LoadedModel, _quiet, weights_sha256
from filigrane.adapters.reading import Report, chosen_rows
from filigrane.contexts import TokenIds, as_token_ids
from filigrane.errors import (
    MissingDependency,
    ModelError,
    RecordError,
    TooShort,
    VocabularyMismatch,
)

try:
    import torch
except ImportError as error:
    raise MissingDependency(
        "fine-tuning needs more packages: pip install 'filigrane[transformers]'"
    ) from error

__all__ = ["Example", "FineTuned", "FineTuning", "finetune"]

SUMMARY: Final = "training.json"
_CHECKPOINT: Final = "checkpoint.pt"
_NORMS: Final = ("norm", "ln_f", "final_layernorm", "final_layer_norm")


class Example(NamedTuple):
    """One text to learn from: tokens (n,) ids, prompt first; start: index of the answer's first."""

    tokens: npt.ArrayLike
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuning:
    """How to train.

    method: `full` (all weights), `last_layers` (the top `layers` of them, with the norm after them
    if `train_norm`; what lies below is computed once and kept, so that little machines can), or
    `lora` (rank, alpha and the names of the modules it adapts, all linear ones by default).
    learning_rate: its peak; it rises linearly over `warmup` (a share of the steps) and falls as a
    cosine to 0. epochs: may be a fraction; steps: overrides it. batch_size: sequences per step, of
    which `micro_batch` are in memory at once (None: all). clip: largest norm of a gradient.
    max_length: longer texts are cut. packing: fill sequences of max_length with texts end to end
    instead of padding. loss_on: `answers` or `all` tokens. precision: of the arithmetic; weights
    stay float32.
    """

    method: Literal["full", "last_layers", "lora"] = "full"
    learning_rate: float = 1e-5
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 8
    micro_batch: int | None = None
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip: float = 1.0
    max_length: int = 2048
    packing: bool = False
    loss_on: Literal["answers", "all"] = "answers"
    layers: int = 6
    train_norm: bool = True
    rank: int = 16
    alpha: float = 32.0
    modules: tuple[str, ...] = ()
    precision: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (
            ("method", ("full", "last_layers", "lora")),
            ("loss_on", ("answers", "all")),
            ("precision", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name} {getattr(self, name)!r} is not known; use one of {', '.join(known)}."
                )
        positive = ("learning_rate", "epochs", "batch_size", "clip", "layers", "rank", "alpha")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0; got {getattr(self, name)}.")
        if self.max_length < 2:
            raise ValueError(f"max_length must be at least 2; got {self.max_length}.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}.")
        if self.micro_batch is not None and self.micro_batch < 1:
            raise ValueError(f"micro_batch must be at least 1; got {self.micro_batch}.")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup is a share of the steps, from 0 up to 1; got {self.warmup}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuned:
    """What training has left: a folder with model, tokenizer and training.json.

    losses: mean loss in nats per token of each step's batch, before the step; seconds: of training,
    interrupted runs included; tokens: trained on per epoch (those that count in the loss).
    """

    folder: Path
    steps: int
    losses: tuple[float, ...]
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True, eq=False)
class _Sequence:
    """ids (n,) and the rows (k,) whose next token counts."""

    ids: TokenIds
    rows: npt.NDArray[np.int64]


def finetune(
    model: Any,
    examples: Sequence[tuple[npt.ArrayLike, int]],
    settings: FineTuning,
    out: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    checkpoint_every: int = 100,
    cache_bytes: int = 4 << 30,
    report: Report | None = None,
) -> FineTuned:
    """Train a model on examples (tokens, start of the answer) and write it to the folder `out`.

    model: what `adapters.models.load` returned, or a model of transformers (with a `tokenizer`, if
    the folder is to be loadable); it is trained in place, in float32. out: must not exist, unless
    the same training made it, which is then not repeated. While it runs, `<out>.partial` holds a
    checkpoint every `checkpoint_every` steps (0: none), from which the same call goes on.
    cache_bytes: memory for the hidden states below the layers that are trained (`last_layers`); if
    they do not fit they are computed anew each time.

    Raises TooShort if no example has an answer token, VocabularyMismatch for unknown ids,
    RecordError if `out` is something else or was begun with other settings, data or weights,
    ModelError if the model cannot be trained this way or the loss is no longer a number,
    MissingDependency for LoRA without peft.
    """
    name, fingerprint = type(model).__name__, None
    if isinstance(model, LoadedModel):
        name, fingerprint = model.name, model.tokenizer_sha256
        model, tokenizer = model.model, tokenizer or model.tokenizer
    _refuse_packed(model)
    sequences = _sequences(examples, settings, int(model.get_input_embeddings().weight.shape[0]))
    target = Path(out)
    work = target.with_name(target.name + ".partial")
    facts: dict[str, Any] = {
        "settings": dataclasses.asdict(settings),
        "model": name,
        "weights_sha256": weights_sha256(model),
        "tokenizer_sha256": fingerprint,
        "data_sha256": _data_sha256(sequences),
        "examples": len(examples),
        "sequences": len(sequences),
    }
    facts = json.loads(json.dumps(facts))  # tuples become lists, as in the file
    if target.exists():
        return _finished(target, facts)
    work.mkdir(parents=True, exist_ok=True)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(settings.seed)
        run = _Run(model.float(), sequences, settings, facts, work, cache_bytes, report)
        try:
            run.train(checkpoint_every)
        finally:
            trained = run.close()
    summary = facts | {
        "steps": len(run.losses),
        "tokens": sum(sequence.rows.shape[0] for sequence in sequences),
        "trainable": run.trainable,
        "seconds": round(run.seconds, 3),
        "losses": run.losses,
        "versions": _versions(settings),
    }
    _write(trained, tokenizer, summary, work, target)
    return _finished(target, facts)


# ---------------------------------------------------------------- data


def _sequences(
    examples: Sequence[tuple[npt.ArrayLike, int]], settings: FineTuning, known: int
) -> list[_Sequence]:
    texts: list[tuple[TokenIds, npt.NDArray[np.bool_]]] = []
    for number, (tokens, start) in enumerate(examples):
        ids = as_token_ids(tokens)
        if (highest := int(ids.max(initial=0))) >= known:
            raise VocabularyMismatch(
                f"example {number} holds token id {highest}, but the model knows {known} ids: "
                "encode it with this model's tokenizer."
            )
        counts = np.arange(ids.shape[0]) >= (start if settings.loss_on == "answers" else 0)
        texts.append((ids, counts))
    if settings.packing:
        order = np.random.default_rng([settings.seed, 1 << 32]).permutation(len(texts))
        ids = np.concatenate([texts[i][0] for i in order] or [np.empty(0, dtype=np.int64)])
        counts = np.concatenate([texts[i][1] for i in order] or [np.empty(0, dtype=np.bool_)])
        size = settings.max_length
        texts = [(ids[i : i + size], counts[i : i + size]) for i in range(0, len(ids), size)]
    found = []
    for ids, counts in texts:
        ids, counts = ids[: settings.max_length], counts[: settings.max_length]
        # The logits at a position are about the token after it; the first one nobody predicts.
        rows = np.flatnonzero(counts[1:])
        if rows.size:
            found.append(_Sequence(ids, rows))
    if not found:
        raise TooShort(
            "no example has an answer token to learn from: give (tokens, start of the answer), or "
            "a larger max_length."
        )
    return found


def _data_sha256(sequences: Sequence[_Sequence]) -> str:
    digest = hashlib.sha256(b"filigrane/v1/training-data")
    for sequence in sequences:
        for array in (sequence.ids, sequence.rows):
            digest.update(len(array).to_bytes(8, "big") + array.astype(">u4").tobytes())
    return digest.hexdigest()


def _refuse_packed(model: Any) -> None:
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError("this model is an encoder-decoder; fine-tuning here takes causal models.")
    quantised = getattr(model.config, "quantization_config", None) is not None
    if quantised or not all(weights.is_floating_point() for weights in model.parameters()):
        raise ModelError(
            "this model's weights are quantised and cannot be trained; load it with "
            "filigrane.adapters.models.load, which unpacks GGUF files, or pass an unpacked copy."
        )


# ---------------------------------------------------------------- training


class _Run:
    """One training, from wherever its checkpoint stands."""

    def __init__(
        self,
        model: Any,
        sequences: Sequence[_Sequence],
        settings: FineTuning,
        facts: dict[str, Any],
        work: Path,
        cache_bytes: int,
        report: Report | None,
    ) -> None:
        self._sequences, self._settings, self._work = sequences, settings, work
        self._facts = facts
        self._report = report or (lambda done, total, what: None)
        self._per_epoch = -(-len(sequences) // settings.batch_size)
        self.total = settings.steps or max(1, round(settings.epochs * self._per_epoch))
        self.losses: list[float] = []
        self.seconds = 0.0
        self._lower: _Lower | None = None
        self._model = model.eval()
        model.requires_grad_(settings.method == "full")
        if settings.method == "full":
            model.train()
        elif settings.method == "lora":
            self._model = _adapted(model, settings).train()
        else:
            self._unfreeze_top(cache_bytes)
        self._weights = {
            name: weights
            for name, weights in self._model.named_parameters()
            if weights.requires_grad
        }
        self.trainable = sum(weights.numel() for weights in self._weights.values())
        self._optimizer = torch.optim.AdamW(
            list(self._weights.values()),
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
        )

    def _unfreeze_top(self, cache_bytes: int) -> None:
        layers = _layers(self._model)
        first = len(layers) - self._settings.layers
        if first < 0:
            raise ModelError(
                f"this model has {len(layers)} layers; train at most as many, got layers="
                f"{self._settings.layers}."
            )
        trained = [*layers[first:]]
        if self._settings.train_norm:
            inside = {id(part) for layer in layers for part in layer.modules()}
            trained += [
                part
                for name, part in self._model.named_modules()
                if name.rpartition(".")[2] in _NORMS and id(part) not in inside
            ]
        for part in trained:
            # What is frozen keeps to its evaluation mode: it has no dropout, so it can be kept.
            part.train().requires_grad_(True)
        config = self._model.config
        width = int(getattr(config, "hidden_size", 0) or getattr(config, "n_embd", 0))
        size = sum(sequence.ids.shape[0] for sequence in self._sequences) * width * 4
        if first > 0 and 0 < size <= cache_bytes:
            self._lower = _Lower(self._model, layers, first)

    def train(self, checkpoint_every: int) -> None:
        self._resume()
        begun, before = time.monotonic(), self.seconds
        if self._lower is not None and len(self.losses) < self.total:
            kept = self._lower.compute(self._sequences, self._settings.batch_size, self._report)
            if not kept:
                self._lower = None
        for step in range(len(self.losses), self.total):
            self._report(step, self.total, "training")
            self.losses.append(self._step(step))
            self.seconds = before + time.monotonic() - begun
            done = step + 1
            if checkpoint_every and done % checkpoint_every == 0 and done < self.total:
                self._save()
        self._report(self.total, self.total, "training")

    def close(self) -> Any:
        """The model as it was found, with the weights as they are now."""
        model = self._model.merge_and_unload() if self._settings.method == "lora" else self._model
        model.requires_grad_(True)
        return model.eval()

    def _rate(self, step: int) -> float:
        """Learning rate: to its peak in a line, then a half cosine to zero."""
        warm = math.ceil(self._settings.warmup * self.total)
        if step < warm:
            return self._settings.learning_rate * (step + 1) / warm
        along = (step - warm) / max(1, self.total - warm)
        return self._settings.learning_rate * 0.5 * (1.0 + math.cos(math.pi * along))

    def _batch(self, step: int) -> list[int]:
        """Which sequences a step sees: known from its number alone, so that runs can be resumed."""
        epoch, place = divmod(step, self._per_epoch)
        order = np.random.default_rng([self._settings.seed, epoch]).permutation(
            len(self._sequences)
        )
        size = self._settings.batch_size
        return [int(i) for i in order[place * size : (place + 1) * size]]

    def _step(self, step: int) -> float:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate(step)
        batch = self._batch(step)
        total = sum(self._sequences[i].rows.shape[0] for i in batch)
        size = self._settings.micro_batch or len(batch)
        self._optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for start in range(0, len(batch), size):
            part = self._surprise(batch[start : start + size]) / total
            part.backward()
            loss += float(part.detach())
        if not math.isfinite(loss):
            raise ModelError(
                f"the loss is {loss} at step {step}: training has diverged. Use a smaller "
                f"learning_rate than {self._settings.learning_rate} or a longer warmup, and remove "
                f"{self._work.name!r}."
            )
        torch.nn.utils.clip_grad_norm_(list(self._weights.values()), self._settings.clip)
        self._optimizer.step()
        return loss

    def _surprise(self, batch: Sequence[int]) -> torch.Tensor:
        """The summed loss of some sequences, in nats."""
        device = self._model.device
        ids, rows, wanted = _table([self._sequences[i] for i in batch])
        low = self._settings.precision == "bfloat16"
        with contextlib.ExitStack() as stack:
            if low:
                stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16))
            if self._lower is not None:
                stack.enter_context(self._lower.replayed(batch, ids.shape[1], device))
            logits = _logits(self._model, ids.to(device), rows.to(device))
        return torch.nn.functional.cross_entropy(logits.float(), wanted.to(device), reduction="sum")

    # ---- checkpoints

    def _save(self) -> None:
        state = {
            "facts": json.dumps(self._facts, sort_keys=True),
            "weights": {name: weights.detach() for name, weights in self._weights.items()},
            "optimizer": self._optimizer.state_dict(),
            "random": torch.get_rng_state(),
            "device_random": (
                torch.cuda.get_rng_state(self._model.device)
                if self._model.device.type == "cuda"
                else None
            ),
            "losses": self.losses,
            "seconds": self.seconds,
        }
        scratch = self._work / (_CHECKPOINT + ".new")
        with scratch.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, self._work / _CHECKPOINT)

    def _resume(self) -> None:
        path = self._work / _CHECKPOINT
        if not path.exists():
            return
        try:
            # weights_only: a checkpoint is data, and must not be able to run code.
            state = torch.load(path, map_location="cpu", weights_only=True)
            same = state["facts"] == json.dumps(self._facts, sort_keys=True)
        except Exception as error:  # a torn file surfaces as nearly anything
            raise RecordError(
                f"{str(path)!r} is not a checkpoint of filigrane; remove that folder to begin anew."
            ) from error
        if not same:
            raise RecordError(
                f"{str(self._work)!r} holds a training that was begun with other settings, data or "
                "weights; choose another out, or remove that folder to begin anew."
            )
        with torch.no_grad():
            for name, weights in self._weights.items():
                weights.copy_(state["weights"][name])
        self._optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if state["device_random"] is not None:
            torch.cuda.set_rng_state(state["device_random"], self._model.device)
        self.losses, self.seconds = list(state["losses"]), float(state["seconds"])


def _adapted(model: Any, settings: FineTuning) -> Any:
    try:
        peft = importlib.import_module("peft")
    except ImportError as error:
        raise MissingDependency(
            "training with LoRA needs one more package: pip install peft; or use the method "
            "last_layers."
        ) from error
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=settings.rank,
        lora_alpha=settings.alpha,
        target_modules=list(settings.modules) or "all-linear",
        # GPT-2's layers keep their weights the other way round.
        fan_in_fan_out=any(type(part).__name__ == "Conv1D" for part in model.modules()),
    )
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"LoRA cannot be put into this model: {error}") from error


def _layers(model: Any) -> Any:
    """A model's list of transformer layers."""
    count = getattr(model.config, "num_hidden_layers", None)
    for part in model.modules():
        if isinstance(part, torch.nn.ModuleList) and count and len(part) == count:
            return part
    raise ModelError(
        f"{type(model).__name__} has no list of layers that can be found; use the method full or "
        "lora."
    )


def _table(
    sequences: Sequence[_Sequence],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids (batch, n) padded on the right, rows (k,) in reading order, the tokens wanted there."""
    length = max(sequence.ids.shape[0] for sequence in sequences)
    # Nothing in a causal model looks at what comes later, so padding needs no mask.
    ids = np.zeros((len(sequences), length), dtype=np.int64)
    for number, sequence in enumerate(sequences):
        ids[number, : sequence.ids.shape[0]] = sequence.ids
    rows = np.concatenate([i * length + sequence.rows for i, sequence in enumerate(sequences)])
    return (
        torch.from_numpy(ids),
        torch.from_numpy(rows),
        torch.from_numpy(ids.reshape(-1)[rows + 1]),
    )


def _logits(model: Any, ids: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Logits (k, V) at some rows; the head never sees the others."""
    with chosen_rows(model, rows) as caught:
        logits = model(input_ids=ids, use_cache=False).logits
    return logits[0] if caught else logits.flatten(0, 1)[rows]


class _Enough(Exception):
    """The layers that are frozen have been run; the others need not be."""


class _Lower:
    """The frozen layers below the trained ones: run once per text, then replayed."""

    def __init__(self, model: Any, layers: Any, first: int) -> None:
        self._model, self._layers = model, layers[:first]
        self._states: list[torch.Tensor] = []
        self._tuples = False

    @torch.no_grad()
    def compute(self, sequences: Sequence[_Sequence], batch_size: int, report: Report) -> bool:
        """Run them over all texts; False if replaying would not give what the model gives."""
        states: dict[int, torch.Tensor] = {}
        order = np.argsort([sequence.ids.shape[0] for sequence in sequences], kind="stable")
        for start in range(0, len(order), batch_size):
            report(start, len(order), "running the frozen layers")
            batch = [int(i) for i in order[start : start + batch_size]]
            ids, _, _ = _table([sequences[i] for i in batch])
            hidden = self._run(ids.to(self._model.device))
            for row, i in enumerate(batch):
                states[i] = hidden[row, : sequences[i].ids.shape[0]].clone()
        self._states = [states[i] for i in range(len(sequences))]
        ids, rows, _ = _table(sequences[:2])
        training = [part for part in self._model.modules() if part.training]
        for part in training:
            part.training = False  # dropout would make any two runs differ
        device = self._model.device
        whole = _logits(self._model, ids.to(device), rows.to(device))
        with self.replayed(range(min(2, len(sequences))), ids.shape[1], device):
            again = _logits(self._model, ids.to(device), rows.to(device))
        for part in training:
            part.training = True
        return torch.allclose(whole, again, rtol=1e-3, atol=1e-3)

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        caught: list[Any] = []

        def stop(module: Any, arguments: Any, output: Any) -> None:
            caught.append(output)
            raise _Enough

        hook = self._layers[-1].register_forward_hook(stop)
        try:
            with contextlib.suppress(_Enough):
                self._model(input_ids=ids, use_cache=False)
        finally:
            hook.remove()
        self._tuples = isinstance(caught[0], tuple)
        states: torch.Tensor = caught[0][0] if self._tuples else caught[0]
        return states.float().cpu()

    @contextlib.contextmanager
    def replayed(self, batch: Sequence[int], length: int, device: Any) -> Iterator[None]:
        """While it is open, the frozen layers give what they gave before for these texts."""
        states = [self._states[i] for i in batch]
        hidden = states[0].new_zeros(len(states), length, states[0].shape[1])
        for row, state in enumerate(states):
            hidden[row, : state.shape[0]] = state
        hidden = hidden.to(device)
        output = (hidden,) if self._tuples else hidden
        own: list[Callable[..., Any] | None] = []
        for layer in self._layers:
            own.append(layer.__dict__.get("forward"))
            layer.forward = lambda *arguments, **options: output
        try:
            yield
        finally:
            for layer, forward in zip(self._layers, own, strict=True):
                del layer.forward
                if forward is not None:
                    layer.forward = forward


# ---------------------------------------------------------------- what is left


def _write(model: Any, tokenizer: Any, summary: dict[str, Any], work: Path, target: Path) -> None:
    """The finished folder: it appears whole or not at all."""
    folder = work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    with _quiet():
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    text = json.dumps(summary, indent=1, allow_nan=False)
    (folder / SUMMARY).write_text(text + "\n", encoding="utf-8")
    folder.rename(target)
    shutil.rmtree(work)


def _finished(target: Path, facts: dict[str, Any]) -> FineTuned:
    try:
        summary = json.loads((target / SUMMARY).read_text(encoding="utf-8"))
        same = all(summary[name] == value for name, value in facts.items())
        found = FineTuned(
            folder=target,
            steps=int(summary["steps"]),
            losses=tuple(map(float, summary["losses"])),
            tokens=int(summary["tokens"]),
            seconds=float(summary["seconds"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(
            f"{str(target)!r} exists and is not what this training makes; choose another out."
        ) from error
    if not same:
        raise RecordError(
            f"{str(target)!r} was trained with other settings, data or weights; choose another out."
        )
    return found


def _versions(settings: FineTuning) -> dict[str, str]:
    used = ["torch", "transformers", *(["peft"] if settings.method == "lora" else [])]
    return {name: importlib.metadata.version(name) for name in used}
