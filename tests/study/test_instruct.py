import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import filigrane as fg
from filigrane.adapters.models import LoadedModel, chat_prompt, fingerprint
from filigrane.errors import EvidenceError, RecordError, UnsupportedDecoding
from filigrane.study.instruct import LANGUAGES, Checks, Prompt, generate, prompts
from filigrane.study.mixing import examples, read_pairs
from keymaker import keys_from_seed

(KEY,) = keys_from_seed(5, 1)
SCHEME = fg.GreenList(delta=5.0, context_width=1)
ENDS = [0, *range(300, 315)]
LOOSE = Checks(min_tokens=1, min_distinct=0.0, refusals=True)


@pytest.mark.parametrize("language", LANGUAGES)
def test_instructions_are_many_and_distinct(language: str) -> None:
    count = 60_000 if language == "en" else 1_200
    found = prompts(count, language=language)
    assert len({prompt.text for prompt in found}) == len({prompt.id for prompt in found}) == count
    assert all("{" not in prompt.text and prompt.language == language for prompt in found)
    if language == "en":
        assert len({prompt.text.split(" ", 2)[0] for prompt in found[:100]}) > 10


def test_instructions_come_in_the_same_order_and_ranges_do_not_meet() -> None:
    assert prompts(50) == prompts(50) != prompts(50, seed=1)
    assert prompts(100)[30:80] == prompts(50, start=30)
    ids = {prompt.text: prompt.id for prompt in prompts(4920)}
    again = {prompt.text: prompt.id for prompt in prompts(4920, seed=1)}
    assert ids == again  # the plain ones first, and an id for each text, whatever the seed
    # What they are has to stay: ids stand in files.
    assert prompts(3) == PINNED
    with pytest.raises(EvidenceError, match="in 'de'; asked for 0 to 99,999"):
        prompts(99_999, language="de")
    with pytest.raises(EvidenceError, match="use one of en, fr, de, es"):
        prompts(3, language="la")


PINNED = [
    Prompt("en-02836", "Write an interview with an expert on migration of birds.", "en"),
    Prompt("en-04750", "Write a riddle about roads and explain its solution.", "en"),
    Prompt("en-02125", "Tell a memory of childhood that has to do with an empty house.", "en"),
]


def test_what_is_dropped() -> None:
    checks = Checks()
    good = list(range(40))
    assert checks.reason(good, "A long answer.") is None
    assert checks.reason(good[:15], "Short.") == "too short"
    assert checks.reason(good, " \n") == "too short"
    assert checks.reason([1, 2, 3, 4, 5] * 10, "again") == "repetitive"
    for refusal in (
        "I'm sorry, but",
        "I cannot do that",
        "As an AI language model",
        "  I am sorry",
    ):
        assert checks.reason(good, refusal) == "refusal"
        assert Checks(refusals=True).reason(good, refusal) is None
    assert checks.reason(good, "I can write that. I'm sorrowful.") is None


# ---------------------------------------------------------------- with a model


@pytest.fixture(scope="module")
def alice() -> LoadedModel:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<end>", "<user>", "<assistant>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator([prompt.text for prompt in prompts(200)], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    )
    size = len(tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                num_attention_heads=2, max_position_embeddings=512, initializer_range=0.3,
                bos_token_id=None, eos_token_id=0, pad_token_id=None,
            )
        ).eval()  # fmt: skip
    model.generation_config.eos_token_id = ENDS  # so that a tiny model ends some of its texts
    return LoadedModel("alice", size, size, fingerprint(tokenizer), model, tokenizer)


def write(alice: LoadedModel, out: Path, count: int = 10, **options: Any) -> Any:
    given = {"max_new_tokens": 24, "batch_size": 4, "checks": LOOSE, **options}
    return generate(alice, prompts(count), given.pop("key", KEY), SCHEME, out, **given)


@pytest.mark.slow
def test_pairs_are_written_and_marked(alice: LoadedModel, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    done = write(alice, out)
    pairs = read_pairs(out)
    assert done.kept == done.marked == len(pairs) == 10 and not done.dropped
    assert done.tokens == sum(len(pair["tokens"]) for pair in pairs)
    for pair, prompt in zip(pairs, prompts(10), strict=True):
        assert (pair["id"], pair["prompt"]) == (prompt.id, prompt.text)
        assert pair["prompt_tokens"] == chat_prompt(alice, prompt.text).tolist()
        expected = alice.tokenizer.decode(pair["tokens"], skip_special_tokens=True)
        assert pair["text"] == expected and pair["marked"] is True
        assert pair["scheme"] == SCHEME.tag and pair["key"] == KEY.name
        assert pair["key_fingerprint"] == KEY.fingerprint
        assert pair["vocab_size"] == alice.vocab_size
        assert pair["tokenizer_sha256"] == alice.tokenizer_sha256
        assert (pair["finish_reason"] == "stop") == (pair["tokens"][-1] in ENDS)
    corpus = fg.Corpus(pair["tokens"] for pair in pairs)
    assert fg.detect(corpus, KEY, SCHEME).log10_pvalue < -5
    tokens, start = examples(pairs, alice)[0]
    assert tokens[start:].tolist() == pairs[0]["tokens"]
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.slow
def test_a_share_is_marked_and_the_others_are_not(alice: LoadedModel, tmp_path: Path) -> None:
    write(alice, tmp_path / "half.jsonl", 40, share=0.5, batch_size=20)
    pairs = read_pairs(tmp_path / "half.jsonl")
    kinds = {flag: [p for p in pairs if p["marked"] is flag] for flag in (True, False)}
    assert 10 < len(kinds[True]) < 30
    for flag, some in kinds.items():
        corpus = fg.Corpus(pair["tokens"] for pair in some)
        p = fg.detect(corpus, KEY, SCHEME).log10_pvalue
        assert p < -5 if flag else p > -4
    for pair in kinds[False]:
        assert pair["n_marked"] == 0
        assert pair["scheme"] is pair["key"] is pair["key_fingerprint"] is None
    write(alice, tmp_path / "most.jsonl", 40, share=0.8, batch_size=20)
    most = {pair["id"] for pair in read_pairs(tmp_path / "most.jsonl") if pair["marked"]}
    assert {pair["id"] for pair in kinds[True]} < most
    done = write(alice, tmp_path / "none.jsonl", 4, key=None)
    assert done.kept == 4 and done.marked == 0


class Killed(Exception):
    pass


@pytest.mark.slow
@pytest.mark.parametrize("tear", [0, 40])
def test_a_killed_run_goes_on(alice: LoadedModel, tmp_path: Path, tear: int) -> None:
    strict = Checks(min_tokens=24, min_distinct=0.0, refusals=True)  # some end early
    whole = write(alice, tmp_path / "whole.jsonl", 12, share=0.5, checks=strict)
    assert whole.dropped == {"too short": 12 - whole.kept} and 0 < whole.kept < 12

    def kill(done: int, total: int | None, what: str) -> None:
        if done == 8:
            raise Killed

    out = tmp_path / "cut.jsonl"
    with pytest.raises(Killed):
        write(alice, out, 12, share=0.5, checks=strict, report=kill)
    data = out.read_bytes()
    out.write_bytes(data[: len(data) - tear])
    held = len(out.read_bytes())
    assert write(alice, out, 12, share=0.5, checks=strict) == whole
    for name in ("{}.jsonl", "{}.rejected.jsonl"):
        one, two = ((tmp_path / name.format(n)).read_bytes() for n in ("whole", "cut"))
        assert one == two
    assert held < len(out.read_bytes())
    lines = (tmp_path / "cut.rejected.jsonl").read_bytes().splitlines()
    dropped = [json.loads(line) for line in lines]
    assert {record["rejected"] for record in dropped} == {"too short"}


@pytest.mark.slow
def test_files_with_other_pairs_are_refused(alice: LoadedModel, tmp_path: Path) -> None:
    out = tmp_path / "pairs.jsonl"
    write(alice, out, 4)
    before = out.read_bytes()
    (other,) = keys_from_seed(6, 1)
    for options, what in (
        ({"key": other}, "key_fingerprint"),
        ({"max_new_tokens": 9}, "sampling"),
    ):
        with pytest.raises(RecordError, match=f"made with {what}"):
            write(alice, out, 8, **options)
    out.write_bytes(b'{"id": 3}\n')
    with pytest.raises(RecordError, match="something else"):
        write(alice, out, 8)
    assert out.read_bytes() == b'{"id": 3}\n' and before
    with pytest.raises(UnsupportedDecoding):
        generate(alice, prompts(2), KEY, fg.Gumbel(), tmp_path / "greedy.jsonl",
                 sampling=fg.Sampling(temperature=0.0))  # fmt: skip
    with pytest.raises(RecordError, match="same id"):
        generate(alice, prompts(1) * 2, KEY, SCHEME, tmp_path / "twice.jsonl")
    with pytest.raises(ValueError, match="share is from 0 to 1"):
        write(alice, out, share=2.0)
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl"}


@pytest.mark.slow
@pytest.mark.model
def test_a_real_model_answers(smollm2: LoadedModel, tmp_path: Path) -> None:
    done = generate(
        smollm2, prompts(3), KEY, SCHEME, tmp_path / "pairs.jsonl", max_new_tokens=40, batch_size=3
    )
    pairs = read_pairs(tmp_path / "pairs.jsonl")
    assert len(pairs) == done.kept >= 2
    assert np.mean([len(pair["text"].split()) for pair in pairs]) > 12
    corpus = fg.Corpus(pair["tokens"] for pair in pairs)
    assert fg.detect(corpus, KEY, SCHEME).log10_pvalue < -5
