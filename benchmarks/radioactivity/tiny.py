"""How many windows the differential statistic saves, and whether clean suspects stay clean.

    python benchmarks/radioactivity/tiny.py [--seeds 8] [--keys 200]

Transformers of two layers, trained from nothing on this machine (`filigrane.study.tiny`); writes
tiny.json and tiny.md beside this file. A few minutes.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np

from filigrane import GreenList, Gumbel, Key, stats
from filigrane.bench.machine import describe
from filigrane.radioactivity import answers, argmax, differential, soft, testing
from filigrane.radioactivity.ngram import marked
from filigrane.schemes import Scheme
from filigrane.study import tiny

HERE = Path(__file__).parent


def ratio(one: np.ndarray, two: np.ndarray, rng: np.random.Generator) -> dict[str, float]:
    """Windows that `two` needs for each of `one`, at equal z: squared ratio of mean z.

    z grows as the root of the number of windows. The interval is of 10,000 draws of seeds.
    """
    draws = rng.integers(0, one.shape[0], size=(10_000, one.shape[0]))
    low = np.maximum(two[draws].mean(axis=1), 1e-9)
    ratios = (one[draws].mean(axis=1) / low) ** 2
    return {
        "value": float((one.mean() / two.mean()) ** 2),
        "low": float(np.quantile(ratios, 0.025)),
        "high": float(np.quantile(ratios, 0.975)),
    }


def calibrate(scheme: Scheme, keys: int) -> list[dict[str, float | str | int]]:
    """p-values of a clean Bob: new texts under each key (open), or his answers (closed)."""
    here = tiny.world(1000, scheme)
    suspect = tiny.bob(here, 0.0)
    width = scheme.context_width
    said = {
        name: answers(tiny.asked(here, suspect, texts[:, :8]), width)
        for name, texts in (("supervised", here.plain[:100]), ("unsupervised", here.fresh))
    }
    logs: dict[str, list[float]] = {}
    rng = np.random.default_rng(0)
    for number in range(keys):
        key = Key.generate(f"key-{number}", slots=1)
        for name in ("supervised", "unsupervised"):
            texts = marked(here.source, 8, tiny.LENGTH, key, scheme, rng)
            seen = tiny.reading(here, suspect, texts)
            evidence = {
                "argmax": argmax(seen),
                "soft": soft(seen),
                "differential": differential(seen),
            }
            for statistic, item in evidence.items():
                found = testing.test(item, key, scheme, decoys=0)
                logs.setdefault(f"open, {name}: {statistic}", []).append(found.log_pvalue)
            found = testing.test(said[name], key, scheme, decoys=0)
            logs.setdefault(f"closed, {name}", []).append(found.log_pvalue)
    rows: list[dict[str, float | str | int]] = []
    for name, values in logs.items():
        p = np.exp(values)
        rows.append(
            {
                "scheme": scheme.name,
                "test": name,
                "keys": keys,
                "ks_pvalue": math.exp(stats.log_uniformity(p)),
                "mean": float(p.mean()),
                "at_5_percent": float((p <= 0.05).mean()),
                "smallest": float(p.min()),
            }
        )
    return rows


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--keys", type=int, default=200)
    options = parser.parse_args()
    rows = []
    schemes = (GreenList(context_width=1, gamma=0.25, delta=3.0), Gumbel(context_width=1))
    for scheme in schemes:
        for seed in range(options.seeds):
            here = tiny.world(seed, scheme)
            for rho in (1.0, 0.1, 0.05, 0.0):
                if rho in (1.0, 0.0) and seed:
                    continue
                rows += [row | {"scheme": scheme.name} for row in tiny.trial(here, rho, print)]
    rng = np.random.default_rng(0)
    savings = []
    for scheme in schemes:
        for rho in (0.1, 0.05):
            for setting in ("open, supervised", "open, unsupervised"):
                z = {
                    name: np.array(
                        [
                            row["z"]
                            for row in rows
                            if (row["scheme"], row["rho"], row["setting"], row["statistic"])
                            == (scheme.name, rho, setting, name)
                        ]
                    )
                    for name in ("argmax count", "soft", "differential")
                }
                savings.append(
                    {
                        "scheme": scheme.name,
                        "rho": rho,
                        "setting": setting,
                        "seeds": options.seeds,
                        **{f"z {name}": float(values.mean()) for name, values in z.items()},
                        "saving": ratio(z["differential"], z["argmax count"], rng),
                    }
                )
    clean = [row for scheme in schemes for row in calibrate(scheme, options.keys)]
    document = {"machine": describe(), "rows": rows, "savings": savings, "calibration": clean}
    (HERE / "tiny.json").write_text(json.dumps(document, indent=1) + "\n")
    lines = [
        "# Tiny transformers",
        "",
        "Windows that the argmax count needs for each one of the differential statistic, at equal "
        "z: squared ratio of mean z over seeds, with a 95 % interval of draws of seeds.",
        "",
        "| scheme | rho | setting | z argmax | z soft | z differential | saving |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in savings:
        saving = row["saving"]
        lines.append(
            f"| {row['scheme']} | {row['rho']:g} | {row['setting']} | {row['z argmax count']:.2f} "
            f"| {row['z soft']:.2f} | {row['z differential']:.2f} | {saving['value']:.0f} x "
            f"[{saving['low']:.0f}, {saving['high']:.0f}] |"
        )
    lines += [
        "",
        "## One seed at both ends",
        "",
        "| scheme | rho | setting | statistic | log10 p |",
    ]
    lines.append("|---|---|---|---|---|")
    lines += [
        f"| {row['scheme']} | {row['rho']:g} | {row['setting']} | {row['statistic']} | "
        f"{row['log10_pvalue']:.1f} |"
        for row in rows
        if row["rho"] in (0.0, 1.0)
    ]
    lines += ["", "## A clean Bob", "", "| scheme | test | keys | KS p | mean p | p <= 0.05 |"]
    lines.append("|---|---|---|---|---|---|")
    lines += [
        f"| {row['scheme']} | {row['test']} | {row['keys']} | {row['ks_pvalue']:.2g} | "
        f"{row['mean']:.3f} | {row['at_5_percent']:.1%} |"
        for row in clean
    ]
    (HERE / "tiny.md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
