"""What the service says of itself: metrics, log lines and spans, from short lists of names.

Allowed is what stands in `FIELDS`; everything else is dropped before it is written, so that a
careless line loses a field instead of leaking one. No name of a list holds a text, a token id, a
score, a key, a tenant or an address. Log lines of other libraries are cut down to where they came
from: their messages may quote what passed through them.
"""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import Any, Final

import prometheus_client
import structlog
from starlette.types import Scope

from filigrane.service.settings import TelemetrySettings

__all__ = [
    "FIELDS",
    "configure",
    "event",
    "failure",
    "finished",
    "metrics_text",
    "request_span",
    "span",
]

FIELDS: Final = frozenset(
    {
        *("event", "level", "timestamp", "logger", "where", "error", "trace"),
        *("route", "method", "status", "seconds", "verdict", "tier", "technique", "n_keys"),
        *("workers", "port", "job_items", "state", "provider", "component", "count"),
    }
)
"""The names that a log line or a span may carry."""

REQUESTS: Final = prometheus_client.Counter(
    "filigrane_service_requests", "Requests answered.", ("route", "method", "status")
)
SECONDS: Final = prometheus_client.Histogram(
    "filigrane_service_request_seconds",
    "Time from a request's arrival to the end of its answer.",
    ("route",),
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
DETECTIONS: Final = prometheus_client.Counter(
    "filigrane_service_detections", "Texts tested, by tier and what was found.", ("tier", "verdict")
)
KEYS_READ: Final = prometheus_client.Histogram(
    "filigrane_service_keys_per_query",
    "Keys that a query was tested under.",
    buckets=(1, 2, 5, 10, 20, 50, 100, 1000),
)
FAULTS: Final = prometheus_client.Counter(
    "filigrane_service_faults", "Errors behind an answer of 500 or above, by class.", ("error",)
)
JOB_ITEMS: Final = prometheus_client.Counter(
    "filigrane_service_job_items", "Items of jobs, by what became of them.", ("outcome",)
)
COMPONENT_UP: Final = prometheus_client.Gauge(
    "filigrane_service_component_up",
    "Whether a component answered when it was last asked (1) or not (0).",
    ("component",),
    multiprocess_mode="mostrecent",
)

_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LOG: Final = structlog.stdlib.get_logger("filigrane.service")
_PACKAGE: Final = str(Path(__file__).parent.parent)
_MULTIPROCESS: Final = "PROMETHEUS_MULTIPROC_DIR"
_tracer: Any = None


def configure(settings: TelemetrySettings) -> None:
    """Set up logging to stderr, as lines of JSON, and spans if OTEL_* variables ask for them."""
    global _tracer
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            _allowed,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            getattr(logging, settings.log_level.upper())
        ),
        logger_factory=structlog.WriteLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers[:] = [_Elsewhere()]
    root.setLevel(settings.log_level.upper())
    _tracer = _open_tracer()


def event(name: str, fields: Mapping[str, object] | None = None, *, level: str = "info") -> None:
    """Write one line. name: a constant, never made of data; fields: only those of FIELDS."""
    getattr(_LOG, level)(name, **dict(fields or {}))


def failure(scope: Scope, error: BaseException) -> None:
    """Count and log an error: its class and where it arose, not its message."""
    kind = type(error).__name__
    FAULTS.labels(kind).inc()
    where = [
        f"{_short(frame.filename)}:{frame.lineno} {frame.name}"
        for frame in traceback.extract_tb(error.__traceback__)[-8:]
    ]
    event(
        "fault",
        {"error": kind, "trace": where, "route": _route(scope), "method": _method(scope)},
        level="error",
    )


def finished(scope: Scope, status: int, seconds: float) -> None:
    """Count a request that was answered."""
    route, method = _route(scope), _method(scope)
    REQUESTS.labels(route, method, str(status)).inc()
    SECONDS.labels(route).observe(seconds)
    if _debugging():
        event(
            "request",
            {"route": route, "method": method, "status": status, "seconds": round(seconds, 6)},
            level="debug",
        )


def metrics_text() -> tuple[bytes, str]:
    """All metrics of all processes of the service, and their content type."""
    registry: Any = prometheus_client.REGISTRY
    if os.environ.get(_MULTIPROCESS):
        from prometheus_client import multiprocess

        registry = prometheus_client.CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
    return prometheus_client.generate_latest(registry), prometheus_client.CONTENT_TYPE_LATEST


@contextlib.contextmanager
def span(name: str, fields: Mapping[str, str | int | float | bool] | None = None) -> Iterator[None]:
    """A span around a block, if spans are on; carries only names of FIELDS, and of an error only
    its class.
    """
    if _tracer is None:
        yield
        return
    from opentelemetry.trace import Status, StatusCode

    with _tracer.start_as_current_span(
        name, record_exception=False, set_status_on_exception=False
    ) as current:
        for key, value in (fields or {}).items():
            if key in FIELDS:
                current.set_attribute(key, value)
        try:
            yield
        except BaseException as error:
            current.set_attribute("error", type(error).__name__)
            current.set_status(Status(StatusCode.ERROR))
            raise


@contextlib.contextmanager
def _request_span(scope: Scope) -> Iterator[None]:
    with _tracer.start_as_current_span(
        "request", record_exception=False, set_status_on_exception=False
    ) as current:
        yield
        current.set_attribute("route", _route(scope))
        current.set_attribute("method", _method(scope))


def request_span(scope: Scope) -> contextlib.AbstractContextManager[None]:
    """The span of a request; nothing if spans are off."""
    return _NOTHING if _tracer is None else _request_span(scope)


_NOTHING: Final = contextlib.nullcontext()


class _Elsewhere(logging.Handler):
    """Log lines of other libraries, without their messages."""

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else None
        fields = {"logger": record.name, "where": f"{record.module}:{record.lineno}"}
        event(
            "elsewhere",
            fields | ({"error": error} if error else {}),
            level=_level(record.levelno),
        )


def _level(number: int) -> str:
    for least, name in ((logging.ERROR, "error"), (logging.WARNING, "warning")):
        if number >= least:
            return name
    return "info" if number >= logging.INFO else "debug"


def _allowed(_: Any, __: str, line: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    return {name: value for name, value in line.items() if name in FIELDS}


def _debugging() -> bool:
    return logging.getLogger().level <= logging.DEBUG


def _route(scope: Scope) -> str:
    """The route's pattern, never the path: a path may hold anything."""
    return str(getattr(scope.get("route"), "path", None) or "none")


def _method(scope: Scope) -> str:
    method = scope.get("method", "")
    return method if method in _METHODS else "other"


def _short(path: str) -> str:
    return path.removeprefix(_PACKAGE).lstrip("/") if path.startswith(_PACKAGE) else Path(path).name


def _open_tracer() -> Any:
    wanted = os.environ.get("OTEL_TRACES_EXPORTER", "")
    if wanted != "otlp" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": "filigrane"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider.get_tracer("filigrane")
