"""Run every benchmark and keep its JSON in benchmarks/results; table.py makes the page of it."""

import subprocess
import sys
from pathlib import Path

RESULTS = Path(__file__).parent / "results"

for name in ("embed", "detect", "trace"):
    print(f"bench {name}", flush=True)
    command = [sys.executable, "-m", "filigrane", "bench", name, "--out", RESULTS / f"{name}.json"]
    subprocess.run(command, check=True)
