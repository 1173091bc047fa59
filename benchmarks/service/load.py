"""How many requests the service answers, how fast, and whether its memory stays flat.

    python benchmarks/service/load.py --out benchmarks/service/load.json [--seconds 20] [--quick]

Starts the real service (as `filigrane serve` does) on the loopback with so many `--workers`, SQLite
and a local root, makes keys over HTTP, and sends requests from a process of its own: plain sockets,
one request at a time on each of some connections, every answer read to its end and checked.

Two ways of asking, because each hides what the other shows:

    closed   each connection sends the next request when it has the answer: what is the most that
             is answered, and how long does one take when the service is full
    open     requests are due at a fixed rate, and their time counts from when they were due, so
             that a stall of the service delays all that were due meanwhile

Client and service share the processors of this machine, and whatever else runs there; the load
average before and after stands in the result.
"""

import argparse
import asyncio
import contextlib
import datetime
import http.client
import importlib.metadata
import json
import multiprocessing
import os
import platform
import random
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PACKAGES = ("filigrane", "granian", "fastapi", "starlette", "pydantic", "numpy", "numba")
SERVE = (
    "import sys, pathlib; from filigrane.service.running import run;"
    "run(pathlib.Path(sys.argv[1]), ready=lambda address: None)"
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is asked. bodies: as many different ones as are cycled through."""

    name: str
    words: str
    path: str
    role: str
    bodies: list[dict[str, Any]]


@contextlib.contextmanager
def service(
    folder: Path, workers: int
) -> Iterator[tuple[subprocess.Popen[bytes], int, dict[str, str]]]:
    """The service as a process group, its port, and tokens by role."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    from filigrane.service.settings import Settings

    Settings.initial(folder / "service")
    config = folder / "service" / "filigrane.toml"
    config.write_text(
        config.read_text()
        .replace("port = 8470", f"port = {port}")
        .replace("workers = 1", f"workers = {workers}")
        # The budgets of the public tier are what `oracle.py` measures; here they would end the run.
        .replace(
            'tenant = "demo"',
            'tenant = "demo"\nper_identity = "1000000/second"\n'
            'per_network = "1000000/second"\nnear_duplicates = 1000000',
        )
    )
    tokens = json.loads((folder / "service" / "tokens.json").read_text())
    tokens["second"] = officer(config)
    log = (folder / "service.log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, str(config)],
        stdout=log,
        stderr=log,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                if call(port, "GET", "/healthz")[0] == 200:
                    break
            except OSError:
                pass
            if process.poll() is not None or time.monotonic() > deadline:
                sys.exit((folder / "service.log").read_text())
            time.sleep(0.1)
        yield process, port, tokens
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        log.close()


def officer(config: Path) -> str:
    """A token of a second attribution officer, as the operator issues it."""
    from filigrane.service.settings import Settings
    from filigrane.store.access import Access, Role
    from filigrane.store.database import Database

    database = Database.open(Settings.load(config).database.open_url().reveal())
    try:
        return Access(database).issue_token(
            "demo", "second", [Role.ATTRIBUTION_OFFICER], actor="operator"
        )
    finally:
        database.close()


def call(
    port: int, method: str, path: str, body: Any = None, token: str | None = None
) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    headers = {"Content-Type": "application/json"} if body is not None else {}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    connection.request(
        method, path, body=None if body is None else json.dumps(body), headers=headers
    )
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, json.loads(data) if data else None


def make_key(port: int, token: str, body: dict[str, Any]) -> None:
    status, said = call(port, "POST", "/v1/keys", body, token)
    if status != 201:
        sys.exit(f"{status}: {said}")


# ------------------------------------------------------------------ the client, in its own process


def request_bytes(port: int, case: Case, token: str) -> list[bytes]:
    made = []
    for body in case.bodies:
        data = json.dumps(body, separators=(",", ":")).encode()
        head = (
            f"POST {case.path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            f"Authorization: Bearer {token}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(data)}\r\n\r\n"
        )
        made.append(head.encode() + data)
    return made


class Client(asyncio.Protocol):
    """One connection: sends, and tells when a whole answer has come. Parses no more than that."""

    def __init__(self) -> None:
        self.buffer = bytearray()
        self.waiting: asyncio.Future[int] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0 or self.waiting is None:
            return
        head = bytes(self.buffer[:end]).lower()
        start = head.find(b"content-length:")
        stop = head.find(b"\r\n", start)
        length = int(head[start + 15 : stop if stop >= 0 else None])
        if len(self.buffer) < end + 4 + length:
            return
        status = int(self.buffer[9:12])
        # What is answered must be an answer: a verdict is in every one.
        if (
            status == 200
            and b'"verdict"' not in self.buffer[end:]
            and b'"named"' not in self.buffer
        ):
            status = -1
        del self.buffer[: end + 4 + length]
        waiting, self.waiting = self.waiting, None
        waiting.set_result(status)

    def connection_lost(self, error: Exception | None) -> None:
        if self.waiting is not None:
            self.waiting.set_exception(error or ConnectionError("closed"))

    async def ask(self, data: bytes) -> int:
        self.waiting = asyncio.get_running_loop().create_future()
        self.transport.write(data)  # type: ignore[attr-defined]
        return await self.waiting


def drive(
    port: int, requests: list[bytes], connections: int, seconds: float, rate: float | None, out: Any
) -> None:
    """Ask for some seconds; put (seconds it took, status) of each answer, as two lists."""

    async def run() -> tuple[list[float], list[int], float]:
        loop = asyncio.get_running_loop()
        clients = [
            (await loop.create_connection(Client, "127.0.0.1", port))[1] for _ in range(connections)
        ]
        times: list[float] = []
        statuses: list[int] = []
        begin = time.perf_counter()
        end = begin + seconds
        number = iter(range(10**12))

        async def closed(client: Client) -> None:
            while (sent := time.perf_counter()) < end:
                status = await client.ask(requests[next(number) % len(requests)])
                times.append(time.perf_counter() - sent)
                statuses.append(status)

        async def opened(client: Client) -> None:
            assert rate is not None
            while True:
                i = next(number)
                due = begin + i / rate
                if due >= end:
                    return
                wait = due - time.perf_counter()
                if wait > 0:
                    await asyncio.sleep(wait)
                status = await client.ask(requests[i % len(requests)])
                # From when it was due, not from when it could be sent.
                times.append(time.perf_counter() - due)
                statuses.append(status)

        await asyncio.gather(*((closed if rate is None else opened)(c) for c in clients))
        elapsed = time.perf_counter() - begin
        for client in clients:
            client.transport.close()  # type: ignore[attr-defined]
        return times, statuses, elapsed

    try:
        import uvloop

        out.put(uvloop.run(run()))
    except ImportError:
        out.put(asyncio.run(run()))


def measure(
    port: int,
    pid: int,
    case: Case,
    token: str,
    *,
    connections: int,
    seconds: float,
    rate: float | None,
) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    requests = request_bytes(port, case, token)
    client = context.Process(
        target=drive, args=(port, requests, connections, seconds, rate, out), daemon=True
    )
    cpu = cpu_seconds(pid)
    client.start()
    memory = []
    began = time.monotonic()
    result = None
    while result is None:
        memory.append((round(time.monotonic() - began, 1), rss(pid)))
        with contextlib.suppress(Exception):
            result = out.get(timeout=max(0.5, seconds / 20))
        if result is None and time.monotonic() - began > seconds + 120:
            sys.exit("the client does not end")
    client.join()
    times, statuses, elapsed = result
    times.sort()
    return {
        "case": case.name,
        "what": case.words,
        "mode": "closed" if rate is None else f"open, {rate:g}/s",
        "connections": connections,
        "seconds": round(elapsed, 2),
        "answers": len(times),
        "not_200": sum(status != 200 for status in statuses),
        "per_second": round(len(times) / elapsed, 1),
        "ms_p50": round(quantile(times, 0.5) * 1e3, 3),
        "ms_p90": round(quantile(times, 0.9) * 1e3, 3),
        "ms_p99": round(quantile(times, 0.99) * 1e3, 3),
        "ms_max": round(times[-1] * 1e3, 3),
        "service_cpu_ms_each": round((cpu_seconds(pid) - cpu) / len(times) * 1e3, 3),
        "rss_mib": memory,
    }


def quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def group(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(int(entry.name)) == pid:
                    found.append(int(entry.name))
    return found


def rss(pid: int) -> float:
    """Resident memory of the service's processes, MiB."""
    total = 0
    for one in group(pid):
        with contextlib.suppress(OSError):
            pages = int(Path(f"/proc/{one}/statm").read_text().split()[1])
            total += pages * os.sysconf("SC_PAGE_SIZE")
    return round(total / 2**20, 1)


def cpu_seconds(pid: int) -> float:
    total = 0.0
    for one in group(pid):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{one}/stat").read_text().rpartition(")")[2].split()
            total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


# ------------------------------------------------------------------ what is asked


def cases(rng: random.Random) -> list[Case]:
    def ids(n: int) -> list[int]:
        return [rng.randrange(50_000) for _ in range(n)]

    def text(n: int) -> str:
        words = [
            "".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9))) for _ in range(n)
        ]
        return " ".join(words)

    return [
        Case(
            name="ids, one key",
            words="200 ids, gumbel, one key of 8 slots, expert",
            path="/v1/detect",
            role="detector-expert",
            bodies=[{"tokens": ids(200), "key": "chat"} for _ in range(200)],
        ),
        Case(
            name="ids, all keys",
            words="200 ids, ten gumbel keys of 8 slots, expert",
            path="/v1/detect",
            role="detector-expert",
            bodies=[{"tokens": ids(200), "model": "fast"} for _ in range(200)],
        ),
        Case(
            name="text, evidence",
            words="about 1,000 characters read as bytes, one key, spans and heat map, expert",
            path="/v1/detect",
            role="detector-expert",
            bodies=[
                {"text": text(150), "key": "chat", "tokenizer": "bytes", "evidence": True}
                for _ in range(50)
            ],
        ),
        Case(
            name="text, public",
            words="1,000 characters read as bytes, twelve keys, public tier with its counting",
            path="/v1/detect",
            role="detector-public",
            bodies=[{"text": text(150)} for _ in range(2000)],
        ),
    ]


def trace_seconds(port: int, tokens: dict[str, str], second: str, n: int) -> list[float]:
    """Wall time of whole traces over HTTP: request, approval and trace; the last only is timed."""
    rng = random.Random(3)
    took = []
    for _ in range(n):
        what = {
            "tokens": [rng.randrange(50_000) for _ in range(200)],
            "key": "users",
            "users": {"first": 0, "count": 1_000_000},
        }
        officer = tokens["attribution-officer"]
        status, asked = call(port, "POST", "/v1/trace/requests", {**what, "purpose": "b"}, officer)
        assert status == 201, asked
        status, said = call(port, "POST", f"/v1/approvals/{asked['id']}/approve", None, second)
        assert status == 200, said
        began = time.perf_counter()
        status, said = call(port, "POST", "/v1/trace", {**what, "approval": asked["id"]}, officer)
        took.append(time.perf_counter() - began)
        assert status == 200 and said["n_tests"] == 1_000_000, said
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/service/load.json"))
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--memory-seconds", type=float, default=120.0)
    parser.add_argument("--workers", type=int, default=2, help="processes that answer")
    parser.add_argument("--quick", action="store_true", help="shows that it runs, no more")
    given = parser.parse_args()
    seconds = 2.0 if given.quick else given.seconds
    began, load_before = time.time(), os.getloadavg()
    rows: list[dict[str, Any]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        service(Path(folder), given.workers) as (process, port, tokens),
    ):
        admin = tokens["key-admin"]
        # The public tier says "no mark" of a text only if it could read it under every key.
        for name, model, slots in (
            ("chat", "one", 8),
            ("users", "many", 1),
            *((f"k{i}", "fast", 8) for i in range(10)),
        ):
            spec = {"name": name, "model": model, "scheme": "gumbel", "slots": slots}
            make_key(port, admin, {**spec, "tokenizer": "bytes"})
        chosen = cases(random.Random(1))
        for case in chosen:
            token = tokens[case.role]
            measure(port, process.pid, case, token, connections=4, seconds=2, rate=None)
            for connections, rate in ((16, None), (32, 1000.0)):
                if rate is not None and case.name != "ids, one key":
                    continue
                row = measure(
                    port,
                    process.pid,
                    case,
                    token,
                    connections=connections,
                    seconds=seconds,
                    rate=rate,
                )
                rows.append(row)
                show(row)
        long = 4.0 if given.quick else given.memory_seconds
        flat = measure(
            port,
            process.pid,
            chosen[0],
            tokens["detector-expert"],
            connections=16,
            seconds=long,
            rate=None,
        )
        show(flat)
        trace_seconds(port, tokens, tokens["second"], 1)
        traces = trace_seconds(port, tokens, tokens["second"], 2 if given.quick else 5)
    result = {
        "made_by": "benchmarks/service/load.py",
        "at": datetime.datetime.fromtimestamp(began, datetime.UTC).isoformat(timespec="seconds"),
        "quick": given.quick,
        "workers": given.workers,
        "machine": {
            "processor": processor(),
            "processors": os.cpu_count(),
            "system": platform.platform(),
            "python": platform.python_version(),
            "load_before": [round(value, 2) for value in load_before],
            "load_after": [round(value, 2) for value in os.getloadavg()],
        },
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "rows": rows,
        "memory": flat,
        "trace": {
            "what": "200 ids among 1,000,000 users of a key with one slot, over HTTP",
            "seconds": [round(value, 3) for value in traces],
            "median": round(statistics.median(traces), 3),
        },
    }
    given.out.write_text(json.dumps(result, indent=1) + "\n")
    given.out.with_suffix(".md").write_text(markdown(result))
    sys.stdout.write(markdown(result))


def show(row: dict[str, Any]) -> None:
    sys.stderr.write(
        f"{row['case']}, {row['mode']}: {row['per_second']}/s, p50 {row['ms_p50']} ms, "
        f"p99 {row['ms_p99']} ms, {row['not_200']} not 200, "
        f"{row['service_cpu_ms_each']} ms of CPU each\n"
    )


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def markdown(result: dict[str, Any]) -> str:
    machine, memory = result["machine"], result["memory"]["rss_mib"]
    lines = [
        "# Load on the detection service",
        "",
        f"Made by `{result['made_by']}` on {result['at'][:10]}; client and service share "
        f"{machine['processors']} processors ({machine['processor']}), load average "
        f"{machine['load_before'][0]} before and {machine['load_after'][0]} after. Processes "
        f"that answer: {result['workers']}. SQLite, local root, plain HTTP on the loopback.",
        "",
        "| request | mode | connections | answers/s | p50 ms | p99 ms | max ms | CPU ms each | "
        "not 200 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['what']} | {row['mode']} | {row['connections']} | {row['per_second']:,.0f} | "
            f"{row['ms_p50']:.1f} | {row['ms_p99']:.1f} | {row['ms_max']:.0f} | "
            f"{row['service_cpu_ms_each']:.2f} | {row['not_200']} |"
        )
    quarter = memory[len(memory) // 4][1]
    lines += [
        "",
        f"Memory: {result['memory']['answers']:,} requests in {result['memory']['seconds']:.0f} s, "
        f"{memory[0][1]:.0f} MiB at the start, {quarter:.0f} after a quarter, "
        f"{memory[-1][1]:.0f} at the end.",
        "",
        f"Trace: {result['trace']['what']}: median {result['trace']['median']:.2f} s of "
        f"{len(result['trace']['seconds'])}.",
        "",
        "Versions: "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items())
        + f", Python {machine['python']}.",
    ]
    if result["quick"]:
        lines += ["", "**Made with --quick: the figures mean nothing.**"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
