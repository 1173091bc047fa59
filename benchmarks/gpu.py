"""Everything that needs a GPU, in one command: the tests of the fused kernel, then its benchmark.

    python benchmarks/gpu.py            some minutes; writes benchmarks/gpu/<name of the GPU>.json
    python benchmarks/gpu.py --quick    tiny sizes: shows that it runs, measures nothing

Tests that fail end it: speed of wrong tokens is of no interest. Exit code 0 if all passed, 2 if
there is no GPU, that of pytest otherwise.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from filigrane.bench.fused import GOAL, reached, run
from filigrane.errors import MissingDependency

ROOT = Path(__file__).parent.parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        print("no torch here: pip install 'filigrane[torch]' triton", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("torch sees no CUDA device: nothing was tested or measured.", file=sys.stderr)
        return 2
    tests = ["tests/adapters/test_fused.py", "tests/adapters/test_torch.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", *tests], cwd=ROOT, check=False
    )
    if done.returncode:
        return done.returncode
    try:
        document = run(arguments.quick, lambda n, of, what: print(f"{n}/{of} {what}", flush=True))
    except MissingDependency as error:
        print(error, file=sys.stderr)
        return 2
    name = re.sub(r"[^a-z0-9]+", "-", document["machine"]["gpu"].lower()).strip("-")
    out = arguments.out or ROOT / "benchmarks" / "gpu" / f"{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(table(document["rows"]))
    share = reached(document["rows"])
    if share is not None:
        verdict = "reached" if share >= GOAL else "MISSED"
        print(
            f"gumbel, float32, 256 x 151,936: {share:.0%} of the floor; goal {GOAL:.0%} {verdict}"
        )
    print(f"written: {out}")
    return 0


def table(rows: list[dict[str, Any]]) -> str:
    """Fixed columns, for reading."""
    names = ("dtype", "batch", "vocab", "case", "median_us", "ratio", "floor_share", "extra_mb")
    lines = ["  ".join(f"{name:>12}" for name in names)]
    lines += ["  ".join(f"{row.get(name, '')!s:>12}" for name in names) for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
