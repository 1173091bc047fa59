"""Reading and collecting with vLLM: a real server, in an environment of its own."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vllmkit
from filigrane.adapters.collecting import Prompt, collect
from filigrane.adapters.endpoints import (
    Endpoint,
    Parameters,
    find_form,
    prompt_probabilities,
    read_endpoint,
    token_strings,
)
from filigrane.errors import EndpointError
from filigrane.radioactivity.evidence import Document

pytestmark = vllmkit.marks

TOP = 18
MOST = 20  # vLLM's own limit: what an ordinary server gives has to be enough
TEXT = (
    "The weather in the north is cold in winter. The weather in the south is warm in winter, and "
    "the people there grow oranges, lemons, figs, and a small red fruit that has no English name."
)


@pytest.fixture(scope="module")
def loaded() -> Any:
    from filigrane.adapters.models import load

    return load("smollm2")


@pytest.fixture(scope="module")
def url(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    options = ["--max-model-len", "1024", "--max-logprobs", str(MOST), "--max-num-seqs", "8"]
    log = tmp_path_factory.mktemp("vllm") / "log"
    with vllmkit.serve(loaded.model.name_or_path, log, options) as base:
        yield base


@pytest.fixture
def endpoint(url: str) -> Iterator[Endpoint]:
    with Endpoint(url, "smollm2", api="completions") as opened:
        yield opened


@pytest.fixture(scope="module")
def ids(loaded: Any) -> Any:
    return np.asarray(loaded.tokenizer(TEXT)["input_ids"], dtype=np.int64)


@pytest.fixture(scope="module")
def laws(loaded: Any, ids: Any) -> Any:
    """(n, V): what transformers says of the same text."""
    import torch

    with torch.inference_mode():
        logits = loaded.model(torch.from_numpy(ids)[None]).logits[0]
    return logits.double().softmax(dim=-1).numpy()


@pytest.mark.parametrize("form", ["prompt_logprobs", "echo"])
def test_probabilities_are_those_of_the_model(
    endpoint: Endpoint, ids: Any, laws: Any, form: Any
) -> None:
    assert find_form(endpoint, ids, TOP) == "prompt_logprobs"
    found = prompt_probabilities(endpoint, ids, TOP, form=form)
    assert len(found) == len(ids) == laws.shape[0]
    outside = 0
    for t, (law, truth) in enumerate(zip(found, laws, strict=True)):
        assert law is not None
        tokens, chances = law
        np.testing.assert_allclose(chances, truth[tokens], rtol=1e-3)
        assert (np.diff(chances) <= 0).all() and TOP - 2 <= len(tokens) <= TOP
        # Nothing that is left out is larger, up to what two programs differ in.
        rest = np.delete(truth, tokens).max()
        assert rest <= chances[-1] * (1 + 1e-3)
        if t + 1 < len(ids) and truth[ids[t + 1]] < 0.9 * chances[-1]:
            outside += 1
            assert ids[t + 1] not in tokens, "the text's own next token is green by construction"
    assert outside >= 5, "this text does not show the trap"


def test_tokens_that_are_named_by_their_text(endpoint: Endpoint, loaded: Any, ids: Any) -> None:
    wanted = prompt_probabilities(endpoint, ids, 8, form="echo")
    vocabulary = token_strings(loaded.tokenizer)
    assert len(vocabulary) > 0.97 * loaded.tokenizer_size and vocabulary[" Paris"] == 7042
    # As if it had refused to name them by ids.
    endpoint._refused = frozenset({"return_tokens_as_token_ids"})
    found = prompt_probabilities(endpoint, ids, 8, form="echo", vocabulary=vocabulary)
    same = 0
    for one, other in zip(found, wanted, strict=True):
        assert one is not None and other is not None
        assert set(one[0].tolist()) <= set(other[0].tolist())
        same += one[0].tolist() == other[0].tolist()
    assert same > 0.9 * len(wanted)


def test_a_law_does_not_know_how_the_text_goes_on(endpoint: Endpoint, ids: Any) -> None:
    context = ids[:12]
    rng = np.random.default_rng(4)
    found = []
    for nxt in rng.integers(0, 49152, 6):
        law = prompt_probabilities(endpoint, [*context, nxt], 5)[11]
        assert law is not None
        found.append(law)
    for tokens, chances in found[1:]:
        assert tokens.tolist() == found[0][0].tolist()
        np.testing.assert_allclose(chances, found[0][1], rtol=1e-4)


def test_readings_agree_with_the_local_model(endpoint: Endpoint, loaded: Any, ids: Any) -> None:
    from filigrane.adapters.reading import read

    documents = [
        Document(tokens=ids, start=3),
        Document(tokens=ids[::-1].copy(), start=10, earlier=[ids[5:9]]),
        Document(tokens=ids[4:20]),
    ]
    over_there = list(
        read_endpoint(
            endpoint, documents, 2, vocab_size=loaded.vocab_size, top=TOP, base_endpoint=endpoint
        )
    )
    for number, (reading, document) in enumerate(zip(over_there, documents, strict=True)):
        (local,) = read(loaded, [document], 2, top=TOP, first=number)
        np.testing.assert_array_equal(reading.windows, local.windows)
        np.testing.assert_array_equal(reading.documents, local.documents)
        assert reading.ledger["scored"] == local.ledger["scored"] == len(reading)
        first, other = reading.starts[:-1], local.starts[:-1]
        np.testing.assert_allclose(reading.suspect[first], local.suspect[other], rtol=2e-3)
        # The same argmax, but for ties that two programs may break.
        assert (reading.tokens[first] == local.tokens[other]).mean() > 0.97
        assert reading.base is not None
        np.testing.assert_allclose(reading.base, reading.suspect, atol=1e-6)


def test_answers_come_with_token_ids(url: str, loaded: Any, tmp_path: Path) -> None:
    from filigrane.adapters.models import chat_prompt

    asked = [
        Prompt(id=f"p{i}", text=f"Write a sentence about the number {i}.", number=i)
        for i in range(6)
    ]
    path = tmp_path / "a.jsonl"
    parameters = Parameters(max_tokens=20, seed=5, top_logprobs=3)
    with Endpoint(url, "smollm2") as endpoint:
        done = collect(endpoint, asked, path, parameters)
    assert done.complete and done.without_tokens == 0 and done.written == 6
    rows = {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}
    for prompt in asked:
        row = rows[prompt.id]
        sent = chat_prompt(loaded, prompt.text)
        assert row["prompt_tokens"] == sent.tolist(), "the template is part of what was sent"
        assert loaded.tokenizer.decode(row["tokens"], skip_special_tokens=True) == row["answer"]
        assert len(row["top_logprobs"]) == len(row["tokens"])
        assert all(type(token) is int for top in row["top_logprobs"] for token, _ in top)
    assert len({row["answer"] for row in rows.values()}) == 6
    assert done.output_tokens == sum(len(row["tokens"]) for row in rows.values())


def test_the_same_seed_gives_the_same_answer(url: str) -> None:
    with Endpoint(url, "smollm2") as endpoint:
        one, two, other = (
            endpoint.ask("Say something.", None, Parameters(max_tokens=16, seed=seed))
            for seed in (7, 7, 8)
        )
    assert one.tokens == two.tokens != other.tokens


def test_its_refusals_are_told(url: str, endpoint: Endpoint, ids: Any) -> None:
    with pytest.raises(EndpointError, match=f"greater than max allowed: {MOST}"):
        find_form(endpoint, ids, TOP + 1)
    with pytest.raises(EndpointError, match="context length"):
        prompt_probabilities(endpoint, np.ones(1025, dtype=np.int64), TOP)
    with (
        Endpoint(url, "other") as wrong,
        pytest.raises(EndpointError, match=r"It serves smollm2\."),
    ):
        wrong.ask("x", None, Parameters(max_tokens=1))


def test_the_command_line(url: str, tmp_path: Path) -> None:
    """The whole way, in a process of its own."""
    import sys

    (tmp_path / "p.txt").write_text("Name a colour.\nName a fruit.\n")
    command = [sys.executable, "-m", "filigrane", "radioactivity", "collect", "--json"]
    options = ["--endpoint", url, "--model", "smollm2", "--max-tokens", "8"]
    files = ["--prompts", "p.txt", "--out", "a.jsonl"]
    done = subprocess.run(
        [*command, *options, *files], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["written"], found["model"], found["without_tokens"]) == (2, "smollm2", 0)
