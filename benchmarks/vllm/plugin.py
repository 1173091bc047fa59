"""What the plugin costs in vLLM: two servers side by side, one without filigrane's keyring.

    FILIGRANE_VLLM=.vllm/bin/vllm python benchmarks/vllm/plugin.py MODEL_FOLDER

Both servers run all the time, and are asked in turn: 16 requests at once, 64 tokens each, without
a mark, then with each scheme. Writes plugin.json and plugin.md beside this file.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "tests"))

from openai import OpenAI  # noqa: E402

import vllmkit  # noqa: E402
from filigrane.bench.machine import describe  # noqa: E402

SCHEMES = ("gumbel", "greenlist:delta=2", "tournament", "gamma", "delta")
REQUESTS, TOKENS, ROUNDS = 16, 64, int(os.environ.get("ROUNDS", "7"))
MODES: dict[str, dict[str, str] | None] = {
    "without filigrane": None,
    "plugin, opted out": {"filigrane_mark": "false"},
    **{scheme.partition(":")[0]: {"filigrane_scheme": scheme} for scheme in SCHEMES},
}


def tokens_per_second(client: OpenAI, arguments: dict[str, str] | None) -> float:
    body: dict[str, Any] = {"ignore_eos": True, "vllm_xargs": arguments or {}}

    def ask(number: int) -> int:
        answer = client.completions.create(
            model="smollm2",
            prompt=f"The history of the town number {number} begins in the year",
            max_tokens=TOKENS,
            temperature=1.0,
            top_p=0.95,
            extra_body=body,
        )
        assert answer.usage is not None
        return answer.usage.completion_tokens

    start = time.perf_counter()
    with ThreadPoolExecutor(REQUESTS) as pool:
        written = sum(pool.map(ask, range(REQUESTS)))
    return written / (time.perf_counter() - start)


def main() -> None:
    model = sys.argv[1]
    facts = describe()
    env = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
    options = ["--max-model-len", "512", "--max-num-seqs", str(REQUESTS), "--dtype", "bfloat16"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        head = f'default = "key-a"\nschemes = {json.dumps(SCHEMES)}\n'
        vllmkit.keyring(folder, head, ["a"], tokens=False)
        ring = env | {"FILIGRANE_KEYRING": name}
        with (
            vllmkit.serve(model, folder / "plain.log", options, env) as plain,
            vllmkit.serve(model, folder / "marked.log", options, ring) as marked,
            OpenAI(base_url=plain, api_key="-", timeout=600) as without,
            OpenAI(base_url=marked, api_key="-", timeout=600) as beside,
        ):
            measured: dict[str, list[float]] = {mode: [] for mode in MODES}
            for turn in range(-1, ROUNDS):
                for mode, arguments in MODES.items():
                    client = without if arguments is None else beside
                    speed = tokens_per_second(client, arguments)
                    if turn >= 0:
                        measured[mode].append(speed)
                    print(turn, mode, round(speed, 1), flush=True)
    rows = [
        {
            "mode": mode,
            "tokens_per_second": [round(speed, 2) for speed in speeds],
            # Of each round's own plain figure, so that a slow minute hits both.
            "share_of_plain": round(
                statistics.median(
                    s / p for s, p in zip(speeds, measured["without filigrane"], strict=True)
                ),
                3,
            ),
        }
        for mode, speeds in measured.items()
    ]
    document = {"benchmark": "vllm-plugin", "machine": facts, "rows": rows}
    document["protocol"] = {
        "requests": REQUESTS,
        "tokens": TOKENS,
        "rounds": ROUNDS,
        "model": "SmolLM2-135M-Instruct, bfloat16",
        "vllm": vllm_version(),
    }
    (HERE / "plugin.json").write_text(json.dumps(document, indent=1) + "\n")
    (HERE / "plugin.md").write_text(page(document))


def vllm_version() -> str:
    folder = vllmkit.PYTHON.parents[1]
    found = next(folder.glob("lib/python*/site-packages/vllm*.dist-info"))
    return found.name.removesuffix(".dist-info")


def page(document: dict[str, Any]) -> str:
    facts, how = document["machine"], document["protocol"]
    lines = [
        "# The plugin's cost in vLLM",
        "",
        "Made by `plugin.py`; do not edit. Two servers side by side, asked in turn: "
        f"{how['requests']} requests at once of {how['tokens']} tokens, temperature 1, top-p 0.95, "
        f"{how['rounds']} rounds. {how['model']}, {how['vllm']}, torch {facts['torch']}; "
        f"{facts['cpu']}, {facts['cores']} cores, load {facts['load_average']} before the run. "
        "The share is the median over rounds of each round's own ratio.",
        "",
        "| | tokens/s, median | range | share of plain |",
        "|---|---|---|---|",
    ]
    for row in document["rows"]:
        speeds = row["tokens_per_second"]
        median = statistics.median(speeds)
        lines.append(
            f"| {row['mode']} | {median:.0f} | {min(speeds):.0f} to {max(speeds):.0f} | "
            f"{row['share_of_plain']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
