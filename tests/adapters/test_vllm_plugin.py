"""The plugin in real servers of vLLM: whose mark, under load, preempted, refused, interrupted."""

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from openai import APIStatusError, BadRequestError, OpenAI, OpenAIError

import vllmkit
from filigrane import foreign
from filigrane.adapters.vllm.native import write_config
from filigrane.detection import detect
from filigrane.foreign.vllm import VllmDualGumbel, VllmGumbel
from filigrane.keys import Key
from filigrane.schemes import from_tag

pytestmark = vllmkit.marks

TENANTS = ("anna", "berta", "carla", "dora")
SCHEMES = ("gumbel", "greenlist:delta=6", "tournament", "delta", "gamma")
HEAD = f'policy = "default"\nschemes = {json.dumps(SCHEMES)}\n'
TENANTS_MIDDLEWARE = ["--middleware", "filigrane.adapters.vllm.tenants.Tenants"]
PROMPT = "The history of the town of {} begins in the year"


@pytest.fixture(scope="module")
def model() -> str:
    from filigrane.adapters.models import load

    return str(load("smollm2").model.name_or_path)


class Running:
    """A server with its keys and its log."""

    def __init__(self, url: str, keys: Mapping[str, Key], log: Path) -> None:
        self.url, self.keys, self.log = url, keys, log

    def client(self, tenant: str) -> OpenAI:
        return OpenAI(
            base_url=self.url, api_key=vllmkit.token(tenant or "anyone"), max_retries=0, timeout=400
        )

    def write(self, tenant: str, number: int = 0, tokens: int = 80, **arguments: Any) -> Any:
        """The answer to one request; arguments: filigrane's, and vLLM's sampling parameters."""
        own = {n: v for n, v in arguments.items() if n.startswith("filigrane_")}
        others = {n: v for n, v in arguments.items() if not n.startswith("filigrane_")}
        body = {"vllm_xargs": own, "return_token_ids": True, "ignore_eos": True} | others
        with self.client(tenant) as client:
            return client.completions.create(
                model="smollm2",
                prompt=body.pop("prompt", PROMPT.format(number)),
                max_tokens=tokens,
                temperature=body.pop("temperature", 1.0),
                extra_body=body,
            )

    def metric(self, name: str) -> dict[str, float]:
        with urllib.request.urlopen(self.url.replace("/v1", "/metrics")) as answer:
            text = answer.read().decode()
        return {
            labels: float(value)
            for labels, value in re.findall(rf"^{name}({{.*?}})? ([0-9.e+]+)$", text, re.M)
        }


def ids(answer: Any, choice: int = 0) -> list[int]:
    found: list[int] = answer.choices[choice].token_ids
    return found


def log10_p(tokens: list[int], key: Any, scheme: str) -> float:
    return detect(tokens, key, from_tag(scheme)).log10_pvalue


@pytest.fixture(scope="module")
def shared(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("vllm")
    keys = vllmkit.keyring(folder, HEAD, TENANTS)
    log = folder / "log"
    options = ["--max-model-len", "512", "--max-num-seqs", "16", *TENANTS_MIDDLEWARE]
    env = {"FILIGRANE_KEYRING": str(folder)}
    with vllmkit.serve(model, log, options, env) as url:
        yield Running(url, keys, log)
    # Whatever was asked of it: no key in anything that it or its engines have said.
    said = log.read_text(errors="replace")
    for secret in vllmkit.secrets_of(keys):
        assert secret not in said
    for tenant in TENANTS:
        assert vllmkit.token(tenant) not in said


def test_sixteen_requests_of_four_tenants(shared: Running) -> None:
    """All at once, with four schemes: each found with its own key and no other."""
    jobs = [(TENANTS[i % 4], SCHEMES[i // 4], i) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(
            pool.map(
                lambda job: shared.write(job[0], job[2], 100, filigrane_scheme=job[1], top_p=0.98),
                jobs,
            )
        )
    for (tenant, scheme, _), answer in zip(jobs, answers, strict=True):
        assert len(ids(answer)) == 100
        own = log10_p(ids(answer), shared.keys[tenant], scheme)
        others = [log10_p(ids(answer), shared.keys[t], scheme) for t in TENANTS if t != tenant]
        limit = -2 if scheme == "delta" else -6
        assert own < limit and min(others) > -6, (tenant, scheme, own, others)
    counted = shared.metric("filigrane_requests_total")
    assert counted['{outcome="marked",reason="gumbel"}'] >= 4
    assert counted['{outcome="marked",reason="greenlist"}'] >= 4
    tokens = shared.metric("filigrane_tokens_total")
    assert tokens['{state="marked"}'] > 1400 > tokens['{state="unmarked"}'] > 60


def test_several_answers_and_users_and_cached_prefixes(shared: Running) -> None:
    """n > 1: texts of one request differ and are all marked; the prompt comes from the cache."""
    one = shared.write("anna", tokens=100, n=3, filigrane_key="key-anna/17")
    again = shared.write("anna", tokens=100, n=1, filigrane_key="key-anna/17")
    texts = [ids(one, choice) for choice in range(3)] + [ids(again)]
    assert len({tuple(text) for text in texts}) == 4
    for text in texts:
        assert log10_p(text, shared.keys["anna"].user(17), "gumbel") < -6
        assert log10_p(text, shared.keys["anna"].user(18), "gumbel") > -6
        assert log10_p(text, shared.keys["anna"], "gumbel") > -6
    assert shared.metric("vllm:prefix_cache_hits_total")


def test_seeds_repeat_texts(shared: Running) -> None:
    for scheme in ("gumbel", "tournament"):
        first, second, other = (
            ids(shared.write("berta", 5, seed=seed, filigrane_scheme=scheme)) for seed in (7, 7, 8)
        )
        assert first == second != other
        assert log10_p(first, shared.keys["berta"], scheme) < -6


def test_chats_and_streams(shared: Running) -> None:
    tokens: list[int] = []
    with shared.client("carla") as client:
        parts = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "Write about winter in the mountains."}],
            max_tokens=90,
            stream=True,
            extra_body={"return_token_ids": True, "ignore_eos": True},
        )
        for part in parts:
            tokens += getattr(part.choices[0], "token_ids", None) or [] if part.choices else []
    assert len(tokens) == 90 and log10_p(tokens, shared.keys["carla"], "gumbel") < -6


def test_answers_say_what_marks_them(shared: Running) -> None:
    opted = {"vllm_xargs": {"filigrane_mark": "false"}}
    with shared.client("dora") as client:
        create = client.completions.with_raw_response.create
        one = create(model="smollm2", prompt="x", max_tokens=8)
        other = create(model="smollm2", prompt="x", max_tokens=8, extra_body=opted)
    assert one.headers["filigrane-key"] == "key-dora"
    assert one.headers["filigrane-scheme"] == "gumbel:context_width=4"
    assert "filigrane-key" not in other.headers


def test_opting_out_leaves_no_mark(shared: Running) -> None:
    text = ids(shared.write("anna", tokens=150, filigrane_mark="false"))
    assert log10_p(text, shared.keys["anna"], "gumbel") > -6


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"filigrane_key": "key-nobody"}, "no key 'key-nobody' here"),
    "another tenant's": ({"filigrane_key": "key-berta"}, "no key 'key-berta' here"),
    "another's user": ({"filigrane_key": "key-berta/3"}, "no key 'key-berta' here"),
    "retired": ({"filigrane_key": "key-retired"}, "is retired"),
    "a user that is none": ({"filigrane_key": "key-anna/x"}, "user's number"),
    "misspelt": ({"filigrane_kee": "key-anna"}, "unknown argument 'filigrane_kee'"),
    "not a text": ({"filigrane_key": 3}, "is a text"),
    "a list": ({"filigrane_key": ["key-anna"]}, "is a text"),
    "scheme that is none": ({"filigrane_scheme": "gumbell"}, "Did you mean 'gumbel'"),
    "scheme not allowed": ({"filigrane_scheme": "gumbel:context_width=9"}, "is used with"),
    "tenant by hand": ({"filigrane_tenant": "berta"}, "follows from the bearer token"),
    "perhaps": ({"filigrane_mark": "perhaps"}, "true or false"),
    "greedy": ({"temperature": 0.0}, "cannot mark greedy"),
    "one candidate": ({"top_k": 1}, "cannot mark greedy"),
    "beams": ({"use_beam_search": True, "n": 2, "temperature": 0.0}, "beam search"),
    "too short": ({"tokens": 4}, "the first 4 tokens"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(shared: Running, case: str) -> None:
    arguments, said = REFUSALS[case]
    with pytest.raises(BadRequestError) as caught:
        shared.write("anna", **arguments)
    assert caught.value.status_code == 400 and said in str(caught.value)
    if case != "one candidate":
        assert "key-berta" not in said or "berta's" not in str(caught.value)


def test_refusals_are_counted_and_change_nobody_else(shared: Running) -> None:
    """Good requests beside a stream of bad ones."""
    before = sum(v for k, v in shared.metric("filigrane_requests_total").items() if "refused" in k)

    def bad(_: int) -> int:
        try:
            shared.write("berta", filigrane_key="key-anna")
        except APIStatusError as error:
            return error.status_code
        return 200

    with ThreadPoolExecutor(8) as pool:
        codes = pool.map(bad, range(24))
        good = list(pool.map(lambda i: shared.write("anna", i), range(4)))
        assert set(codes) == {400}
    for answer in good:
        assert log10_p(ids(answer), shared.keys["anna"], "gumbel") < -6
    after = sum(v for k, v in shared.metric("filigrane_requests_total").items() if "refused" in k)
    assert after == before + 24


def test_without_a_token(shared: Running) -> None:
    for name in ("nobody", "-"):
        with OpenAI(base_url=shared.url, api_key=name, max_retries=0) as client:
            with pytest.raises(APIStatusError) as caught:
                client.completions.create(model="smollm2", prompt="x", max_tokens=8)
            assert caught.value.status_code == 401
            with pytest.raises(APIStatusError):
                client.models.list()


def test_malformed_bodies(shared: Running) -> None:
    import httpx2

    bodies = [b"", b"[", b"[]", b"null", b'{"vllm_xargs": 3}', b"\xff\xfe", b'{"model": 3}']
    bodies += [b"[" * 100_000, b'{"vllm_xargs": {"filigrane_key": {"a": 1}}}']
    headers = {"Authorization": f"Bearer {vllmkit.token('anna')}"}
    for body in bodies:
        answer = httpx2.post(
            f"{shared.url}/completions",
            content=body,
            headers=headers | {"Content-Type": "application/json"},
            timeout=60,
        )
        assert 400 <= answer.status_code < 500, (body[:40], answer.status_code, answer.text[:200])


def test_a_rotation_without_a_restart(shared: Running) -> None:
    """Staged, promoted in the middle of a text, expired: the server goes on with what counts."""
    path = shared.log.parent / "keyring.toml"
    before = path.read_text()
    new = Key.generate("dora-2", slots=4)
    new.save(path.with_name("dora-2.key"))

    def write(text: str) -> None:
        path.with_name("next").write_text(text)
        path.with_name("next").replace(path)
        time.sleep(2.5)

    staged = before + '\n[keys.dora-2]\ntenant = "dora"\nstate = "staged"\n'
    try:
        write(staged)
        with pytest.raises(BadRequestError, match="is staged"):
            shared.write("dora", filigrane_key="dora-2")
        assert log10_p(ids(shared.write("dora", 1)), shared.keys["dora"], "gumbel") < -6
        promoted = staged.replace('state = "staged"\n', "")
        promoted = promoted.replace('default = "key-dora"', 'default = "dora-2"')
        promoted = promoted.replace("[keys.key-dora]", '[keys.key-dora]\nstate = "retired"')
        tokens: list[int] = []
        with shared.client("dora") as client:
            parts = client.completions.create(
                model="smollm2",
                prompt=PROMPT.format("x"),
                max_tokens=300,
                temperature=1.0,
                stream=True,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
            for part in parts:
                if not tokens:
                    path.with_name("next").write_text(promoted)
                    path.with_name("next").replace(path)
                tokens += getattr(part.choices[0], "token_ids", None) or []
        # To its last token with the key that it began with.
        assert len(tokens) == 300
        assert log10_p(tokens[150:], shared.keys["dora"], "gumbel") < -6
        assert log10_p(tokens, new, "gumbel") > -6
        time.sleep(2.5)
        with shared.client("dora") as client:
            answer = client.completions.with_raw_response.create(
                model="smollm2",
                prompt=PROMPT.format("y"),
                max_tokens=100,
                temperature=1.0,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
        assert answer.headers["filigrane-key"] == "dora-2"
        found = ids(answer.parse())
        assert log10_p(found, new, "gumbel") < -6
        assert log10_p(found, shared.keys["dora"], "gumbel") > -6
        with pytest.raises(BadRequestError, match="is retired"):
            shared.write("dora", filigrane_key="key-dora")
        write(promoted.replace("[keys.dora-2]", "[keys.dora-2]\nexpires = 2026-01-01T00:00:00Z"))
        with pytest.raises(BadRequestError, match="time for which this server has key dora-2"):
            shared.write("dora")
        assert log10_p(ids(shared.write("anna", 2)), shared.keys["anna"], "gumbel") < -6
        # Nonsense changes nothing.
        write("[keys.gone]\n")
        assert log10_p(ids(shared.write("anna", 3)), shared.keys["anna"], "gumbel") < -6
        assert new.export_text().rpartition(":")[2] not in shared.log.read_text(errors="replace")
    finally:
        write(before)
    assert log10_p(ids(shared.write("dora", 4)), shared.keys["dora"], "gumbel") < -6


def test_an_engine_that_dies_while_it_streams(model: str, tmp_path: Path) -> None:
    """What has arrived until then is marked; the next start goes on with new texts."""
    keys = vllmkit.keyring(tmp_path, HEAD, TENANTS[:1])
    options = ["--max-model-len", "512", "--max-num-seqs", "4", *TENANTS_MIDDLEWARE]
    env = {"FILIGRANE_KEYRING": str(tmp_path)}
    tokens: list[int] = []
    with vllmkit.serve(model, tmp_path / "log", options, env) as url:
        server = Running(url, keys, tmp_path / "log")
        with server.client("anna") as client, pytest.raises(OpenAIError):
            parts = client.completions.create(
                model="smollm2",
                prompt=PROMPT.format("x"),
                max_tokens=400,
                temperature=1.0,
                stream=True,
                extra_body={"return_token_ids": True, "ignore_eos": True},
            )
            for part in parts:
                tokens += getattr(part.choices[0], "token_ids", None) or []
                if len(tokens) > 80:
                    _kill_engines(server.log)
    assert 80 < len(tokens) < 400
    assert log10_p(tokens, keys["anna"], "gumbel") < -6
    with vllmkit.serve(model, tmp_path / "log", options, env) as url:
        server = Running(url, keys, tmp_path / "log")
        text = ids(server.write("anna", prompt=PROMPT.format("x")))
        assert log10_p(text, keys["anna"], "gumbel") < -6


def _kill_engines(log: Path) -> None:
    pids = set(re.findall(r"\((?:Worker|EngineCore)[^)]* pid=(\d+)\)", log.read_text("utf-8")))
    for pid in pids:
        try:
            os.kill(int(pid), signal.SIGKILL)
        except ProcessLookupError:
            continue


@pytest.fixture(scope="module")
def small(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Policy enforce, no tenants, processors named by option too, and too little memory."""
    folder = tmp_path_factory.mktemp("small")
    head = 'policy = "enforce"\ndefault = "key-anna"\n' + HEAD.partition("\n")[2]
    keys = vllmkit.keyring(folder, head, TENANTS[:2], tokens=False)
    module = "filigrane.adapters.vllm.processors"
    options = ["--max-model-len", "320", "--max-num-seqs", "12", "--block-size", "32"]
    options += ["--num-gpu-blocks-override", "18"]
    options += ["--logits-processors", f"{module}:GreenListProcessor"]
    options += [f"{module}:SamplingProcessor"]
    env = {"FILIGRANE_KEYRING": str(folder)}
    with vllmkit.serve(model, folder / "log", options, env) as url:
        yield Running(url, keys, folder / "log")


def test_texts_that_are_preempted(small: Running) -> None:
    """Thrown out and taken up again, in the middle of a text: its mark goes on."""
    jobs = [("gumbel", "tournament", "greenlist:delta=6")[i % 3] for i in range(12)]
    with ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(
                lambda job: small.write("", job[0], 120, filigrane_scheme=job[1]), enumerate(jobs)
            )
        )
    assert sum(small.metric("vllm:num_preemptions_total").values()) > 3
    for scheme, answer in zip(jobs, answers, strict=True):
        found = detect(ids(answer), small.keys["anna"], from_tag(scheme))
        assert found.log10_pvalue < -8, (scheme, found)
        # One slot from beginning to end: the others say nothing.
        others = sorted(found.slot_log_pvalues)[1:]
        assert min(others) > -14, (scheme, found.slot_log_pvalues)


def test_a_bias_is_added_once(small: Running) -> None:
    """Named by option and found by entry point, the processors mark once."""
    marked = small.metric("filigrane_tokens_total")['{state="marked"}']
    small.write("", 3, 60, filigrane_scheme="greenlist:delta=6")
    again = small.metric("filigrane_tokens_total")['{state="marked"}']
    assert 40 < again - marked <= 60


def test_enforcement(small: Running) -> None:
    with pytest.raises(BadRequestError, match="marks all text"):
        small.write("", filigrane_mark="false")
    with pytest.raises(BadRequestError, match="cannot mark greedy"):
        small.write("", temperature=0.0)
    # Beam search reaches the engine without its arguments, one token at a time.
    with pytest.raises(BadRequestError, match="beam search"):
        small.write("", use_beam_search=True, n=2, temperature=0.0)
    green = ids(small.write("", temperature=0.0, filigrane_scheme="greenlist:delta=6"))
    assert log10_p(green, small.keys["anna"], "greenlist:delta=6") < -6


def test_speculation_that_drops_processors_is_not_silent(model: str, tmp_path: Path) -> None:
    """The older interface loads no plugin then: requests for a mark are refused, others served."""
    keys = vllmkit.keyring(tmp_path, HEAD + 'default = "key-anna"\n', TENANTS[:1], tokens=False)
    speculation = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}
    options = ["--max-model-len", "256", "--max-num-seqs", "2"]
    options += ["--speculative-config", json.dumps(speculation)]
    env = {"FILIGRANE_KEYRING": str(tmp_path)}
    with vllmkit.serve(model, tmp_path / "log", options, env) as url:
        server = Running(url, keys, tmp_path / "log")
        with pytest.raises(BadRequestError, match="does not mark text"):
            server.write("")
        server.write("", tokens=8, temperature=0.0, filigrane_mark="false")
        assert server.metric("filigrane_requests_total")['{outcome="refused",reason="engine"}'] == 1


def test_a_broken_keyring_starts_nothing(model: str, tmp_path: Path) -> None:
    (tmp_path / "keyring.toml").write_text("[keys.gone]\n")
    with (
        pytest.raises(AssertionError, match="the server has ended"),
        vllmkit.serve(model, tmp_path / "log", [], {"FILIGRANE_KEYRING": str(tmp_path)}),
    ):
        pass
    assert "gone.key" in (tmp_path / "log").read_text()


# ---------------------------------------------------------------- model runner V2

SHORT = ("gumbel:context_width=2", "greenlist:context_width=2,delta=8", "gumbel:context_width=3")
ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "speculation": {
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 2,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        }
    },
    "preemption": {"num_gpu_blocks_override": 5, "block_size": 32},
}


def by_v2(
    model: str, arguments: list[dict[str, str]], engine: dict[str, Any], keyring: Path | None
) -> dict[str, Any]:
    """A few tokens on Triton's interpreter, a token or two a second, by vLLM's own code."""
    asked = {"model": model, "tokens": 24, "arguments": arguments, "engine": engine}
    env = os.environ | vllmkit.ENVIRONMENT
    if keyring is not None:
        env["FILIGRANE_KEYRING"] = str(keyring)
    done = subprocess.run(
        [str(vllmkit.PYTHON), str(Path(__file__).parents[1] / "vllm_v2.py")],
        input=json.dumps(asked),
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("how", ENGINES)
def test_the_other_interface(model: str, tmp_path: Path, how: str) -> None:
    head = f'default = "key-anna"\nschemes = {json.dumps(SHORT)}\n'
    keys = vllmkit.keyring(tmp_path, head, TENANTS[:1], tokens=False)
    arguments = [{"filigrane_scheme": scheme} for scheme in SHORT]
    found = by_v2(model, arguments, ENGINES[how], tmp_path)
    for scheme, tokens in zip(SHORT, found["texts"], strict=True):
        assert log10_p(tokens, keys["anna"], scheme) < -6
        assert log10_p(tokens, Key.generate("x", slots=4), scheme) > -6
    assert how != "speculation" or found["drafts"] > 0
    assert how != "preemption" or found["preemptions"] > 0


@pytest.mark.parametrize("tag", ["vllm-gumbel", "vllm-dual-gumbel:context_width=2,alpha=0.2"])
def test_vllms_own_watermark_with_our_key(model: str, tmp_path: Path, tag: str) -> None:
    """Its settings from our file, its sampler writes, our reader finds it with our key."""
    profile = foreign.from_tag(tag)
    assert isinstance(profile, VllmGumbel | VllmDualGumbel)
    user = Key.generate("acme").user(3)
    write_config(tmp_path / "watermark.yaml", user, profile)
    settings = json.loads((tmp_path / "watermark.yaml").read_text())["watermark-config"]
    found = by_v2(model, [{}, {}], {"watermark_config": settings}, None)
    for tokens in found["texts"]:
        written = foreign.Written(tokens=tokens)
        own = profile.read(written, foreign.ForeignKey.derive(user, profile))
        other = profile.read(written, foreign.ForeignKey.derive(user.root, profile))
        assert own.log10_pvalue < -4 and other.log10_pvalue > -4, (own, other)


def test_the_file_is_what_vllm_reads(model: str, tmp_path: Path) -> None:
    """Through --config, without the number on the command line or in what vLLM logs of it."""
    user = Key.generate("acme").user(3)
    profile = VllmGumbel(context_width=3)
    write_config(tmp_path / "watermark.yaml", user, profile)
    code = """
import sys
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.entrypoints.serve.utils.api_utils import log_non_default_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
given = ["--model", sys.argv[2], "--config", sys.argv[1]]
args = make_arg_parser(FlexibleArgumentParser()).parse_args(given)
log_non_default_args(args)
config = AsyncEngineArgs.from_cli_args(args).create_watermark_config()
print(config.key, config.algorithm, config.context_width, config.deduplicate_contexts)
print(repr(config))
"""
    done = subprocess.run(
        [str(vllmkit.PYTHON), "-c", code, str(tmp_path / "watermark.yaml"), model],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | vllmkit.ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    number = str(foreign.ForeignKey.derive(user, profile).reveal()[0])
    read, shown = done.stdout.splitlines()[-2:]
    assert read == f"{number} gumbel 3 single_turn"
    assert number not in shown + done.stderr + "".join(done.stdout.splitlines()[:-2])
