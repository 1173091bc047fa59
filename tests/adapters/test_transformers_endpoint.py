"""Collecting from `transformers serve`, with a real model behind it."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import servers
from filigrane.adapters.collecting import Prompt, collect
from filigrane.adapters.endpoints import Endpoint, Parameters, find_form
from filigrane.errors import EndpointError

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def loaded() -> Any:
    from filigrane.adapters.models import load

    return load("smollm2")


@pytest.fixture(scope="module")
def folder(loaded: Any) -> str:
    name: str = loaded.model.name_or_path
    return name


def greedy(loaded: Any, prompt: Prompt, api: str) -> str:
    """What the model says to a prompt without any server in between."""
    import torch

    from filigrane.adapters.models import chat_prompt

    ids = chat_prompt(loaded, prompt.text) if api == "chat" else loaded.tokenizer(prompt.text)
    tensor = torch.as_tensor(ids if api == "chat" else ids["input_ids"])[None]
    out = loaded.model.generate(
        tensor, attention_mask=torch.ones_like(tensor), do_sample=False, max_new_tokens=12
    )
    text: str = loaded.tokenizer.decode(out[0, tensor.shape[1] :], skip_special_tokens=True)
    return text


@pytest.fixture(scope="module")
def url(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    pytest.importorskip("openai")
    port = servers.free_port()
    program = Path(sys.executable).with_name("transformers")
    command = [str(program), "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path_factory.mktemp("serve") / "log"
    env = {"OMP_NUM_THREADS": "1"}
    with servers.server([*command, "--device", "cpu"], port, log, env, patience=180) as base:
        yield base


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_answers_are_collected(
    url: str, loaded: Any, folder: str, tmp_path: Path, api: Any
) -> None:
    asked = [
        Prompt(id="a", text="The capital of France is", number=0),
        Prompt(id="b", text="The sun is a", number=1),
    ]
    path = tmp_path / "a.jsonl"
    parameters = Parameters(max_tokens=12, temperature=0.0, top_p=1.0, seed=1)
    with Endpoint(url, folder, api=api, timeout=100) as endpoint:
        done = collect(endpoint, asked, path, parameters, concurrency=2)
        assert done.complete and done.written == 2 and done.without_tokens == 2
        again = collect(endpoint, asked, path, parameters)
        assert (again.written, again.skipped) == (0, 2)
    rows = {row["id"]: row for row in map(json.loads, path.read_text().splitlines())}
    for prompt in asked:
        assert rows[prompt.id]["answer"].strip() == greedy(loaded, prompt, api).strip()
    assert rows["b"]["finish_reason"] == "length" and rows["b"]["model"].startswith(folder)
    assert done.output_tokens <= 24


def test_there_is_no_reading_mode(url: str, folder: str) -> None:
    with (
        Endpoint(url, folder, api="completions", timeout=100, retries=0) as endpoint,
        pytest.raises(EndpointError, match="closed mode"),
    ):
        find_form(endpoint, [504, 2632, 282], 5)


def test_its_refusals_are_told(url: str) -> None:
    with (
        Endpoint(url, "other-model", timeout=100, retries=0) as endpoint,
        pytest.raises(EndpointError, match="pinned"),
    ):
        endpoint.ask("x", None, Parameters(max_tokens=2))
