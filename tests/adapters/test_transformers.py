import copy
import dataclasses
import json
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import filigrane as fg
from filigrane.adapters.models import LoadedModel, chat_prompt
from filigrane.contexts import TokenIds, collect
from filigrane.errors import (
    LogitsError,
    ModelError,
    SecretLeakError,
    TokenError,
    UnsupportedDecoding,
    VocabularyMismatch,
)
from filigrane.schemes import Scheme
from keymaker import keys_from_seed

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from filigrane.adapters import transformers as adapter  # noqa: E402
from filigrane.adapters.torch import fresh  # noqa: E402
from filigrane.adapters.transformers import (  # noqa: E402
    DECODING_MODES,
    DECODING_SUPPORT,
    TransformersModel,
    continuations,
    decoding_table,
    generation_kwargs,
)

VOCABULARY, END, PAD = 300, 1, 2
MINE, YOURS = keys_from_seed(31, 2, slots=2)
# Low p-values at 50 tokens of a tiny model, and something to win for greedy text.
SCHEMES: dict[str, Scheme] = {name: scheme() for name, scheme in fg.SCHEMES.items()}
SCHEMES["greenlist"] = fg.GreenList(delta=4.0)


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices, and others may use the machine
    torch.manual_seed(7)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def llama() -> Any:
    return _llama(0)


def _llama(seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=512, initializer_range=0.3,
            bos_token_id=None, eos_token_id=None, pad_token_id=PAD,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def gpt2() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_positions=256, n_embd=32, n_layer=2, n_head=2,
            initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=PAD,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def t5() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = transformers.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=16, d_ff=48, num_layers=1, num_heads=2,
            initializer_factor=0.4, decoder_start_token_id=PAD, eos_token_id=None,
            pad_token_id=PAD, tie_word_embeddings=False,
        )  # fmt: skip
        return transformers.T5ForConditionalGeneration(config).eval()


def inputs(*prompts: list[int]) -> dict[str, Any]:
    width = max(map(len, prompts))
    ids = torch.tensor([[PAD] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


PROMPTS = [5, 6, 7], [9, 8, 7, 6, 5]


def generate(
    model: Any, scheme: Scheme, keys: Any = (MINE, YOURS), n: int = 50, *, seed: int = 0,
    prompts: Any = PROMPTS, extra: dict[str, Any] | None = None, **options: Any,
) -> list[TokenIds]:  # fmt: skip
    kwargs = generation_kwargs(scheme, keys, rng=np.random.default_rng(seed), **options)
    given = inputs(*prompts)
    out = model.generate(**given, **kwargs, **(extra or {}), max_new_tokens=n)
    return continuations(out, given["input_ids"].shape[1])


def assert_marked(texts: list[TokenIds], scheme: Scheme, keys: Any = (MINE, YOURS)) -> None:
    for text, right, wrong in zip(texts, keys, reversed(keys), strict=True):
        assert fg.detect(text, right, scheme).log10_pvalue < -5
        assert fg.detect(text, wrong, scheme).log10_pvalue > -4


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[int, ...], bool]:
    """What the processors decided about each prefix of an output, filled while they run."""
    found: dict[tuple[int, ...], bool] = {}

    def spy(outputs: Any, width: int) -> Any:
        marked = fresh(outputs, width)
        found.update(zip(map(tuple, outputs.tolist()), marked.tolist(), strict=True))
        return marked

    monkeypatch.setattr(adapter, "fresh", spy)
    return found


def marked_positions(text: TokenIds, decisions: dict[tuple[int, ...], bool]) -> list[int]:
    return [t for t in range(len(text)) if decisions.get(tuple(text[:t].tolist()), False)]


# ---------------------------------------------------------------- every cell of the table

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {},
    "warped sampling": {"temperature": 0.9, "top_k": 150, "top_p": 0.97},
    "beam search": {"do_sample": False, "num_beams": 3},
    "beam sampling": {"num_beams": 3},
    "own": {},
    "assisted": {},
}


@pytest.mark.parametrize("mode", DECODING_MODES)
@pytest.mark.parametrize("name", fg.SCHEMES)
def test_what_the_table_says_is_what_happens(
    name: str, mode: str, llama: Any, decisions: dict[tuple[int, ...], bool]
) -> None:
    support, scheme = DECODING_SUPPORT[name][mode], SCHEMES[name]
    if support.status == "refused":
        assert support.reason
        one = {"keys": MINE, "prompts": [[5, 6, 7, 8] * 4]}  # which prompt lookup finds again
        cases: list[dict[str, Any]] = [{}]
        if mode == "assisted":
            drafts = [{"assistant_model": _llama(5)}, {"prompt_lookup_num_tokens": 3}]
            cases = [{**one, "extra": draft} for draft in drafts]
        for case in cases:
            with pytest.raises(UnsupportedDecoding):
                generate(llama, scheme, **case, **MODES[mode])
        assert not any(decisions.values())  # and before anything was marked
        return
    if mode == "own":
        written = fg.embed_batch(
            TransformersModel(llama), PROMPTS, 50, [MINE, YOURS], scheme,
            rng=np.random.default_rng(0),
        )  # fmt: skip
        assert_marked([text.tokens for text in written], scheme)
        for text in written:
            positions = collect(text.tokens, scheme.context_width).positions
            assert np.flatnonzero(text.marked).tolist() == positions.tolist()
        return
    texts = generate(llama, scheme, **MODES[mode])
    assert_marked(texts, scheme)
    for text in texts:
        scored = collect(text, scheme.context_width).positions.tolist()
        assert marked_positions(text, decisions) == scored


def test_the_table_covers_every_scheme_and_mode() -> None:
    assert list(DECODING_SUPPORT) == list(fg.SCHEMES)
    assert all(
        list(row) == list(MODES) == list(DECODING_MODES) for row in DECODING_SUPPORT.values()
    )


def test_the_document_holds_the_table() -> None:
    document = Path(__file__).parents[2] / "docs" / "decoding.md"
    assert decoding_table() in document.read_text(encoding="utf-8")


# ---------------------------------------------------------------- inside generate


@pytest.mark.parametrize("name", ["gumbel", "greenlist"])
def test_repeated_windows_are_neither_marked_nor_scored(
    name: str, llama: Any, decisions: dict[tuple[int, ...], bool]
) -> None:
    """Windows of one token repeat all the time."""
    scheme = dataclasses.replace(SCHEMES[name], context_width=1)
    for text in generate(llama, scheme, n=80, top_k=3):
        evidence = collect(text, 1)
        assert evidence.n_repeated > 5
        assert marked_positions(text, decisions) == evidence.positions.tolist()


@pytest.mark.parametrize("name", fg.SCHEMES)
def test_each_step_is_drawn_from_the_marked_law_of_the_warped_logits(name: str, gpt2: Any) -> None:
    """The green list before the warpers, the others after them."""
    scheme, options = SCHEMES[name], {"temperature": 0.7, "top_k": 40, "top_p": 0.9}
    kwargs = generation_kwargs(scheme, MINE, rng=np.random.default_rng(0), **options)
    out = gpt2.generate(
        **inputs([5, 6, 7]), **kwargs, max_new_tokens=25, return_dict_in_generate=True,
        output_scores=True, output_logits=True, repetition_penalty=1.3,
    )  # fmt: skip
    tokens = out.sequences[0, 3:].numpy()
    keys = MINE.prf_keys(scheme.label)
    penalty = transformers.RepetitionPenaltyLogitsProcessor(1.3)
    warpers = transformers.LogitsProcessorList([
        transformers.TemperatureLogitsWarper(0.7),
        transformers.TopKLogitsWarper(40),
        transformers.TopPLogitsWarper(0.9),
    ])  # fmt: skip
    slots = set(range(MINE.slots))
    for t, (raw, scores) in enumerate(zip(out.logits, out.scores, strict=True)):
        logits = penalty(out.sequences[:, : 3 + t], raw)
        found = torch.softmax(scores.double(), -1).numpy()[0]
        fitting = set()
        for slot in slots:
            window = tokens[max(0, t - 4) : t]
            marked = t in collect(tokens, 4).positions
            block = fg.prf.block(keys[slot], window) if marked else None
            if block is not None and scheme.acts_on == "logits":
                probs = torch.softmax(logits.double(), -1).numpy()
                biased = torch.from_numpy(scheme.reweight(probs, block[None])).log().float()
                law = torch.softmax(warpers(out.sequences, biased).double(), -1).numpy()
            else:
                law = torch.softmax(warpers(out.sequences, logits).double(), -1).numpy()
                if block is not None:
                    law = scheme.reweight(law, block[None])
            if np.allclose(found, law[0], atol=1e-5):
                fitting.add(slot)
        slots &= fitting
    assert len(slots) == 1


def test_unmarked_rows_are_left_alone(llama: Any) -> None:
    scheme = SCHEMES["greenlist"]
    mine, plain = generate(llama, scheme, [MINE, None], do_sample=False)
    expected = llama.generate(**inputs(*PROMPTS), do_sample=False, max_new_tokens=50)
    assert np.array_equal(plain, expected[1, 5:].numpy())
    assert fg.detect(mine, MINE, scheme).log10_pvalue < -10
    # Nothing to mark is nothing to refuse.
    (plain,) = generate(llama, fg.Gumbel(), [None], prompts=PROMPTS[1:], do_sample=False)
    assert np.array_equal(plain, expected[1, 5:].numpy())


@pytest.mark.parametrize("mode", ["sampling", "beam search"])
def test_return_sequences_belong_to_the_key_of_their_prompt(mode: str, llama: Any) -> None:
    scheme = SCHEMES["greenlist"]
    texts = generate(llama, scheme, num_return_sequences=2, **MODES[mode])
    assert len(texts) == 4
    for row, text in enumerate(texts):
        right, wrong = (MINE, YOURS) if row < 2 else (YOURS, MINE)
        assert fg.detect(text, right, scheme).log10_pvalue < -5
        assert fg.detect(text, wrong, scheme).log10_pvalue > -4


def test_texts_use_all_slots_and_beams_of_one_text_the_same(llama: Any) -> None:
    scheme = SCHEMES["greenlist"]
    texts = generate(llama, scheme, MINE, num_return_sequences=4)
    assert {fg.detect(text, MINE, scheme).slot for text in texts} == {0, 1}
    for seed in range(3):
        for text in generate(llama, scheme, MINE, num_beams=4, seed=seed):
            assert fg.detect(text, MINE, scheme).log10_pvalue < -20


@pytest.mark.parametrize(("keys", "prompts"), [(3, 2), (1, 2), (2, 4)])
def test_keys_that_do_not_fit_the_prompts_are_refused(keys: int, prompts: int, llama: Any) -> None:
    """Two keys for four prompts would fit if rows were shared out, and name the wrong owners."""
    with pytest.raises(UnsupportedDecoding, match="one key per prompt"):
        generate(llama, fg.Gumbel(), [MINE] * keys, prompts=[[5]] * prompts)


@pytest.mark.parametrize("name", ["gumbel", "greenlist"])
def test_the_arguments_can_be_used_again(
    name: str, llama: Any, decisions: dict[tuple[int, ...], bool]
) -> None:
    scheme = SCHEMES[name]
    kwargs = generation_kwargs(scheme, MINE, rng=np.random.default_rng(0))
    ids = inputs([5, 6, 7])["input_ids"]
    for _ in range(3):  # each prompt is the whole last text: the length continues where it was
        mask = torch.ones_like(ids)
        out = llama.generate(ids, attention_mask=mask, **kwargs, max_new_tokens=50)
        (text,) = continuations(out, ids.shape[1])
        result = fg.detect(text, MINE, scheme)
        assert result.log10_pvalue < -5 and result.n_tokens == 50
        assert marked_positions(text, decisions) == collect(text, 4).positions.tolist()
        decisions.clear()
        ids = out


def test_threads_do_not_meet(llama: Any) -> None:
    scheme = SCHEMES["greenlist"]
    kwargs = generation_kwargs(scheme, MINE, rng=np.random.default_rng(0))
    texts: list[TokenIds] = []

    def work(prompt: list[int]) -> None:
        out = llama.generate(**inputs(prompt), **kwargs, max_new_tokens=50)
        texts.extend(continuations(out, len(prompt)))

    threads = [threading.Thread(target=work, args=([5] * n,)) for n in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts) == 3
    assert all(fg.detect(text, MINE, scheme).log10_pvalue < -5 for text in texts)


def test_end_of_sequence_ends_a_text(gpt2: Any) -> None:
    scheme = SCHEMES["gumbel"]
    kwargs = generation_kwargs(scheme, [MINE] * 8, rng=np.random.default_rng(0))
    out = gpt2.generate(
        **inputs(*([[n] for n in range(10, 18)])), **kwargs, max_new_tokens=80,
        eos_token_id=list(range(200, 205)),
    )  # fmt: skip
    texts = continuations(out, 1, range(200, 205))
    lengths = {len(text) for text in texts}
    assert len(lengths) > 3
    for text in texts:
        assert not np.isin(text[:-1], range(200, 205)).any()
        assert len(text) == 80 or 200 <= text[-1] < 205
        if len(text) > 30:
            assert fg.detect(text, MINE, scheme).log10_pvalue < -10


@pytest.mark.parametrize(
    ("name", "options"), [("gumbel", {}), ("greenlist", {"num_beams": 2, "do_sample": False})]
)
def test_encoder_decoder(
    name: str, options: dict[str, Any], t5: Any, decisions: dict[tuple[int, ...], bool]
) -> None:
    scheme = SCHEMES[name]
    kwargs = generation_kwargs(scheme, [MINE, YOURS], rng=np.random.default_rng(0), **options)
    given = inputs(*PROMPTS)
    texts = continuations(t5.generate(**given, **kwargs, max_new_tokens=50), 1)
    assert_marked(texts, scheme)
    for text in texts:
        scored = collect(text, scheme.context_width).positions.tolist()
        assert marked_positions(text, decisions) == scored


def test_a_models_own_defaults_do_not_change_the_decoding(llama: Any) -> None:
    before = llama.generation_config
    llama.generation_config = transformers.GenerationConfig(
        do_sample=False, num_beams=2, pad_token_id=PAD
    )
    try:
        assert_marked(generate(llama, SCHEMES["tournament"]), SCHEMES["tournament"])
    finally:
        llama.generation_config = before


@pytest.mark.parametrize("name", fg.SCHEMES)
def test_one_certain_token_is_refused(name: str) -> None:
    for options in ({"temperature": 0.0}, {"top_k": 1}, {"do_sample": False}):
        if SCHEMES[name].acts_on == "logits":
            generation_kwargs(SCHEMES[name], MINE, rng=np.random.default_rng(0), **options)
        else:
            with pytest.raises(UnsupportedDecoding, match="nothing to"):
                generation_kwargs(SCHEMES[name], MINE, rng=np.random.default_rng(0), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False, "top_p": 0.5},
        {"num_beams": 0},
        {"num_return_sequences": 0},
        {"top_p": 0.0},
        {"temperature": -1.0},
    ],
    ids=str,
)
def test_options_without_a_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedDecoding):
        generation_kwargs(SCHEMES["greenlist"], MINE, rng=np.random.default_rng(0), **options)


def test_temperature_zero_is_greedy(llama: Any) -> None:
    scheme = SCHEMES["greenlist"]
    zero, greedy = (
        generate(llama, scheme, **options) for options in ({"temperature": 0.0}, MODES["greedy"])
    )
    assert all(map(np.array_equal, zero, greedy))


@pytest.mark.parametrize("name", fg.SCHEMES)
def test_continuous_batching_is_refused(name: str, llama: Any) -> None:
    kwargs = generation_kwargs(SCHEMES[name], MINE, rng=np.random.default_rng(0))
    config = transformers.GenerationConfig(
        **{k: v for k, v in kwargs.items() if k != "logits_processor"}
    )
    with pytest.raises(UnsupportedDecoding, match="continuous batching"):
        llama._get_logits_processor(config)  # how continuous batching asks for processors


def test_half_of_the_arguments_is_refused(llama: Any) -> None:
    kwargs = generation_kwargs(SCHEMES["greenlist"], MINE, rng=np.random.default_rng(0))
    del kwargs["watermarking_config"]
    with pytest.raises(UnsupportedDecoding, match="everything"):
        llama.generate(**inputs([5]), **kwargs, max_new_tokens=5)


@pytest.mark.parametrize("name", fg.SCHEMES)
def test_no_secret_is_in_what_transformers_copies_and_prints(name: str, llama: Any) -> None:
    scheme = SCHEMES[name]
    kwargs = generation_kwargs(scheme, MINE, rng=np.random.default_rng(0))
    mark = kwargs["watermarking_config"]
    config = transformers.GenerationConfig(watermarking_config=mark)
    copied = copy.deepcopy(config)
    assert copied.watermarking_config is mark
    assert mark.to_dict() == dict(mark) == json.loads(mark.to_json_string())
    assert mark.to_dict() == {"scheme": scheme.tag}
    llama.generate(**inputs([5]), **kwargs, max_new_tokens=6)
    run = mark.construct_processor(VOCABULARY, torch.device("cpu"))
    everything = "\n".join(
        [repr(mark), str(mark), repr(kwargs), repr(config), config.to_json_string(), repr(run)]
    )
    body = MINE.export_text().split(":")[-1]
    secrets = [body, *(str(word) for word in MINE.prf_keys(scheme.label).reshape(-1))]
    assert not any(secret in everything for secret in secrets)
    for held in (mark, config, run, *kwargs.get("logits_processor", [])):
        with pytest.raises(SecretLeakError):
            pickle.dumps(held)


# ---------------------------------------------------------------- TransformersModel


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_padded_batch_gives_each_row_what_it_gets_alone(
    name: str, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    lm = TransformersModel(model)
    prompts = [np.array(p) for p in ([5, 6, 7], [9, 8, 7, 6, 5, 4, 3], [11])]
    steps = np.array([[20, 30, 40], [21, 31, 41]])
    logits, state = lm.prefill(prompts)
    found = [logits]
    for tokens in steps:
        logits, state = lm.step(tokens, state)
        found.append(logits)
    assert logits.dtype == np.float32 and logits.shape == (3, VOCABULARY)
    for row, prompt in enumerate(prompts):
        for n in range(3):
            ids = torch.tensor([[*prompt.tolist(), *steps[:n, row].tolist()]])
            with torch.no_grad():
                alone = model(ids).logits[0, -1].numpy()
            np.testing.assert_allclose(found[n][row], alone, rtol=1e-4, atol=1e-4)


def test_a_model_without_a_cache_reads_everything_again() -> None:
    class Sum(torch.nn.Module):
        config = SimpleNamespace(eos_token_id=(3, 4))
        device = torch.device("cpu")

        def forward(self, input_ids: Any, attention_mask: Any, **rest: Any) -> Any:
            total = (input_ids * attention_mask).sum(1, keepdim=True)
            logits = (total == torch.arange(9)).float()[:, None]
            return SimpleNamespace(logits=logits, past_key_values=None)

    lm = TransformersModel(Sum())
    logits, state = lm.prefill([np.array([1, 2]), np.array([4])])
    assert logits.argmax(1).tolist() == [3, 4]
    logits, _ = lm.step(np.array([3, 4]), state)
    assert logits.argmax(1).tolist() == [6, 8]
    assert lm.stop_ids == (3, 4)


def test_ids_without_a_token_are_never_drawn(llama: Any) -> None:
    known = {str(i): i for i in range(280) if i != 50} | {"beyond": 305}  # a hole, and padding
    tokenizer = SimpleNamespace(get_vocab=lambda: known)
    logits, _ = TransformersModel(llama, tokenizer=tokenizer).prefill([np.array([5])])
    assert np.flatnonzero(~np.isfinite(logits[0])).tolist() == [50, *range(280, 300)]
    loaded = LoadedModel(
        name="tiny", vocab_size=300, tokenizer_size=279, tokenizer_sha256="",
        model=llama, tokenizer=tokenizer,
    )  # fmt: skip
    assert np.array_equal(TransformersModel(loaded).prefill([np.array([5])])[0], logits)
    nothing = SimpleNamespace(get_vocab=lambda: {"beyond": 305})
    with pytest.raises(LogitsError):
        TransformersModel(llama, tokenizer=nothing).prefill([np.array([5])])


def test_what_cannot_be_streamed_is_refused(llama: Any, t5: Any) -> None:
    with pytest.raises(VocabularyMismatch, match="another model"):
        TransformersModel(llama).prefill([np.array([10**6])])
    with pytest.raises(TokenError, match="prompt 1 is empty"):
        TransformersModel(llama).prefill([np.array([5]), np.array([], dtype=np.int64)])
    with pytest.raises(ModelError, match="encoder-decoder"):
        TransformersModel(t5)


def test_stop_ids_are_the_models(llama: Any) -> None:
    assert TransformersModel(llama).stop_ids == ()
    model = SimpleNamespace(
        config=SimpleNamespace(eos_token_id=9),
        forward=lambda input_ids: None,
        generation_config=transformers.GenerationConfig(eos_token_id=[END, 7]),
    )
    model.eval = lambda: model
    assert TransformersModel(model).stop_ids == (END, 7)
    model.generation_config = None
    assert TransformersModel(model).stop_ids == (9,)


# ---------------------------------------------------------------- a real model

QUESTIONS = ["Write a story about a lighthouse keeper.", "Describe a market in the morning."]


@pytest.mark.model
@pytest.mark.parametrize("name", ["gumbel", "greenlist"])
def test_a_real_model_writes_under_two_keys(name: str, smollm2: LoadedModel) -> None:
    scheme = SCHEMES[name]
    prompts = [chat_prompt(smollm2, question).tolist() for question in QUESTIONS]
    options = {"temperature": 0.8, "top_p": 0.95}
    kwargs = generation_kwargs(scheme, [MINE, YOURS], rng=np.random.default_rng(0), **options)
    given = inputs(*prompts)
    out = smollm2.model.generate(**given, **kwargs, max_new_tokens=80)
    stop = TransformersModel(smollm2).stop_ids
    assert_marked(continuations(out, given["input_ids"].shape[1], stop), scheme)


@pytest.mark.model
def test_a_real_model_streams_under_two_keys(smollm2: LoadedModel) -> None:
    lm, scheme = TransformersModel(smollm2), fg.Gumbel()
    written = fg.embed_batch(
        lm, [chat_prompt(smollm2, question) for question in QUESTIONS], 80, [MINE, YOURS],
        scheme, rng=np.random.default_rng(0), stop=lm.stop_ids,
        sampling=fg.Sampling(temperature=0.8, top_p=0.95),
    )  # fmt: skip
    assert_marked([text.tokens for text in written], scheme)
