"""What model.py of a repository is: the interface that Triton's Python backend calls.

Triton makes a `TritonPythonModel` in a process of its own and hands it requests. They are written
together, each with its own key, scheme and settings, and answered one by one; a request that is
refused gets an error with the reason.

Importable only where Triton runs it: `triton_python_backend_utils` exists nowhere else.
"""

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import triton_python_backend_utils as pb_utils

from filigrane.adapters.tritonserver.tensors import INPUTS, OUTPUTS
from filigrane.errors import FiligraneError, RequestRefused

if TYPE_CHECKING:
    from filigrane.adapters.writing import Text
    from filigrane.serving.keyring import Keyring


class TritonPythonModel:
    """One instance of the model."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Load keyring and model, or raise: Triton then does not serve the model.

        args: Triton's; of config.pbtxt the parameters model, keyring, device and max_answer are
        read (docs/serving-triton.md).
        """
        # Before this, Triton imports the module once only to look at it: no framework for that.
        from filigrane.adapters.model_thread import ModelThread
        from filigrane.adapters.models import load
        from filigrane.adapters.tritonserver.answering import Answering
        from filigrane.serving.live import LiveKeyring, require_live
        from filigrane.serving.readiness import known_answers

        config = json.loads(args["model_config"])
        written = config.get("parameters", {})
        given = {name: entry["string_value"] for name, entry in written.items()}
        folder = given.get("keyring")

        # Before the first request, and before a changed keyring counts.
        def accept(ring: "Keyring") -> None:
            known_answers(ring.schemes)

        keys = LiveKeyring(folder, accept=accept) if folder else require_live(accept=accept)
        keyring = keys.now()
        answers = known_answers(keyring.schemes)
        device = given.get("device") or "cpu"
        if args.get("model_instance_kind") == "GPU":
            device = f"cuda:{args['model_instance_device_id']}"
        model = load(given.get("model") or "smollm2", device=device)
        self._answering = Answering.of(model, keys, answer=int(given.get("max_answer") or 4096))
        # Triton's rows are those of one of its batches; several of them may be open.
        self._thread = ModelThread(self._answering.lm, rows=max(1, config["max_batch_size"]))
        self._thread.start()
        self._requests = _Counter(
            "filigrane_requests_total",
            "Requests by what became of them; reason is the scheme of marked ones",
            {"model": args["model_name"]},
        )
        pb_utils.Logger.log_info(
            f"filigrane: {model.name} on {device}, {len(keyring.entries)} keys, policy "
            f"{keyring.policy}, known answers found ("
            + ", ".join(f"{name} log10 p {value:.0f}" for name, value in answers.items())
            + ")"
        )

    def execute(self, requests: Sequence[Any]) -> None:
        """Hand requests over to the thread of the model, which answers them when they are done.

        What Triton has gathered is written together, and with what it gathers meanwhile; its own
        batches hold only requests of one form.
        """
        for request in requests:
            self._take(_inputs(request), _token(request), request.get_response_sender())

    def finalize(self) -> None:
        """Called by Triton when it unloads the model; no request is open then."""
        self._thread.close()

    def _take(self, inputs: dict[str, Any], token: str | None, sender: Any) -> None:
        from filigrane.adapters.model_thread import Job, Overloaded

        def progress() -> None:
            if all(text.ended is not None for text in texts):
                _send(sender, self._response(texts))
            elif sender.is_cancelled():
                for text in texts:
                    text.ended = text.ended or "cancelled"
                _send(sender, _error("cancelled", pb_utils.TritonError.CANCELLED))

        def failure(error: Exception) -> None:
            if isinstance(error, Overloaded):
                _send(sender, _error(str(error), pb_utils.TritonError.UNAVAILABLE))
                return
            message = f"the model failed ({type(error).__name__}); the server's log says more."
            _send(sender, _error(message, pb_utils.TritonError.INTERNAL))

        try:
            texts = self._answering.read(inputs, token)
            self._thread.submit(Job(tuple(texts), progress, failure))
        except Overloaded as error:
            self._requests.count("refused", "overloaded")
            failure(error)
        except FiligraneError as error:
            self._requests.count("refused", _reason(error))
            message = f"{error} (reason: {_reason(error)})"
            _send(sender, _error(message, pb_utils.TritonError.INVALID_ARG))
        except Exception as error:
            # A template or a tokenizer: requests behind this one must be answered all the same.
            self._requests.count("refused", "failed")
            failure(error)
        else:
            self._requests.count(*texts[0].order.mark.outcome)

    def _response(self, texts: "Sequence[Text]") -> Any:
        broken = [str(text.error) for text in texts if text.error is not None]
        if broken:
            return _error(broken[0], pb_utils.TritonError.INTERNAL)
        found = self._answering.outputs(texts)
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, found[name]) for name in OUTPUTS])


def _send(sender: Any, response: Any) -> None:
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)


def _error(message: str, code: int) -> Any:
    return pb_utils.InferenceResponse(error=pb_utils.TritonError(message, code))


def _reason(error: Exception) -> str:
    """Why a request was refused, in a word: one of `serving.orders.REASONS`."""
    return error.reason if isinstance(error, RequestRefused) else "malformed"


def _inputs(request: Any) -> dict[str, Any]:
    tensors = {name: pb_utils.get_input_tensor_by_name(request, name) for name in INPUTS}
    return {name: tensor.as_numpy() for name, tensor in tensors.items() if tensor is not None}


def _token(request: Any) -> str | None:
    """The bearer token, from the header that Triton was told to forward."""
    for name, value in json.loads(request.parameters() or "{}").items():
        if name.lower() == "authorization" and isinstance(value, str):
            kind, _, token = value.partition(" ")
            return token.strip() if kind.lower() == "bearer" else None
    return None


class _Counter:
    """A counter among Triton's own metrics, or nothing if the server has none."""

    def __init__(self, name: str, about: str, labels: Mapping[str, str]) -> None:
        self._labels = dict(labels)
        self._metrics: dict[tuple[str, str], Any] = {}
        try:
            self._family = pb_utils.MetricFamily(
                name=name, description=about, kind=pb_utils.MetricFamily.COUNTER
            )
        except Exception:  # the server was started without metrics
            self._family = None

    def count(self, outcome: str, reason: str) -> None:
        if self._family is None:
            return
        if (outcome, reason) not in self._metrics:
            labels = {**self._labels, "outcome": outcome, "reason": reason}
            self._metrics[outcome, reason] = self._family.Metric(labels=labels)
        self._metrics[outcome, reason].increment(1)
