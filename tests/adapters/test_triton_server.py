"""Triton Inference Server: the real one, in an environment of its own, and what needs none.

FILIGRANE_TRITON names that environment's `tritonserver` program; by default it is looked for in
.triton beside the Makefile. It is the one in the wheel of nvidia-pytriton (version 2.51), with the
stub of its Python beside its Python backend (`make triton`).
"""

import json
import os
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bytemodel
import ringkit
import servers
from filigrane import Key, detect, from_tag
from filigrane.adapters.models import LoadedModel, load
from filigrane.adapters.tritonserver.answering import Answering
from filigrane.adapters.tritonserver.repository import Deployment, config, write_repository
from filigrane.adapters.tritonserver.tensors import INPUTS, OUTPUTS
from filigrane.adapters.writing import Batch, Text, finish
from filigrane.errors import FiligraneError, RequestRefused, TokenError
from filigrane.serving import Keyring
from filigrane.serving.drawing import Drawer

MOST = -13.8  # log(1e-6)


def find_program() -> Path | None:
    if named := os.environ.get("FILIGRANE_TRITON"):
        return Path(named)
    root = Path(__file__).parents[2] / ".triton"
    return next(root.glob("lib/python*/site-packages/pytriton/tritonserver/bin/tritonserver"), None)


PROGRAM = find_program()
needs_triton = pytest.mark.skipif(
    PROGRAM is None or not PROGRAM.exists(),
    reason="no Triton: `make triton`, or name its tritonserver in FILIGRANE_TRITON",
)


# ---------------------------------------------------------------- without Triton


def test_the_repository(tmp_path: Path) -> None:
    home = write_repository(
        tmp_path / "new", Deployment(name="m", model='a "b"\\c', keyring="/k", rows=4, delay_us=7)
    )
    text = (home / "config.pbtxt").read_text()
    assert 'name: "m"' in text and "max_batch_size: 4" in text and "KIND_CPU" in text
    assert 'string_value: "a \\"b\\"\\\\c"' in text and "microseconds: 7" in text
    for name in (*INPUTS, *OUTPUTS):
        assert f'name: "{name}"' in text
    compile((home / "1" / "model.py").read_text(), "model.py", "exec")
    assert "KIND_GPU" in config(Deployment(model="x", gpu=True))
    assert '"keyring"' not in config(Deployment(model="x"))
    with pytest.raises(FiligraneError, match="exists"):
        write_repository(tmp_path / "new", Deployment(name="m", model="x"))
    for name in ("", "a/b", "../x"):
        with pytest.raises(FiligraneError, match="no name"):
            write_repository(tmp_path, Deployment(name=name, model="x"))
    with pytest.raises(FiligraneError, match="cannot be written"):
        config(Deployment(model="a\nb"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from filigrane.cli.engine_triton import triton_repository

    triton_repository(str(tmp_path), model="smollm2", json=True)
    said = json.loads(capsys.readouterr().out)
    assert Path(said["folder"], "config.pbtxt").exists() and said["name"] == "filigrane"
    triton_repository(str(tmp_path), model="smollm2", name="other")
    assert "other" in capsys.readouterr().out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(bytemodel.write(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def keys_and_answering(
    tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Key], Answering]:
    folder = tmp_path_factory.mktemp("ring")
    keys = ringkit.write(folder, tokens=False)
    return keys, Answering.of(tiny, Keyring.load(folder), answer=300)


def tensors(**values: list[object]) -> dict[str, Any]:
    """Inputs as Triton hands them over: (rows, 1), strings as bytes."""
    kinds: dict[str, Any] = {"STRING": np.object_, "BOOL": bool, "FP32": np.float32}
    return {
        name: np.array(
            [[v.encode() if isinstance(v, str) else v] for v in rows],
            kinds.get(INPUTS[name], np.int64),
        )
        for name, rows in values.items()
    }


def test_rows_of_a_request(keys_and_answering: tuple[dict[str, Key], Answering]) -> None:
    """Each row with its own tenant, scheme, length and temperature, written together."""
    keys, answering = keys_and_answering
    texts = answering.read(
        tensors(
            text_input=["one", "two two", "three", "four"],
            max_tokens=[100, 120, 90, 30],
            temperature=[1.0, 0.8, 0.0, 0.0],
            filigrane_tenant=["acme", "zeta", "acme", "acme"],
            filigrane_scheme=["gumbel", "gumbel", "greenlist", "greenlist"],
            filigrane_mark=[True, True, True, False],
            ignore_eos=[True] * 4,
        )
    )
    finish(Batch(answering.lm, texts, Drawer(answering.lm.vocab_size)))
    found = answering.outputs(texts)
    assert set(found) == set(OUTPUTS) and all(found[name].shape[0] == 4 for name in found)
    assert found["output_ids"].shape == (4, 120)
    assert (found["output_ids"] >= 0).sum(axis=1).tolist() == [100, 120, 90, 30]
    assert found["key_id"][:, 0].tolist() == [b"acme", b"zeta", b"acme", b""]
    assert found["scheme"][3, 0] == b"" and found["marked_tokens"][3, 0] == 0
    for row, (tenant, tag) in enumerate([("acme", "gumbel"), ("zeta", "gumbel")]):
        ids = found["output_ids"][row]
        for name, key in keys.items():
            p = detect(ids[ids >= 0], key, from_tag(tag)).log_pvalue
            assert (p < MOST) == (name == tenant)
    assert texts[0].order.mark.outcome == ("marked", "gumbel")
    assert texts[3].order.mark.outcome[0] == "unmarked"


def test_a_batch_is_its_rows_alone(keys_and_answering: tuple[dict[str, Key], Answering]) -> None:
    _, answering = keys_and_answering
    values: dict[str, list[Any]] = {
        "text_input": ["aaaa", "b", "cc"],
        "seed": [1, 2, 3],
        "max_tokens": [40, 10, 25],
        "filigrane_tenant": ["acme"] * 3,
    }
    drawer = Drawer(answering.lm.vocab_size)
    together = answering.read(tensors(**values))
    finish(Batch(answering.lm, together, drawer))
    for row in range(3):
        one = {name: [rows[row]] for name, rows in values.items()}
        (order,) = [text.order for text in answering.read(tensors(**one))]
        # Answers of one request differ by their number even under equal seeds.
        from dataclasses import replace

        alone = Text(replace(order, number=row))
        finish(Batch(answering.lm, [alone], drawer))
        assert alone.tokens == together[row].tokens and alone.ended == together[row].ended


@pytest.mark.parametrize(
    ("inputs", "what"),
    [
        ({"max_tokens": [5]}, "one of text_input and input_ids"),
        ({"text_input": ["x"], "input_ids": [1]}, "one of text_input and input_ids"),
        ({"text_input": [""]}, "no token"),
        ({"input_ids": [999]}, r"lie in \[0, 256\]"),
        ({"input_ids": [-1]}, r"lie in \[0, 256\]"),
        ({"text_input": ["x"], "max_tokens": [0]}, "from 1 to 300"),
        ({"text_input": ["x"], "max_tokens": [301]}, "from 1 to 300"),
        ({"text_input": ["x" * 300], "max_tokens": [300]}, "context length"),
        ({"input_ids": [1], "chat": [True]}, "chat goes with text_input"),
        ({"text_input": ["x", "y"], "max_tokens": [9]}, "one row for each"),
        ({"text_input": [b"\xff"]}, "UTF-8"),
    ],
)
def test_inputs_that_make_no_sense(
    keys_and_answering: tuple[dict[str, Key], Answering], inputs: dict[str, Any], what: str
) -> None:
    _, answering = keys_and_answering
    with pytest.raises(TokenError, match=what):
        answering.read(tensors(**inputs, filigrane_tenant=["acme"]))


def test_marks_that_are_refused(keys_and_answering: tuple[dict[str, Key], Answering]) -> None:
    _, answering = keys_and_answering
    for more, why in (
        ({"temperature": [0.0]}, "greedy"),
        ({"filigrane_key": ["zeta"]}, "unknown_key"),
        ({"filigrane_key": ["nobody"]}, "unknown_key"),
        ({"max_tokens": [4]}, "too_short"),
        ({"filigrane_scheme": ["delta"]}, "scheme"),
    ):
        with pytest.raises(RequestRefused) as caught:
            answering.read(tensors(text_input=["x"], filigrane_tenant=["acme"], **more))
        assert caught.value.reason == why


# ---------------------------------------------------------------- the real server


class Triton:
    """A running server and the keys of its models."""

    def __init__(self, port: int, metrics: int, log: Path, keys: dict[str, Key]) -> None:
        self.url, self.log, self.keys = f"http://127.0.0.1:{port}/v2", log, keys
        self.metrics_url = f"http://127.0.0.1:{metrics}/metrics"

    def ask(
        self, path: str, body: object = None, tenant: str | None = None
    ) -> tuple[int, dict[str, Any]]:
        headers = {"Authorization": f"Bearer {ringkit.TOKENS[tenant]}"} if tenant else {}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=300) as answer:
                content = answer.read()
                return answer.status, json.loads(content) if content else {}
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read() or b"{}")

    def serves(self, model: str) -> bool:
        try:
            return self.ask(f"models/{model}/ready")[0] == 200
        except OSError:
            return False

    def infer(self, model: str, tenant: str | None, **inputs: object) -> tuple[int, dict[str, Any]]:
        """One request of one row; outputs by name."""
        listed = [
            {
                "name": name,
                "datatype": {"STRING": "BYTES"}.get(INPUTS[name], INPUTS[name]),
                "shape": [1, len(value) if isinstance(value, list) else 1],
                "data": value if isinstance(value, list) else [value],
            }
            for name, value in inputs.items()
        ]
        status, answer = self.ask(f"models/{model}/infer", {"inputs": listed}, tenant)
        outputs = {o["name"]: o["data"] for o in answer.get("outputs", [])}
        return status, outputs or answer


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    assert PROGRAM is not None
    folder = tmp_path_factory.mktemp("triton")
    keys = ringkit.write(folder / "ring")
    ringkit.write(folder / "broken")
    (folder / "broken" / "acme.key").unlink()
    for name, model, ring in (
        ("smollm2", "smollm2", folder / "ring"),
        ("broken", "smollm2", folder / "broken"),
    ):
        made = Deployment(name=name, model=model, keyring=str(ring), rows=8)
        write_repository(folder / "models", made)
    home = PROGRAM.parents[1]
    environment = PROGRAM.parents[6]
    python = environment / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_config_var('LIBDIR'))"
    library = subprocess.run([python, "-c", query], capture_output=True, text=True, check=True)
    port, metrics = servers.free_port(), servers.free_port()
    while metrics == port:
        metrics = servers.free_port()
    command = [
        str(PROGRAM),
        f"--model-repository={folder / 'models'}",
        f"--backend-directory={home / 'backends'}",
        "--http-address=127.0.0.1",
        f"--http-port={port}",
        f"--metrics-port={metrics}",
        "--allow-grpc=false",
        "--allow-gpu-metrics=false",
        "--exit-on-error=false",
        "--http-header-forward-pattern=(?i)authorization",
    ]
    env = {
        **os.environ,
        # The stub finds its environment as the python3 that comes first, and its library here.
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "LD_LIBRARY_PATH": library.stdout.strip(),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    log = folder / "log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True
        )
        made_ = Triton(port, metrics, log, keys)
        try:
            deadline = time.monotonic() + 240
            while not made_.serves("smollm2"):
                said = log.read_text(errors="replace")[-3000:]
                assert process.poll() is None and time.monotonic() < deadline, said
                time.sleep(0.5)
            yield made_
        finally:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)


@needs_triton
@pytest.mark.triton
def test_two_tenants_at_once(triton: Triton) -> None:
    def one(number: int) -> tuple[str, str, dict[str, Any]]:
        tenant = ringkit.TENANTS[number % 2]
        scheme = ("gumbel", "greenlist:delta=4")[0]
        inputs: dict[str, object] = {"text_input": f"A story about {number} ships. " * (number + 1)}
        if number >= 4:  # another set of inputs: Triton itself would not batch the two
            inputs = {"input_ids": list(range(500, 510 + number)), "top_p": 0.95}
        status, found = triton.infer(
            "smollm2", tenant, max_tokens=80, ignore_eos=True, filigrane_scheme=scheme, **inputs
        )
        assert status == 200, found
        return tenant, scheme, found

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(one, range(6)))
    tokenizer = load("smollm2").tokenizer
    for tenant, scheme, found in answers:
        ids = found["output_ids"]
        assert len(ids) == 80 and found["key_id"] == [tenant]
        assert found["text_output"] == [tokenizer.decode(ids, skip_special_tokens=True)]
        assert found["scheme"] == [from_tag(scheme).tag] and found["finish_reason"] == ["length"]
        assert 0 < found["marked_tokens"][0] <= 76
        for name, key in triton.keys.items():
            p = detect(ids, key, from_tag(scheme)).log_pvalue
            assert (p < MOST) == (name == tenant)


@needs_triton
@pytest.mark.triton
def test_refusals_have_a_reason(triton: Triton) -> None:
    for tenant, more, why in (
        ("acme", {"temperature": 0.0}, "greedy"),
        ("acme", {"filigrane_key": "nobody"}, "unknown_key"),
        ("acme", {"filigrane_key": "zeta"}, "unknown_key"),
        ("acme", {"filigrane_tenant": "zeta"}, "unknown_tenant"),
        ("acme", {"max_tokens": 4}, "too_short"),
        ("acme", {"max_tokens": 0}, "malformed"),
        (None, {}, "unknown_tenant"),
    ):
        status, answer = triton.infer("smollm2", tenant, text_input="The sea", **more)
        assert status == 400 and f"(reason: {why})" in answer["error"], answer
    with urllib.request.urlopen(triton.metrics_url, timeout=30) as answer:
        counts = answer.read().decode()
    line = 'filigrane_requests_total{model="smollm2",outcome="refused",reason="unknown_key"} 2'
    assert line in counts


@needs_triton
@pytest.mark.triton
def test_the_generate_endpoint(triton: Triton) -> None:
    """Headers do not reach the model there; a token can be a parameter."""
    body = {"text_input": "Say hello.", "chat": True, "max_tokens": 12, "seed": 5}
    token = f"Bearer {ringkit.TOKENS['acme']}"
    status, answer = triton.ask(
        "models/smollm2/generate", {**body, "parameters": {"authorization": token}}
    )
    assert status == 200 and answer["key_id"] == "acme" and answer["text_output"]
    again = triton.ask("models/smollm2/generate", {**body, "authorization": token})[1]
    assert again["output_ids"] == answer["output_ids"]


@needs_triton
@pytest.mark.triton
def test_a_model_without_its_keys_is_not_served(triton: Triton) -> None:
    assert not triton.serves("broken")
    assert "[keys.acme]" in triton.log.read_text(errors="replace")


@needs_triton
@pytest.mark.triton
def test_nothing_secret_is_logged(triton: Triton) -> None:
    triton.infer("smollm2", "acme", text_input="canary-in-a-prompt", max_tokens=6)
    said = triton.log.read_text(errors="replace")
    assert "known answers found" in said
    for key in triton.keys.values():
        assert not any(secret in said for secret in ringkit.secrets_of(key))
    assert not any(text in said for text in ("canary-in-a-prompt", *ringkit.TOKENS.values()))
