"""The golden vectors: re-derived without filigrane, and met by every implementation in it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import filigrane as fg
from filigrane import prf
from filigrane.contexts import Corpus, History, collect, scored_positions
from filigrane.embedding import MarkedSampler
from filigrane.errors import TooShort
from filigrane.kernels import prf as kernels
from filigrane.schemes import from_tag

VECTORS = Path(__file__).parent.parent / "vectors"
FOLDER = VECTORS / "v1"


def load(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


PRF, CONTEXTS, SCHEMES = load("prf"), load("contexts"), load("schemes")


def module(name: str):
    spec = importlib.util.spec_from_file_location(name, VECTORS / f"{name}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


VERIFY = module("verify")


def key_words(text: str) -> np.ndarray:
    return np.frombuffer(bytes.fromhex(text), "<u4").astype(np.uint32)


def numbers(words: list[str]) -> np.ndarray:
    return np.array([int(word, 16) for word in words], dtype=np.uint32)


def titles(cases: list[dict]) -> list[str]:
    return [f"{i}:{c.get('scheme', '')} {c.get('about', '')}".strip() for i, c in enumerate(cases)]


# --- the files ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_standard_library_alone_derives_every_value():
    command = [sys.executable, "-I", "-S", str(VECTORS / "verify.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == sorted(p.name for p in FOLDER.glob("*.json"))
    assert not any("filigrane" in str(VERIFY.__dict__.get(name)) for name in ("np", "fg"))
    assert "import filigrane" not in (VECTORS / "verify.py").read_text("utf-8")


def leaves(value, path=()):
    """Paths to every number and text of a JSON value, but for what is only said about it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("about", "source", "provenance"):
                yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from leaves(inner, (*path, i))
    else:
        yield path


def changed(value):
    """Another value of the same kind, as like it as can be: one digit differs."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int | float):
        return value + 1
    digits = [i for i in range(len(value)) if value[i] in "0123456789abcdef"]
    if not digits:
        return value + "0"
    at = digits[-1]
    return value[:at] + ("1" if value[at] == "0" else "0") + value[at + 1 :]


@pytest.mark.parametrize("name", ["keys", "custody", "prf", "contexts"])
def test_any_changed_digit_is_seen(name, tmp_path):
    content = load(name)
    paths = list(leaves(content))
    rng = np.random.default_rng(2)
    for number in rng.choice(len(paths), 30, replace=False):
        assert problems_after_change(name, content, paths[number], tmp_path), paths[number]


def test_a_changed_digit_of_a_scheme_is_seen(tmp_path):
    """One case of each section at a time: the exact tails of them all take seconds."""
    rng = np.random.default_rng(3)
    for section in ("detect", "trace", "laws", "generate"):
        cases = [c for c in SCHEMES[section] if "tournament" not in c["scheme"]]
        for i in rng.choice(len(cases), 2, replace=False):
            others = {name: [] for name in SCHEMES if name != "about"}
            content = {**others, section: [cases[i]]}
            paths = list(leaves(content[section], (section,)))
            for number in rng.choice(len(paths), 3):
                seen = problems_after_change("schemes", content, paths[number], tmp_path)
                # The file without its other sections is itself a problem, three times.
                assert seen > 3, paths[number]


def problems_after_change(name: str, content: dict, path: tuple, tmp_path: Path) -> int:
    bad = json.loads(json.dumps(content))
    place = bad
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = changed(place[path[-1]])
    copy = tmp_path / f"{name}.json"
    copy.write_text(json.dumps(bad), "utf-8")
    try:
        return len(VERIFY.verify(copy).problems)
    except (ValueError, KeyError, IndexError, OverflowError, ArithmeticError):
        return 100  # it cannot even be read, and the script says so


def test_the_exit_status_tells(tmp_path):
    text = (FOLDER / "prf.json").read_text("utf-8")
    word = PRF["block"][3]["words"][5]
    for content, status in (
        (text, 0),
        (text.replace(word, word[:-1] + ("1" if word[-1] == "0" else "0")), 1),
        ("{}", 2),
        ("[", 2),
    ):
        copy = tmp_path / "prf.json"
        copy.write_text(content, "utf-8")
        command = [sys.executable, "-I", "-S", str(VECTORS / "verify.py"), str(copy)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == status, done.stdout
        assert len(done.stdout.splitlines()) == 1


def test_the_example_of_the_specification():
    """Every number of SPEC.md, section 8, from the reference."""
    spec = (VECTORS.parent / "SPEC.md").read_text("utf-8")
    example = spec[spec.index("## 8. Example") :]
    key = fg.Key.from_text(VERIFY.key_text(bytes(range(32)), "alpha", 8))
    words = key.prf_keys("gumbel/4")[0]
    shown = [key.export_text(), key.fingerprint, words.astype("<u4").tobytes().hex()]
    shown.append(key.user(1).prf_keys("gumbel/4")[0].astype("<u4").tobytes().hex())
    shown.append(" ".join(hexes(words)))
    blocks = prf.block(words, [[1, 2, 3, 4], [2, 3, 4, 5]])
    shown += [" ".join(hexes(row)) for row in blocks]
    shown += hexes(prf.field(blocks[:, prf.FIELD], [5, 6]))
    shown += [f"{score:.7f}" for score in fg.Gumbel().score(blocks, [5, 6])]
    result = fg.detect([1, 2, 3, 4, 5, 6], key, fg.Gumbel())
    shown += [f"slot {result.slot}", f"{result.slot_log_pvalues[0]:.10f}"]
    shown.append(f"{result.log_pvalue:.10f}")
    assert [text for text in shown if text[:-1] not in example] == []


# --- the PRF -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PRF["chacha"], ids=titles(PRF["chacha"]))
def test_the_core(case):
    out = prf.chacha_block(key_words(case["key"]), numbers(case["input"]), case["rounds"])
    np.testing.assert_array_equal(out, numbers(case["output"]))


def test_blocks_of_every_width():
    assert {1, 2, 3, 4, 5, 8, 9, 64} <= {len(case["context"]) for case in PRF["block"]}
    for case in PRF["block"]:
        key, words = key_words(case["key"]), numbers(case["words"])
        np.testing.assert_array_equal(prf.block(key, case["context"]), words)
        # Several lanes, so that a mistake in the strides shows.
        context = np.array([case["context"]] * 3, dtype=np.uint32)
        out = kernels.blocks(np.array([key ^ 1, key, key ^ 2], dtype=np.uint32), context)
        np.testing.assert_array_equal(out[1], words)
        assert (out[0] != words).all() and (out[2] != words).all()
        assert hexes(words[prf.FIELD]) == case["seed"]
        assert hexes(words[prf.COIN : prf.COIN + 1]) == [case["coin"]]


def hexes(words: np.ndarray) -> list[str]:
    return [f"{word:08x}" for word in words.tolist()]


def test_fields():
    for case in PRF["field"]:
        seed, tokens = numbers(case["seed"]), np.array(case["tokens"], dtype=np.uint32)
        wanted = numbers(case["numbers"])
        np.testing.assert_array_equal(prf.field(seed, tokens), wanted)
        out = np.empty_like(wanted)
        kernels.field_row(*seed, tokens, out)
        np.testing.assert_array_equal(out, wanted)


def test_numbers_from_keys():
    """What scores are made of: block and field in one, for one chunk of context."""
    rng = np.random.default_rng(1)
    lanes = kernels.LANES
    keys = rng.integers(0, 2**32, (lanes, 8), dtype=np.uint32)
    contexts = rng.integers(0, 2**32 - 1, (lanes, 4), dtype=np.uint32)
    tokens = rng.integers(0, 2**32 - 1, lanes, dtype=np.uint32)
    found, coins = np.empty(lanes, np.uint32), np.empty(lanes, np.uint32)
    flat = [np.ascontiguousarray(words.T).reshape(-1) for words in (keys, contexts)]
    kernels.number_lanes(*flat, tokens, found, coins, lanes)
    blocks = prf.block(keys, contexts)
    np.testing.assert_array_equal(found, prf.field(blocks[:, prf.FIELD], tokens))
    np.testing.assert_array_equal(coins, blocks[:, prf.COIN])


@pytest.mark.slow
def test_the_torch_twin():
    torch = pytest.importorskip("torch")
    from filigrane.adapters import torch as twin

    def words(tensor) -> np.ndarray:
        return tensor.cpu().numpy().astype(np.int64).astype(np.uint32)

    for case in PRF["block"]:
        context = torch.tensor([case["context"]] * 2, dtype=torch.int64)
        keys = twin.to_words(np.array([key_words(case["key"])] * 2))
        np.testing.assert_array_equal(words(twin.block(keys, context)[1]), numbers(case["words"]))
    for case in PRF["field"]:
        seeds = twin.to_words(numbers(case["seed"]))
        out = twin.field(seeds, torch.tensor(case["tokens"], dtype=torch.int64))
        np.testing.assert_array_equal(words(out), numbers(case["numbers"]))


# --- contexts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CONTEXTS["cases"], ids=titles(CONTEXTS["cases"]))
def test_scored_positions(case):
    texts, width = case["texts"], case["width"]
    assert scored_positions(Corpus(texts), width).tolist() == case["positions"]
    if case["too_short"]:
        with pytest.raises(TooShort):
            collect(Corpus(texts), width)
        return
    evidence = collect(Corpus(texts), width)
    assert evidence.positions.tolist() == case["positions"]
    assert evidence.n_repeated == case["n_repeated"] and evidence.n_tokens == case["n_tokens"]
    # A generator that was given the other texts marks the same positions of the last one.
    history = History(width, texts[:-1])
    start = sum(map(len, texts[:-1]))
    marked = []
    for t, token in enumerate(texts[-1]):
        if history.fresh():
            marked.append(start + t)
        history.push(token)
    assert marked == [position for position in case["positions"] if position >= start]


# --- schemes -----------------------------------------------------------------------------------


def holder(case: dict):
    key = fg.Key.from_text(case["key"])
    return key if case["user"] is None else key.user(int(case["user"]))


def exact(scheme, value) -> float:
    """A score or total of the file in the library's units."""
    unit = {"gamma": 2.0**-32, "delta": 2.0**-64}.get(scheme.name, 1.0)
    return float(value) * unit


@pytest.mark.parametrize("case", SCHEMES["detect"], ids=titles(SCHEMES["detect"]))
def test_detect(case):
    scheme, key = from_tag(case["scheme"]), holder(case)
    assert scheme.tag == case["scheme"] and scheme.label == case["label"]
    texts = case["texts"]
    claim = texts[0] if len(texts) == 1 else Corpus(texts)
    result = fg.detect(claim, key, scheme)
    wanted = [float(slot["log_p"]) for slot in case["slots"]]
    assert result.slot_log_pvalues == pytest.approx(wanted, rel=1e-10, abs=0)
    assert result.log_pvalue == pytest.approx(float(case["log_p"]), rel=1e-10, abs=0)
    assert (result.slot, result.n_scored) == (case["slot"], case["n_scored"])
    assert result.n_repeated == case["n_repeated"]
    total = exact(scheme, case["slots"][case["slot"]]["total"])
    assert result.statistic == pytest.approx(total, rel=1e-13, abs=0)

    evidence = collect(claim, scheme.context_width)
    for words, slot in zip(key.prf_keys(scheme.label), case["slots"], strict=True):
        blocks = prf.block(words, evidence.windows)
        assert hexes(prf.field(blocks[:, prf.FIELD], evidence.tokens)) == slot["numbers"]
        if "coins" in slot:
            assert hexes(blocks[:, prf.COIN]) == slot["coins"]
        scores = [exact(scheme, score) for score in slot["scores"]]
        np.testing.assert_allclose(scheme.score(blocks, evidence.tokens), scores, rtol=1e-14)


@pytest.mark.parametrize("case", SCHEMES["trace"], ids=titles(SCHEMES["trace"]))
def test_trace(case):
    scheme, root = from_tag(case["scheme"]), fg.Key.from_text(case["key"])
    n = case["users"]
    for keys in (root.users(n), [root.user(i) for i in range(n)]):
        result = fg.trace(case["texts"][0], keys, scheme, top=n)
        logs = [candidate.log_pvalue for candidate in result.candidates]
        assert logs == pytest.approx([float(p) for p in case["log_ps"]], rel=1e-10, abs=0)
        # Users whose p-values tie may come in either order.
        clear = [i for i in range(n) if logs.count(logs[i]) == 1]
        assert [result.candidates[i].index for i in clear] == [case["order"][i] for i in clear]
        assert result.n_tests == n * root.slots


@pytest.mark.parametrize("case", SCHEMES["laws"], ids=titles(SCHEMES["laws"]))
def test_laws(case):
    probs = np.array(case["weights"], dtype=np.float64) / sum(case["weights"])
    law = from_tag(case["scheme"]).reweight(probs, numbers(case["block"]))
    np.testing.assert_allclose(law, [float(p) for p in case["law"]], rtol=0, atol=1e-13)


@pytest.mark.parametrize("case", SCHEMES["generate"], ids=titles(SCHEMES["generate"]))
def test_generators(case):
    scheme = from_tag(case["scheme"])
    sampling = fg.Sampling(temperature=float(case["temperature"]), top_k=case["top_k"])
    sampler = MarkedSampler(
        scheme, [holder(case)], sampling=sampling, rng=_slot_zero(holder(case).slots)
    )
    assert sampler.slots == [0]
    ids = np.arange(case["vocab_size"], dtype=np.int64)
    drawn = []
    for position in range(case["length"]):
        if str(position) in case["forced"]:
            assert not sampler.blocks()[0][0]
            drawn.append(case["forced"][str(position)])
            sampler.push(0, drawn[-1])
            continue
        rule = (ids * 2654435761 + position * 2246822519) % 2**32 >> 12
        drawn.append(int(sampler.sample((rule / 65536)[None].astype(np.float32))[0]))
    assert drawn == case["tokens"]
    assert sampler.marked == [[bool(mark) for mark in case["marked"]]]


def _slot_zero(slots: int) -> np.random.Generator:
    """A generator whose first draw of a slot is 0."""
    for seed in range(1000):
        if np.random.default_rng(seed).integers(slots) == 0:
            return np.random.default_rng(seed)
    raise AssertionError


@pytest.mark.parametrize("name", ["keys", "prf", "contexts"])
def test_the_files_are_what_the_generator_writes(name, monkeypatch):
    pytest.importorskip("mpmath")
    monkeypatch.syspath_prepend(str(VECTORS))
    generate = module("generate")
    assert generate.FILES[f"{name}.json"]() == (FOLDER / f"{name}.json").read_text("utf-8")
