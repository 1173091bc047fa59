"""What a figure was taken on: processor, system, versions, commit, date."""

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("filigrane", "numpy", "numba", "torch", "transformers")
_VECTORS = ("sse4.2", "avx", "avx2", "avx512f", "avx512vl", "avx512bw", "neon", "sve", "sve2")


def describe() -> dict[str, Any]:
    """The machine as a JSON-ready dictionary; what cannot be found out is None."""
    return {
        "cpu": _cpu(),
        "cores": _cores(),
        "vector_extensions": _vector_extensions(),
        "load_average": _load(),
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "commit": _commit(Path(__file__).parents[3]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu() -> str | None:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or None


def _cores() -> int | None:
    """Processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _vector_extensions() -> list[str]:
    from llvmlite import binding

    features = binding.get_host_cpu_features()
    return [name for name in _VECTORS if features.get(name)]


def _load() -> float | None:
    """Average number of busy processes of the last minute: what else was going on."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    """The commit of the source tree this package runs from; '+' says that it was changed."""
    if not (root / ".git").exists():
        return None
    try:
        head = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no", "--", "src")
    except (OSError, subprocess.SubprocessError):
        return None
    return head + "+" * bool(changed)


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=10)
    return done.stdout.strip()
