"""Processes: one service a port, no worker without its supervisor, no half-made first service."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import servicekit


def ended(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state == "Z"


def serve(*arguments: str, most: int | None = None) -> subprocess.CompletedProcess[str]:
    """`filigrane serve`, which is expected to refuse. most: bytes of any file it writes."""

    def small() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    return subprocess.run(
        [sys.executable, "-B", "-m", "filigrane", "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=small if most is not None else None,
    )


def test_a_taken_port_and_a_killed_supervisor(tmp_path: Path) -> None:
    service = servicekit.prepare(tmp_path / "a")
    service.start()
    try:
        done = serve("--config", str(service.config))
        assert done.returncode == 2 and f"port {service.port}" in done.stderr
        assert "taken" in done.stderr and done.stdout == ""
        assert service.process is not None
        workers = [pid for pid in service.pids() if pid != service.process.pid]
        assert workers
        os.kill(service.process.pid, signal.SIGKILL)
        deadline = time.monotonic() + 60
        while not all(map(ended, workers)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert all(map(ended, workers))
    finally:
        service.stop(signal.SIGKILL)


def test_a_tokenizer_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    service = servicekit.prepare(tmp_path / "a")
    with service.config.open("a") as out:
        out.write('\n[tokenizers]\nmine = "/nowhere/tokenizer.json"\n')
    done = serve("--config", str(service.config))
    assert done.returncode == 2 and "mine" in done.stderr and "/nowhere" in done.stderr


def test_a_full_disk_leaves_no_half_made_service(tmp_path: Path) -> None:
    done = serve("--init", str(tmp_path / "new"), most=20_000)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert list((tmp_path / "new").iterdir()) == []
    (tmp_path / "new" / "root.key").write_text("mine")
    done = serve("--init", str(tmp_path / "new"))
    assert done.returncode == 2 and "root.key exists" in done.stderr
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["root.key"]
    assert (tmp_path / "new" / "root.key").read_text() == "mine"
