"""A corpus read under one key by a cluster of Ray; without Ray, by this process.

    python deploy/ray_corpus.py --key-file acme.key --scheme gumbel --address auto texts.jsonl

Each line of the corpus is a JSON object with `tokens`, a list of ids; each line of the answer has
its line number, log10 of the p-value, the same corrected for the number of lines, and how many
tokens were scored. The file and the key file must be at the same paths on every node: neither texts
nor the key pass through Ray's object store, which may write to disk. Tasks get paths and byte
ranges, and give back numbers.

Any other scheduler does the same with `examine`, or asks the service: docs/deploying.md.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

Result = tuple[float | None, int, str | None]
"""log p-value, tokens scored, and what was wrong with a line, if anything was."""


def ranges(path: str, size: int) -> list[tuple[int, int]]:
    """The file in pieces of about `size` bytes, half open; a line belongs to where it begins."""
    end = os.path.getsize(path)
    return [(start, min(end, start + size)) for start in range(0, end, size)]


def examine(path: str, start: int, stop: int, key_file: str, scheme: str) -> list[Result]:
    """Test every line that begins in start..stop; runs where Ray puts it."""
    import filigrane as fg

    # Read here: a key refuses to be pickled.
    key, mark = fg.Key.load(key_file), fg.from_tag(scheme)
    return [_test(fg, line, key, mark) for line in _lines(path, start, stop)]


def _lines(path: str, start: int, stop: int) -> Iterator[bytes]:
    with open(path, "rb") as corpus:
        if start:
            # The line that began before is another task's, unless a line begins right here.
            corpus.seek(start - 1)
            corpus.readline()
        while corpus.tell() < stop:
            line = corpus.readline()
            if line.strip():
                yield line


def _test(fg: Any, line: bytes, key: Any, mark: Any) -> Result:
    try:
        tokens = json.loads(line)["tokens"]
        result = fg.detect(tokens, key, mark)
    except fg.FiligraneError as error:
        return None, 0, type(error).__name__
    except (ValueError, KeyError, TypeError):
        return None, 0, "NoTokens"
    return result.log_pvalue, result.n_scored, None


def by_ray(ray: Any, tasks: list[tuple[int, int]], rest: tuple[str, str, str]) -> list[Result]:
    """All results in the order of the corpus; at most a few tasks a processor wait at a time."""
    path, key_file, scheme = rest
    remote = ray.remote(num_cpus=1)(examine)
    ahead = 4 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting: dict[Any, int] = {}
    found: dict[int, list[Result]] = {}
    for number, (start, stop) in enumerate(tasks):
        waiting[remote.remote(path, start, stop, key_file, scheme)] = number
        while len(waiting) >= ahead or (waiting and number == len(tasks) - 1):
            for done in ray.wait(list(waiting))[0]:
                found[waiting.pop(done)] = ray.get(done)
    return [result for number in range(len(tasks)) for result in found[number]]


def write(results: list[Result], out: TextIO) -> None:
    """One line each. Corrected: times the number of texts tested (Bonferroni), dependent or not."""
    n_tested = sum(1 for log_pvalue, _, _ in results if log_pvalue is not None)
    for number, (log_pvalue, n_scored, problem) in enumerate(results, 1):
        line: dict[str, object] = {"line": number, "n_scored": n_scored}
        if log_pvalue is None:
            line["problem"] = problem
        else:
            line["log10_pvalue"] = round(log_pvalue / math.log(10), 3)
            corrected = min(0.0, log_pvalue + math.log(n_tested))
            line["log10_corrected"] = round(corrected / math.log(10), 3)
        out.write(json.dumps(line) + "\n")


def main() -> int:
    """Read the corpus that the arguments name."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("corpus", help="JSON lines with tokens, at this path on every node")
    parser.add_argument("--key-file", required=True, help="key file, at this path on every node")
    parser.add_argument("--scheme", required=True, help="a scheme's tag, such as gumbel")
    parser.add_argument("--address", help="of the cluster, as for ray.init; none: this machine's")
    parser.add_argument("--bytes", type=int, default=4_000_000, help="of the corpus, a task")
    given = parser.parse_args()
    corpus, key_file = os.path.abspath(given.corpus), os.path.abspath(given.key_file)
    tasks = ranges(corpus, given.bytes)
    try:
        import ray
    except ImportError:
        sys.stderr.write("Ray is not installed (pip install ray); this process reads alone.\n")
        results = [
            result
            for start, stop in tasks
            for result in examine(corpus, start, stop, key_file, given.scheme)
        ]
    else:
        ray.init(address=given.address, log_to_driver=False)
        try:
            results = by_ray(ray, tasks, (corpus, key_file, given.scheme))
        finally:
            ray.shutdown()
    write(results, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
