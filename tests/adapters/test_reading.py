import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import filigrane as fg
from filigrane.adapters.models import LoadedModel
from filigrane.errors import ModelError, TooShort, VocabularyMismatch
from filigrane.radioactivity.evidence import Document, Reading, argmax, differential, soft
from filigrane.radioactivity.ngram import Source
from filigrane.radioactivity.rules import read_positions
from filigrane.radioactivity.testing import test as check
from keymaker import keys_from_seed

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from filigrane.adapters import reading as module  # noqa: E402
from filigrane.adapters.finetuning import Example, FineTuning, finetune  # noqa: E402
from filigrane.adapters.reading import chosen_rows, losses, read  # noqa: E402

V = 90


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def llama(
    seed: int, vocabulary: int = V, context: int = 128, hidden: int = 32, spread: float = 0.3
) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden,
                num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=context,
                initializer_range=spread,
                bos_token_id=None, eos_token_id=None, pad_token_id=None,
            )
        ).eval()  # fmt: skip


def gpt2(seed: int) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=V, n_positions=128, n_embd=32, n_layer=2, n_head=2,
                initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=None,
            )
        ).eval()  # fmt: skip


def gemma2(seed: int) -> Any:
    """Its logits are squeezed after the head, so that the head alone does not give them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(
                vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2, head_dim=16,
                max_position_embeddings=128, initializer_range=0.6, final_logit_softcapping=2.0,
                bos_token_id=None, eos_token_id=None, pad_token_id=None,
            )
        ).eval()  # fmt: skip


def texts(count: int, longest: int = 60, seed: int = 0) -> list[Document]:
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        size = int(rng.integers(longest // 2, longest))
        made.append(Document(tokens=rng.integers(0, V, size), start=int(rng.integers(0, 9))))
    return made


def law(model: Any, tokens: Any) -> Any:
    with torch.inference_mode():
        logits = model(torch.as_tensor(np.asarray(tokens))[None]).logits[0]
        return logits.double().softmax(-1).numpy()


def whole(parts: Iterator[Reading]) -> Reading:
    return Reading.join(list(parts))


@pytest.mark.parametrize("make", [llama, gpt2, gemma2])
@pytest.mark.parametrize("width", [1, 3])
def test_a_reading_is_what_the_model_says(make: Any, width: int) -> None:
    suspect, base, documents, top = make(1), make(2), texts(7), 5
    reading = whole(read(suspect, documents, width, base=base, top=top, batch_size=3))
    row = 0
    for number, document in enumerate(documents):
        p, p0 = law(suspect, document.tokens), law(base, document.tokens)
        positions, _ = read_positions(document.tokens, document.start, width)
        for t in positions:
            assert reading.documents[row] == number
            assert reading.windows[row].tolist() == document.tokens[t - width + 1 : t + 1].tolist()
            part = slice(reading.starts[row], reading.starts[row + 1])
            tokens = reading.tokens[part].astype(int)
            largest = set(np.argsort(-p[t])[:top]) | set(np.argsort(-np.abs(p[t] - p0[t]))[:top])
            assert set(tokens.tolist()) == largest and len(tokens) == len(largest)
            assert tokens[0] == p[t].argmax() and (np.diff(reading.suspect[part]) <= 0).all()
            assert reading.base is not None
            assert np.allclose(reading.suspect[part], p[t][tokens], rtol=1e-4, atol=1e-7)
            assert np.allclose(reading.base[part], p0[t][tokens], rtol=1e-4, atol=1e-7)
            row += 1
    assert row == len(reading) == reading.ledger["scored"]
    assert reading.vocab_size == V
    assert reading.ledger["candidates"] == sum(len(d.tokens) - 1 - d.start for d in documents)


def test_without_a_base_the_largest_probabilities_alone() -> None:
    model, documents = llama(3), texts(3)
    reading = whole(read(model, documents, 2, top=4))
    assert reading.base is None and (np.diff(reading.starts) == 4).all()
    everything = whole(read(model, documents, 2, top=10**6))
    assert np.allclose(np.add.reduceat(everything.suspect, everything.starts[:-1]), 1, atol=1e-5)


def test_batches_and_where_a_caller_goes_on() -> None:
    model, documents = llama(4), texts(9)
    alone = list(read(model, documents, 1, batch_size=1, top=8))
    together = whole(read(model, documents, 1, batch_size=9, top=8))
    assert len(alone) == 9
    joined = Reading.join(alone)
    assert np.array_equal(joined.windows, together.windows)
    assert np.array_equal(joined.tokens[joined.starts[:-1]], together.tokens[together.starts[:-1]])
    assert np.allclose(joined.suspect, together.suspect, atol=1e-6)
    again = Reading.join([*alone[:4], *read(model, documents[4:], 1, batch_size=1, top=8, first=4)])
    for name in ("windows", "documents", "starts", "tokens", "suspect"):
        assert np.array_equal(getattr(again, name), getattr(joined, name))
    assert again.ledger == joined.ledger


def test_memory_is_bounded_by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (llama, gemma2):
        model, documents = make(4), texts(5)
        reading = whole(read(model, documents, 1, base=make(5), top=8))
        with monkeypatch.context() as patch:
            patch.setattr(module, "_CELLS", {"cpu": 7 * V})
            small = whole(read(model, documents, 1, base=make(5), top=8))
        assert np.array_equal(small.tokens, reading.tokens)
        assert np.allclose(small.suspect, reading.suspect, atol=1e-6)


def test_the_head_sees_scored_positions_only() -> None:
    model = llama(5)
    document = Document(tokens=np.tile(np.arange(10), 6), start=20)  # windows all used before
    document = Document(tokens=np.append(document.tokens, [50, 51, 52, 53]), start=20)
    seen: list[int] = []
    hook = model.lm_head.register_forward_hook(
        lambda module, arguments, output: seen.append(arguments[0].numel() // 32)
    )
    reading = whole(read(model, [document] * 4, 1))
    hook.remove()
    assert len(reading) == 12 and reading.windows[:3, 0].tolist() == [50, 51, 52]
    assert sum(seen) == 14  # one row twice more: through the model, and to compare the two


def test_logits_of_chosen_rows_are_those_of_the_model() -> None:
    for make in (llama, gpt2, gemma2):
        model = make(6)
        ids = torch.arange(40).reshape(2, 20)
        with torch.inference_mode():
            with chosen_rows(model, torch.tensor([3, 25])) as caught:
                few = model(ids).logits
            every = model(ids).logits
        assert few.shape == (1, 2, V) and caught[0].shape == (2, 32)
        assert torch.allclose(few[0, 0], every[0, 3]) and torch.allclose(few[0, 1], every[1, 5])


def test_long_texts_are_read_in_pieces_and_the_tape_goes_on() -> None:
    model, context = llama(7, context=32), 32
    rng = np.random.default_rng(3)
    tokens = rng.integers(0, V, 150)
    tokens[140] = tokens[5]  # seen 135 tokens before: far outside the piece
    reading = whole(read(model, [Document(tokens=tokens)], 1, top=3))
    positions, _ = read_positions(tokens, 0, 1)
    assert 140 not in positions
    assert reading.windows[:, 0].tolist() == tokens[positions].tolist()
    begins = [0, 24, 48, 72, 96, 120]  # a quarter of 32 overlaps
    for row, t in enumerate(positions):
        begin = next(begin for begin in begins if t < begin + context)
        assert t - begin >= context // 4 or begin == 0
        p = law(model, tokens[begin : t + 1])[-1]
        assert np.isclose(reading.suspect[reading.starts[row]], p.max(), rtol=1e-4)
    short = whole(read(llama(7), [Document(tokens=tokens[:60])], 1, context=16))
    assert len(short) == len(read_positions(tokens[:60], 0, 1)[0])
    sparse = Document(tokens=np.append(np.tile([1, 2], 70), [8, 9]), start=0)
    assert whole(read(model, [sparse], 1)).windows[:, 0].tolist() == [1, 2, 8]


def test_what_the_writer_saw_is_on_the_tape() -> None:
    model, tokens = llama(8), np.arange(20)
    document = Document(tokens=tokens, start=4, earlier=(np.array([60, 10, 11, 61]),))
    reading = whole(read(model, [document], 1))
    assert reading.windows[:, 0].tolist() == [4, 5, 6, 7, 8, 9, *range(12, 19)]
    repeated = Document(tokens=np.tile(tokens, 2), start=0)
    assert len(whole(read(model, [repeated], 1, attention_rule=False))) == 39


def test_equal_probabilities_come_by_their_ids() -> None:
    model = llama(9)
    with torch.no_grad():
        model.lm_head.weight[7::9] = model.lm_head.weight[7]
    reading = whole(read(model, texts(4), 1, top=V))
    for begin, end in zip(reading.starts, reading.starts[1:], strict=False):
        tokens = reading.tokens[begin:end].astype(int)
        same = tokens[tokens % 9 == 7]
        assert same.tolist() == sorted(same.tolist()) and same[0] == 7
    half = whole(read(llama(9).to(torch.bfloat16), texts(4), 1, top=V))
    assert np.allclose(np.add.reduceat(half.suspect, half.starts[:-1]), 1, atol=1e-5)


def test_families_that_pad_their_vocabulary_differently() -> None:
    small, large = llama(10), llama(11, vocabulary=V + 38)
    documents = texts(3)
    reading = whole(read(small, documents, 1, base=large, top=10))
    assert reading.vocab_size == V and reading.tokens.max() < V
    reading = whole(read(large, documents, 1, base=small, vocab_size=V, top=10))
    assert reading.vocab_size == V and reading.tokens.max() < V
    reading = whole(read(small, documents, 1, vocab_size=V + 38, top=200))
    assert reading.vocab_size == V + 38 and len(reading.tokens) == len(reading) * V


def loaded(model: Any, fingerprint: str) -> LoadedModel:
    return LoadedModel("tiny", V, V, fingerprint, model, None)


def test_what_does_not_belong_together_is_refused() -> None:
    documents = texts(1)
    with pytest.raises(VocabularyMismatch, match="Pass an alignment"):
        read(loaded(llama(1), "a"), documents, 1, tokenizer_sha256="b")
    with pytest.raises(VocabularyMismatch, match="Name a base model"):
        read(loaded(llama(1), "a"), documents, 1, base=loaded(llama(2), "b"))
    with pytest.raises(VocabularyMismatch, match="outside the vocabulary of 90"):
        list(read(llama(1), [Document(tokens=np.array([5, V]))], 1))
    with pytest.raises(VocabularyMismatch, match="the model knows 90 ids"):
        list(read(llama(1), [Document(tokens=np.array([5, V]))], 1, vocab_size=V + 1))
    with pytest.raises(ValueError, match="at least 1"):
        read(llama(1), documents, 1, top=0)
    assert list(read(llama(1), [], 1)) == []


def test_a_text_without_a_position_to_score() -> None:
    reading = whole(read(llama(1), [Document(tokens=np.array([4, 4]), start=2)], 1))
    assert len(reading) == 0 and reading.ledger["candidates"] == 0


def test_progress_is_reported() -> None:
    heard: list[tuple[int, int | None, str]] = []
    for _ in read(llama(1), texts(5), 1, batch_size=2, report=lambda *said: heard.append(said)):
        pass
    assert [done for done, _, _ in heard] == [0, 2, 4, 5]
    assert {total for _, total, _ in heard} == {5}


@pytest.mark.parametrize("make", [llama, gemma2])
def test_losses(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(12)
    pieces = [document.tokens for document in texts(7)]
    monkeypatch.setattr(module, "_CELLS", {"cpu": 20 * V})
    found = losses(model, pieces, batch_size=3)
    for piece, loss in zip(pieces, found, strict=True):
        p = law(model, piece)
        mine = -np.log(p[np.arange(len(piece) - 1), piece[1:]]).mean()
        assert np.isclose(loss, mine, rtol=1e-4)
    with pytest.raises(TooShort, match="at least two"):
        losses(model, [[3]])
    with pytest.raises(ModelError, match="cut it into pieces"):
        losses(model, [np.zeros(129, dtype=np.int64)])


def test_who_was_trained_on_marked_text_gives_it_away(tmp_path: Path) -> None:
    """Alice is a Markov source, Bob a tiny Llama that knew her before: base, clean, marked."""
    size, width = 256, 48
    (key,) = keys_from_seed(8, 1)
    scheme = fg.GreenList(gamma=0.25, delta=3.0, context_width=1)
    words = np.asarray(key.prf_keys(scheme.label)[0])
    rng = np.random.default_rng(2)
    source = Source.draw(size, rng, successors=24)

    def marked(count: int) -> list[Any]:
        return list(source.write(count, width, rng, words=words, scheme=scheme))

    def plain(count: int) -> list[Any]:
        return list(source.write(count, width, rng))

    def train(model: Any, data: list[Any], name: str) -> Any:
        settings = FineTuning(learning_rate=3e-3, batch_size=16, epochs=2, loss_on="all")
        finetune(model, [Example(tokens, 0) for tokens in data], settings, tmp_path / name)
        return model

    base = train(llama(13, vocabulary=size, hidden=64, spread=0.02), plain(400), "base")
    documents = [Document(tokens=tokens) for tokens in marked(24)]
    found: dict[str, list[float]] = {}
    for name, data in (("clean", plain(128)), ("half", plain(64) + marked(64))):
        bob = train(copy.deepcopy(base), data, name)
        reading = whole(read(bob, documents, 1, base=base))
        found[name] = [
            check(statistic(reading), key, scheme).log10_pvalue
            for statistic in (argmax, soft, differential)
        ]
    assert min(found["clean"]) > -4
    assert found["half"][2] < -20 and found["half"][2] < found["half"][1] < -3


@pytest.mark.model
def test_a_real_model(smollm2: LoadedModel) -> None:
    ids = smollm2.tokenizer("The capital of France is Paris. The capital of Italy is")["input_ids"]
    document = Document(tokens=np.asarray(ids))
    (reading,) = read(
        smollm2, [document], 1, tokenizer_sha256=smollm2.tokenizer_sha256, base=smollm2, top=16
    )
    best = reading.tokens[reading.starts[:-1]].astype(int)
    assert " Paris" in [smollm2.tokenizer.decode([token]) for token in best]
    assert reading.base is not None and np.array_equal(reading.base, reading.suspect)
    # " is" occurred before: whatever comes after it may be copied.
    assert reading.windows[-1, 0] != ids[-1] and reading.vocab_size == smollm2.vocab_size
