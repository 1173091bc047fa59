"""What the service says of itself, and that no text and no secret is ever among it."""

import base64
import contextlib
import gzip
import io
import json
import logging
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest
import structlog
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from filigrane.errors import KmsUnavailable, StoreUnavailable
from filigrane.service import telemetry
from filigrane.service.jobs import Waiting
from filigrane.service.office import open_office
from filigrane.service.settings import Settings, TelemetrySettings
from filigrane.service.tokenizing import BYTES_SHA256
from servicekit import TENANT, Service, job_done, prepare, problem, running

TEXT = "zq7xtelemetry canary of a text nobody else writes"
WORD = "zq7xtelemetry"


class Collector:
    """A real OTLP endpoint over HTTP: keeps what it is sent."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.paths: set[str] = set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                outer.bodies.append(body)
                outer.paths.add(self.path)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def spans(self) -> list[Any]:
        found = []
        for body in self.bodies:
            for part in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in part.scope_spans:
                    found += scope.spans
        return found


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    made = Collector()
    made.thread.start()
    try:
        yield made
    finally:
        made.server.shutdown()
        made.thread.join()
        made.server.server_close()


def forms(secret: str) -> list[bytes]:
    """A secret as it could be written down: plainly, hex, base64 (its unchanging middle)."""
    data = secret.encode()
    found = [data, data.hex().encode()]
    for shift in range(3):
        encoded = base64.b64encode(b"x" * shift + data)
        found.append(encoded[4:-4])
    return found


def test_nothing_leaks(tmp_path: Path) -> None:
    """A service at its most talkative; then everything that it wrote or showed is searched."""
    with collector() as spans:
        env = {
            "OTEL_TRACES_EXPORTER": "otlp",
            "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{spans.url}/v1/traces",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
            # FastAPI has telemetry of its own, which would tell much more.
            "FASTAPI_OTEL_AUTO_CONFIGURE": "true",
            "OTEL_EXPORTER_OTLP_ENDPOINT": spans.url,
            "OTEL_LOGS_EXPORTER": "otlp",
            "OTEL_METRICS_EXPORTER": "otlp",
        }
        service = prepare(
            tmp_path,
            log_level="debug",
            sections='[public]\ntenant = "demo"\nmin_tokens = 20\n',
            env=env,
        )
        shown: list[bytes] = []
        with running(service):
            use(service, shown)
            for pid in service.pids():
                for name in ("cmdline", "environ"):
                    shown.append(Path(f"/proc/{pid}/{name}").read_bytes())
            shown.append(httpx2.get(f"{service.url}/metrics").content)
        shown += [service.out.read_bytes(), service.err.read_bytes(), *spans.bodies]
        # The database with its write-ahead log, and whatever else lies in the folder.
        for path in tmp_path.iterdir():
            if path.is_file() and path.name not in ("root.passphrase", "filigrane.toml"):
                shown.append(path.read_bytes())
        said = service.err.read_text()
        assert '"event": "request"' in said and '"event": "fault"' not in said
        assert spans.paths == {"/v1/traces"}
        names = {span.name for span in spans.spans()}
        assert "request" in names
        for span in spans.spans():
            assert {attribute.key for attribute in span.attributes} <= telemetry.FIELDS
            assert not span.events
    with open_office(Settings.load(service.config)) as office:
        (key,) = office.keybook.keys(TENANT)
        found = office.keybook.key_of(key.versions[0])
        key_text = found.export_text().rpartition(":")[2]
    passphrase = (tmp_path / "root.passphrase").read_text().strip()
    secrets = [WORD, key_text, passphrase]
    secrets += [token for tokens in service.tokens.values() for token in tokens.values()]
    secrets += [token.rpartition("_")[2] for token in service.tokens[TENANT].values()]
    for secret in secrets:
        for form in forms(secret):
            for place in shown:
                assert form not in place, (secret[:12], place[:60])


def use(service: Service, shown: list[bytes]) -> None:
    """Send the canary wherever a text, a name or a token can be sent; keep every answer."""
    with service.client("key-admin") as client:
        spec = {"name": "chat", "model": "toy", "scheme": "gumbel", "slots": 1}
        spec["tokenizer_sha256"] = BYTES_SHA256
        assert client.post("/v1/keys", json=spec).status_code == 201
        assert client.post("/v1/keys/chat/versions/1/promote").status_code == 200
    tokens = [ord(letter) for letter in TEXT]
    text = {"text": TEXT * 20, "tokenizer": "bytes"}
    with service.client("detector-expert") as client:
        for body in (text, {"tokens": tokens}, {"text": WORD}, {"text": WORD, "key": WORD}):
            shown.append(client.post("/v1/detect", json=body).content)
        shown.append(client.post("/v1/detect", content=WORD.encode()).content)
        for kind in ("application/json", "multipart/form-data; boundary=b"):
            shown.append(
                client.post(
                    "/v1/detect", content=f"--b\r\n{WORD}".encode(), headers={"Content-Type": kind}
                ).content
            )
        job = client.post("/v1/jobs", json=[text | {"tokenizer": "x"}, {"text": TEXT}])
        problem(job, 422)
        shown.append(job.content)
        made = client.post("/v1/jobs", json=[{"text": TEXT * 20}, {"tokens": tokens}]).json()
        job_done(client, made["id"])
        shown.append(client.get(f"/v1/jobs/{made['id']}/results").content)
        shown.append(client.get(f"/{WORD}?{WORD}={WORD}", headers={"X-A": WORD}).content)
        shown.append(client.get("/v1/keys", params={"after": WORD}).content)
    with service.client() as client:
        shown.append(client.post("/v1/detect", json={"text": TEXT * 20}).content)
        bad = {"Authorization": f"Bearer fgt_demo_{WORD}"}
        shown.append(client.get("/v1/whoami", headers=bad).content)
        for path in ("/login", "/"):
            # Forms of the page, which pass through another parser.
            shown.append(client.post(path, data={"token": WORD, "text": TEXT}).content)
            shown.append(client.post(path, files={"file": ("a.txt", TEXT.encode())}).content)
    # The page may show people their own text again; nothing else may.
    shown[-4:] = []


def test_metrics_have_few_labels(service: Service) -> None:
    with service.client("key-admin") as client:
        before = client.get("/metrics").text
        for number in range(50):
            client.get(f"/{WORD}/{number}")
            client.get(f"/v1/keys/unknown-{number}")
            client.request(f"X{number}", "/healthz")
        after = client.get("/metrics").text
    assert WORD not in after and "unknown-" not in after and TENANT not in after
    line = re.compile(r"^filigrane_service_requests_total\{.*?\}", re.M)
    series = [set(line.findall(text)) for text in (before, after)]
    assert len(series[1] - series[0]) <= 6
    assert 'route="/v1/keys/{name}"' in after and 'method="other"' in after
    for name in ("filigrane_service_request_seconds_bucket", "filigrane_service_component_up"):
        assert name in after


def test_metrics_of_all_workers(tmp_path: Path) -> None:
    service = prepare(tmp_path, workers=2)
    with running(service):
        for _ in range(30):
            # A connection of its own each, so that both workers get some.
            httpx2.get(f"{service.url}/healthz")
        counts = [
            re.search(r'requests_total\{.*route="/healthz".*\} (\S+)', text.text)
            for text in [httpx2.get(f"{service.url}/metrics") for _ in range(2)]
        ]
    assert all(count is not None and float(count[1]) >= 30 for count in counts)


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What is logged by this process, set up as in the service."""
    root = logging.getLogger()
    before = list(root.handlers), root.level
    written = io.StringIO()
    telemetry.configure(TelemetrySettings(log_level="debug"))
    structlog.configure(logger_factory=structlog.WriteLoggerFactory(file=written))
    yield written
    root.handlers[:], level = before
    root.setLevel(level)
    structlog.reset_defaults()


def test_fields_outside_the_list_are_dropped(lines: io.StringIO) -> None:
    telemetry.event("known", {"status": 200, "text": TEXT, "token": WORD, "tenant": "acme"})
    written = json.loads(lines.getvalue())
    assert written["status"] == 200
    assert set(written) == {"event", "status", "level", "timestamp"}


def test_other_libraries_lines_lose_their_words(lines: io.StringIO) -> None:
    other = logging.getLogger("some.library")
    other.debug("parsed %r", TEXT)
    other.warning(f"could not store {TEXT}")
    try:
        raise ValueError(TEXT)
    except ValueError:
        other.exception(TEXT)
    assert WORD not in lines.getvalue()
    written = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert [line["level"] for line in written] == ["debug", "warning", "error"]
    assert written[2]["error"] == "ValueError"
    assert all(line["logger"] == "some.library" for line in written)


def test_faults_are_logged_without_words(lines: io.StringIO) -> None:
    try:
        raise RuntimeError(TEXT)
    except RuntimeError as error:
        telemetry.failure({"path": f"/{WORD}", "method": "GET"}, error)
    written = json.loads(lines.getvalue())
    assert WORD not in lines.getvalue()
    assert written["error"] == "RuntimeError" and "test_telemetry.py" in written["trace"][-1]


def test_waiting_is_said_less_and_less_often(lines: io.StringIO) -> None:
    now = 0.0
    waiting = Waiting(timer=lambda: now)
    said: list[float] = []
    for now in range(301):
        waiting.for_(StoreUnavailable(f"sqlite {WORD}"))
        if lines.getvalue().count("job_waits") > len(said):
            said.append(now)
    assert said == [0, 1, 3, 7, 15, 31, 63, 123, 183, 243]
    waiting.for_(KmsUnavailable("another reason is said at once"))
    waiting.over()
    waiting.over()
    written = [json.loads(line) for line in lines.getvalue().splitlines()]
    assert WORD not in lines.getvalue()
    assert [line["error"] for line in written[-3:-1]] == ["StoreUnavailable", "KmsUnavailable"]
    assert [line["event"] for line in written[-2:]] == ["job_waits", "job_goes_on"]
    assert written[-3]["count"] == 244
