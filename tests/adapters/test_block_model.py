"""Reading blocks, trees and forgetting with transformers models, against fresh forward passes.

Caches, masks and positions are right if and only if every law that a method saw is the law of one
pass over the text before it, without a cache. Most models are tiny and random; one is real.
"""

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import filigrane as fg
from filigrane.adapters.models import LoadedModel, chat_prompt
from filigrane.errors import DraftError, ModelError, VocabularyMismatch
from filigrane.speculative import NGram, Session, Speculated, generate, method
from filigrane.speculative.drafts import TEXT, ModelDrafter
from filigrane.speculative.laws import Law, clocks, law_of, race
from filigrane.speculative.replay import laws_along
from keymaker import keys_from_seed

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from filigrane.adapters import causal_lm as adapter  # noqa: E402
from filigrane.adapters.transformers import TransformersModel, without_layers  # noqa: E402

VOCABULARY = 40
STOP = (3, 4)
KEY = keys_from_seed(8, 1, slots=1)[0]
PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 9, 8], [11], [20, 21, 20, 21, 20]]
FAMILIES = ["llama", "qwen2", "gpt2", "mistral"]
TREES = ["llama", "qwen2", "gpt2"]
"""Families that attend to their whole text, and so can read trees."""
TAGS = ["plain", "otmc", "bv-skt", "mws@tournament", "pfr:drafts=4"]


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small matrices, and others may use the machine
    yield
    torch.set_num_threads(threads)


def tiny(family: str, seed: int = 0) -> Any:
    """A random model of three layers, peaked enough for drafts to be rejected."""
    size = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 256, "initializer_range": 0.25,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "llama":
            model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size))
        elif family == "qwen2":
            model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**size))
        elif family == "mistral":
            config = transformers.MistralConfig(**size, sliding_window=6)
            model = transformers.MistralForCausalLM(config)
        else:
            config = transformers.GPT2Config(
                vocab_size=VOCABULARY, n_positions=256, n_embd=32, n_layer=3, n_head=2,
                initializer_range=0.25, bos_token_id=None, eos_token_id=None,
            )  # fmt: skip
            model = transformers.GPT2LMHeadModel(config)
    return model.eval()


def shaken(model: Any, scale: float) -> Any:
    """A draft for any family: the model with noise on its weights."""
    draft = copy.deepcopy(model)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(5)
        for weights in draft.parameters():
            weights += scale * weights.std().nan_to_num() * torch.randn_like(weights)
    return draft


@pytest.fixture(scope="module")
def models() -> dict[str, tuple[Any, Any]]:
    """Family -> target and draft."""
    found = {}
    for family in FAMILIES:
        target = tiny(family)
        found[family] = target, shaken(target, 0.15)
    return found


@torch.inference_mode()
def fresh_logits(model: Any, ids: list[int]) -> np.ndarray:
    """One pass without cache and padding: (n, V) logits after each token."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float().numpy()


def fresh_laws(model: Any, prompt: list[int], text: Speculated, sampling: fg.Sampling) -> list[Law]:
    """The law of every position of a text."""
    logits = fresh_logits(model, [*prompt, *text.tokens.tolist()])
    return [law_of(row, sampling) for row in logits[len(prompt) - 1 : -1]]


class CheckedDrafter(ModelDrafter):
    """Compares every law that it hands out with that of a fresh pass."""

    def __init__(self, model: Any, sampling: fg.Sampling) -> None:
        super().__init__(TransformersModel(model), sampling)
        self.bare, self.sampling, self.checked = model, sampling, 0

    def begin(self, prompts):  # type: ignore[no-untyped-def]
        self.texts = [list(prompt) for prompt in prompts]
        super().begin(prompts)

    def extend(self, blocks, ends):  # type: ignore[no-untyped-def]
        laws = super().extend(blocks, ends)
        for text, block, places, row in zip(self.texts, blocks, ends, laws, strict=True):
            for place, law in zip(places, row, strict=True):
                path: list[int] = []
                while place != TEXT:
                    path.insert(0, block[place].token)
                    place = block[place].parent
                expected = law_of(fresh_logits(self.bare, text + path)[-1], self.sampling)
                assert np.array_equal(law.ids, expected.ids)
                np.testing.assert_allclose(law.probs, expected.probs, rtol=0.0, atol=1e-4)
                self.checked += 1
        return laws

    def settle(self, texts, blocks, paths):  # type: ignore[no-untyped-def]
        super().settle(texts, blocks, paths)
        self.texts = [list(text) for text in texts]

    def select(self, rows):  # type: ignore[no-untyped-def]
        super().select(rows)
        self.texts = [self.texts[row] for row in rows]


def write(
    target: Any,
    draft: Any,
    tag: str,
    n: int = 24,
    *,
    prompts: list[list[int]] = PROMPTS,
    stop: tuple[int, ...] = STOP,
    sampling: fg.Sampling | None = None,
    draft_length: int = 4,
) -> list[Speculated]:
    how = method(tag)
    keys = [KEY if how.marks else None] * len(prompts)
    return generate(
        TransformersModel(target),
        draft,
        prompts,
        n,
        keys,
        how,
        draft_length=draft_length,
        rng=np.random.default_rng(1),
        sampling=sampling,
        stop=stop,
    )


def assert_log_probs(
    model: Any, prompts: list[list[int]], texts: list[Speculated], sampling: fg.Sampling
) -> None:
    for prompt, text in zip(prompts, texts, strict=True):
        laws = fresh_laws(model, prompt, text, sampling)
        again = [
            np.log(law.probability(token))
            for law, token in zip(laws, text.tokens.tolist(), strict=True)
        ]
        np.testing.assert_allclose(text.log_probs, again, rtol=0.0, atol=1e-4)


# ---------------------------------------------------------------- whole texts


@pytest.mark.parametrize(
    ("tag", "family"),
    [
        (tag, family)
        for tag in TAGS
        for family in (TREES if method(tag).branching > 1 else FAMILIES)
    ],
)
def test_every_law_is_that_of_a_fresh_pass(
    tag: str, family: str, models: dict[str, tuple[Any, Any]]
) -> None:
    """Target and draft, rows of different lengths that end at different times."""
    target, draft = models[family]
    sampling = fg.Sampling(temperature=0.9)
    # What the second row writes at its tenth place will end it there, or sooner.
    free = write(target, TransformersModel(draft), tag, 20, stop=(), sampling=sampling)
    stop = (int(free[1].tokens[9]),)
    drafter = CheckedDrafter(draft, sampling)
    texts = write(target, drafter, tag, 20, stop=stop, sampling=sampling)
    assert drafter.checked > 20
    assert len({text.tokens.size for text in texts}) > 1
    kept = sum(int(text.accepted.sum()) for text in texts)
    assert 0 < kept < sum(int(text.proposed.sum()) for text in texts)
    assert_log_probs(target, PROMPTS, texts, sampling)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tag", ["plain", "otmc", "bv-skt"])
def test_drafts_out_of_the_text(tag: str, family: str, models: dict[str, tuple[Any, Any]]) -> None:
    """Rows draft different numbers of tokens, so that columns of padding lie between texts."""
    target, _ = models[family]
    sampling = fg.Sampling(temperature=0.5)
    prompts = [[20, 21, 20, 21, 20], [5, 6, 7] * 4, [11], [9, 9, 9]]
    texts = write(target, NGram(), tag, 30, prompts=prompts, stop=(), sampling=sampling)
    assert any(text.proposed.any() for text in texts)
    assert_log_probs(target, prompts, texts, sampling)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tag", ["plain", "otmc", "bv-skt"])
def test_a_draft_that_is_the_target_is_always_kept(
    tag: str, family: str, models: dict[str, tuple[Any, Any]]
) -> None:
    target, _ = models[family]
    texts = write(target, TransformersModel(target), tag, 30)
    assert max(text.emitted.size for text in texts) > 3
    for text in texts:
        assert np.array_equal(text.accepted, text.proposed)


@pytest.mark.parametrize("family", TREES)
@pytest.mark.parametrize("tag", ["pfr:drafts=1", "pfr:drafts=4", "mws@gumbel"])
def test_full_strength_is_the_race_of_a_fresh_pass(
    tag: str, family: str, models: dict[str, tuple[Any, Any]]
) -> None:
    target, draft = models[family]
    how = method(tag)
    words = KEY.prf_keys(how.scheme.label)[0]
    width, marked = how.scheme.context_width, 0
    texts = write(target, TransformersModel(draft), tag, 30, stop=())
    for prompt, text in zip(PROMPTS, texts, strict=True):
        laws = fresh_laws(target, prompt, text, fg.Sampling())
        for t in np.flatnonzero(text.marked):
            block = fg.prf.block(words, text.tokens[t - width : t])
            law = laws[t]
            assert text.tokens[t] == law.ids[race(clocks(block, law.ids), law.probs)]
            marked += 1
    assert marked > 60


def test_laws_along_a_text_are_those_of_a_fresh_pass(models: dict[str, tuple[Any, Any]]) -> None:
    sampling = fg.Sampling(temperature=0.7, top_k=10)
    for family in FAMILIES:
        target, draft = models[family]
        text = write(target, TransformersModel(draft), "plain", sampling=sampling)[1]
        found = laws_along(TransformersModel(target), PROMPTS[1], text.tokens, sampling)
        expected = fresh_laws(target, PROMPTS[1], text, sampling)
        assert len(found) == text.tokens.size
        for mine, law in zip(found, expected, strict=True):
            assert np.array_equal(mine.ids, law.ids)
            np.testing.assert_allclose(mine.probs, law.probs, rtol=0.0, atol=1e-4)
        logs = [law.probability(int(token)) for law, token in zip(found, text.tokens, strict=True)]
        np.testing.assert_allclose(np.log(logs), text.log_probs, rtol=0.0, atol=1e-4)


# ---------------------------------------------------------------- read, keep and select


class Reference:
    """What a state should hold: for each row its settled text, and the open columns."""

    def __init__(self, model: Any, rows: int) -> None:
        self.model = model
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.open: list[list[tuple[int, int] | None]] = [[] for _ in range(rows)]
        """(token, parent) of each open column, None for padding."""

    def path(self, row: int, column: int) -> list[int]:
        """The open columns that lead to one, and itself."""
        found: list[int] = []
        while column >= 0:
            found.insert(0, column)
            node = self.open[row][column]
            assert node is not None
            column = node[1]
        return found

    def logits(self, row: int, column: int) -> np.ndarray:
        """After a column."""
        tokens = [self.open[row][at][0] for at in self.path(row, column)]  # type: ignore[index]
        return fresh_logits(self.model, self.texts[row] + tokens)[-1]


@pytest.mark.parametrize("slack", [32, -40], ids=["loose", "tight"])
@pytest.mark.parametrize(
    ("family", "trees"),
    [*((family, False) for family in FAMILIES), *((family, True) for family in TREES)],
)
def test_any_sequence_of_reads_keeps_and_selects(
    family: str,
    trees: bool,
    slack: int,
    models: dict[str, tuple[Any, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With gaps between tokens, and with texts moved together at every chance."""
    monkeypatch.setattr(adapter, "_SLACK", slack)
    model = models[family][0]
    lm, rng, compared = TransformersModel(model), np.random.default_rng(3), 0
    for _ in range(3):
        rows = 4
        state, reference = lm.open(rows), Reference(model, rows)
        for block in range(6):
            for _ in range(int(rng.integers(1, 4))):
                m = int(rng.integers(1, 5)) + 4 * (block == 0)
                tokens = rng.integers(0, VOCABULARY, size=(rows, m))
                valid = rng.random((rows, m)) < 0.7
                if block == 0:  # no row is without text
                    valid[:, -1] = True
                tree = trees and rng.random() < 0.6
                before = len(reference.open[0])
                parents = np.full((rows, m), -1, dtype=np.int64)
                for row in range(rows):
                    for column in range(m):
                        known = [
                            at for at, node in enumerate(reference.open[row]) if node is not None
                        ]
                        # The first text has one root, later trees hang where they like.
                        root = [-1] if reference.texts[row] or not known else []
                        parent = int(rng.choice(root + known)) if tree else max(known, default=-1)
                        node = (int(tokens[row, column]), parent)
                        reference.open[row].append(node if valid[row, column] else None)
                        if valid[row, column]:
                            parents[row, column] = parent
                last = int(rng.integers(1, m + 1))
                logits = lm.read(state, tokens, valid, last=last, parents=parents if tree else None)
                assert logits.shape == (rows, last, VOCABULARY) and logits.dtype == np.float32
                for row, column in np.argwhere(valid[:, m - last :]):
                    expected = reference.logits(row, before + m - last + column)
                    np.testing.assert_allclose(logits[row, column], expected, rtol=0, atol=1e-4)
                    compared += 1
            kept = np.zeros((rows, len(reference.open[0])), dtype=np.bool_)
            for row in range(rows):
                known = [at for at, node in enumerate(reference.open[row]) if node is not None]
                nothing = [-1] if reference.texts[row] else []
                end = int(rng.choice(nothing + known)) if nothing + known else -1
                # Often the last one, so that now and then everything is kept.
                end = known[-1] if known and rng.random() < 0.4 else end
                path = reference.path(row, end)
                kept[row, path] = True
                reference.texts[row] += [reference.open[row][at][0] for at in path]  # type: ignore[index]
                reference.open[row] = []
            lm.keep(state, kept)
            if rows > 1 and rng.random() < 0.5:
                chosen = rng.permutation(rows)[: rows - int(rng.integers(0, 2))]
                rows = len(chosen)
                lm.select(state, chosen)
                reference.texts = [reference.texts[row] for row in chosen]
                reference.open = [[] for _ in chosen]
    assert compared > 150


def test_nothing_kept_is_an_empty_batch_again(models: dict[str, tuple[Any, Any]]) -> None:
    for family in FAMILIES:
        model = models[family][0]
        lm = TransformersModel(model)
        state = lm.open(3)
        tokens, all_valid = np.array([[5, 6], [7, 8], [9, 10]]), np.ones((3, 2), dtype=np.bool_)
        lm.read(state, tokens, all_valid, last=1)
        lm.keep(state, ~all_valid)
        lm.select(state, np.array([2, 0]))
        logits = lm.read(state, tokens[:2], all_valid[:2], last=1)
        for row in (0, 1):
            expected = fresh_logits(model, tokens[row].tolist())[-1]
            np.testing.assert_allclose(logits[row, 0], expected, rtol=0, atol=1e-4)


def test_trees_are_refused_where_they_cannot_be_read(models: dict[str, tuple[Any, Any]]) -> None:
    tokens, valid = np.array([[5, 6, 7]]), np.ones((1, 3), dtype=np.bool_)
    parents = np.array([[-1, 0, 0]])

    def tree(model: Any) -> Any:
        lm = TransformersModel(model)
        return lm.read(lm.open(1), tokens, valid, last=1, parents=parents)

    with pytest.raises(ModelError, match="one draft per position"):
        tree(models["mistral"][0])
    with pytest.raises(DraftError, match="one draft per position"):
        write(models["mistral"][0], TransformersModel(models["mistral"][1]), "pfr:drafts=2")

    class Bare(torch.nn.Module):
        """Takes no positions, and says nothing of its attention."""

        config = SimpleNamespace()
        device, dtype = torch.device("cpu"), torch.float32

        def forward(self, input_ids: Any, attention_mask: Any, **rest: Any) -> Any:
            raise AssertionError("must not be asked")

    with pytest.raises(ModelError, match="one draft per position"):
        tree(Bare())


def test_models_without_positions_see_no_gaps() -> None:
    """Without position_ids a model counts columns: forgotten ones must not be among them."""

    class Places(torch.nn.Module):
        """The next token is the number of the newest column, from the first one it may see."""

        config = SimpleNamespace(eos_token_id=None)
        device = torch.device("cpu")

        def forward(self, input_ids: Any, attention_mask: Any, **rest: Any) -> Any:
            first = attention_mask.argmax(1, keepdim=True)
            place = (torch.arange(input_ids.shape[1])[None] - first).clamp_min(0)
            logits = torch.nn.functional.one_hot(place, 20).float()
            return SimpleNamespace(logits=logits, past_key_values=None)

    lm = TransformersModel(Places())
    state = lm.open(2)
    lm.read(state, np.array([[0, 1], [1, 1]]), np.array([[False, True], [True, True]]), last=1)
    lm.read(state, np.ones((2, 3), dtype=np.int64), np.ones((2, 3), dtype=np.bool_), last=1)
    lm.keep(state, np.array([[False, True, True, False, False], [True, True, True, True, True]]))
    valid = np.array([[True, True, False], [False, True, True]])
    logits = lm.read(state, np.ones((2, 3), dtype=np.int64), valid, last=3)
    assert logits.argmax(2)[valid].tolist() == [2, 3, 5, 6]


# ---------------------------------------------------------------- what a read costs


def spy_on(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, tuple[int, ...]]]:
    """Columns read and shape of the mask, of each call."""
    calls: list[tuple[int, tuple[int, ...]]] = []
    forward = model.forward

    def spy(*, input_ids: Any, attention_mask: Any, position_ids: Any, **rest: Any) -> Any:
        assert tuple(position_ids.shape) == tuple(input_ids.shape)
        calls.append((input_ids.shape[1], tuple(attention_mask.shape)))
        return forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **rest
        )

    monkeypatch.setattr(model, "forward", spy)
    return calls


def test_text_is_read_once_and_masks_are_as_small_as_they_can_be(
    models: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, draft = models["llama"]
    lm, small = TransformersModel(target), TransformersModel(draft)
    seen = [spy_on(model, monkeypatch) for model in (target, draft)]
    for tag in ("otmc", "pfr:drafts=4"):
        for calls in seen:
            calls.clear()
        rng = np.random.default_rng(0)
        generate(lm, small, PROMPTS, 20, [KEY] * 4, method(tag), draft_length=3, rng=rng)
        for calls in seen:
            assert len(calls) > 3
            # A tree of three levels of four, or a chain of three; and what was pending.
            widest = 2 + (12 if "pfr" in tag else 3)
            assert all(columns <= widest for columns, _ in calls[1:])
            for columns, mask in calls:
                assert len(mask) == 2 or mask[1:3] == (1, columns)
        if tag == "otmc":
            assert all(len(mask) == 2 for calls in seen for _, mask in calls)


def test_gaps_do_not_add_up(
    models: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that keep different numbers of drafts leave gaps, without end if nobody closes them."""
    target, draft = models["llama"]
    seen = [spy_on(model, monkeypatch) for model in (target, draft)]
    prompts = [[5, 6]] * 8
    texts = write(target, TransformersModel(draft), "plain", 100, prompts=prompts, stop=())
    for calls in seen:
        assert max(mask[1] for _, mask in calls) <= 1.25 * 102 + 32 + 6
    monkeypatch.undo()
    assert_log_probs(target, prompts, texts, fg.Sampling())


# ---------------------------------------------------------------- a draft out of the target


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_a_model_without_layers_shares_its_weights(family: str) -> None:
    model, ids = tiny(family), [5, 6, 7, 8, 9]
    before, config = fresh_logits(model, ids), copy.deepcopy(model.config.to_dict())
    small = without_layers(model, [1])
    assert len(small.model.layers) == small.config.num_hidden_layers == 2
    assert small.config is not model.config and small.model.config is small.config
    kept = dict(model.named_parameters())
    for name, weights in small.named_parameters():
        name = name.replace("layers.1.", "layers.2.")
        assert weights.data_ptr() == kept[name].data_ptr()
    assert sum(w.numel() for w in small.parameters()) < sum(w.numel() for w in model.parameters())
    # Using the draft leaves no trace in the model.
    texts = write(model, CheckedDrafter(small, fg.Sampling()), "plain", 12)
    assert_log_probs(model, PROMPTS, texts, fg.Sampling())
    assert np.array_equal(fresh_logits(model, ids), before)
    assert model.config.to_dict() == config and len(model.model.layers) == 3
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    assert not np.allclose(fresh_logits(small, ids), before)
    # The layers that stay are those that were not named.
    by_hand = copy.deepcopy(model)
    del by_hand.model.layers[1]
    by_hand.config.num_hidden_layers = 2
    assert np.array_equal(fresh_logits(by_hand, ids), fresh_logits(small, ids))


def test_layers_of_several_kinds_keep_their_kind() -> None:
    config = tiny("qwen2").config
    config.use_sliding_window, config.sliding_window = True, 4
    config.layer_types = ["full_attention", "full_attention", "sliding_attention"]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = transformers.Qwen2ForCausalLM(config).eval()
    small = without_layers(model, [0])
    assert small.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.config.layer_types == ["full_attention", "full_attention", "sliding_attention"]
    sampling = fg.Sampling()
    texts = write(model, CheckedDrafter(small, sampling), "otmc", 20)
    assert_log_probs(model, PROMPTS, texts, sampling)


@pytest.mark.parametrize("layers", [[], [3], [-1], [0, 1, 2], [1, 7]], ids=str)
def test_layers_that_cannot_be_left_out(layers: list[int]) -> None:
    with pytest.raises(DraftError, match="layers 0 to 2"):
        without_layers(tiny("llama"), layers)


def test_families_without_a_list_of_layers() -> None:
    loaded = LoadedModel(
        name="tiny", vocab_size=VOCABULARY, tokenizer_size=VOCABULARY, tokenizer_sha256="",
        model=tiny("llama"), tokenizer=None,
    )  # fmt: skip
    for model in (tiny("gpt2"), loaded):
        with pytest.raises(DraftError, match=r"no list of layers at model\.layers"):
            without_layers(model, [1])


# ---------------------------------------------------------------- two vocabularies


def loaded(seed: int, size: int, fingerprint: str) -> LoadedModel:
    """A model whose logits are `size` wide, of which a tokenizer knows 40."""
    config = copy.deepcopy(tiny("llama").config)
    config.vocab_size = size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(config).eval()
    tokenizer = SimpleNamespace(get_vocab=lambda: {str(i): i for i in range(VOCABULARY)})
    return LoadedModel(
        name="tiny", vocab_size=size, tokenizer_size=VOCABULARY, tokenizer_sha256=fingerprint,
        model=model, tokenizer=tokenizer,
    )  # fmt: skip


def test_models_of_different_tokenizers_are_no_pair() -> None:
    target = TransformersModel(loaded(0, VOCABULARY, "a" * 64))
    draft = TransformersModel(loaded(1, VOCABULARY, "b" * 64))
    with pytest.raises(VocabularyMismatch, match="do not share a vocabulary"):
        generate(
            target, draft, PROMPTS, 5, [None] * 4, method("plain"), rng=np.random.default_rng(0)
        )


@pytest.mark.parametrize("tag", [*TAGS, "mse@gamma", "two-key", "frontier:c=2"])
@pytest.mark.parametrize("widths", [(48, 40), (40, 48)], ids=str)
def test_one_tokenizer_and_two_widths(tag: str, widths: tuple[int, int]) -> None:
    """Families pad their vocabulary to different sizes."""
    big, small = loaded(0, widths[0], "a" * 64), loaded(1, widths[1], "a" * 64)
    small = LoadedModel(
        name="tiny", vocab_size=widths[1], tokenizer_size=VOCABULARY, tokenizer_sha256="a" * 64,
        model=without_layers(small.model, [1]), tokenizer=small.tokenizer,
    )  # fmt: skip
    how = method(tag)
    target = TransformersModel(big)
    texts = generate(
        target,
        TransformersModel(small),
        PROMPTS,
        20,
        [KEY if how.marks else None] * 4,
        how,
        rng=np.random.default_rng(0),
        sampling=fg.Sampling(temperature=2.0),
    )
    assert target.vocab_size == widths[0] and sum(int(text.accepted.sum()) for text in texts) > 0
    for prompt, text in zip(PROMPTS, texts, strict=True):
        assert text.tokens.size == 20 and text.tokens.max() < VOCABULARY
        logits = fresh_logits(big.model, [*prompt, *text.tokens.tolist()])[:, :VOCABULARY]
        laws = [law_of(row, fg.Sampling(temperature=2.0)) for row in logits[len(prompt) - 1 : -1]]
        again = [
            law.probability(token) for law, token in zip(laws, text.tokens.tolist(), strict=True)
        ]
        np.testing.assert_allclose(text.log_probs, np.log(again), rtol=0.0, atol=1e-4)


# ---------------------------------------------------------------- errors on the way


class Failing(TransformersModel):
    """Runs out of memory at one of its reads."""

    def __init__(self, model: Any, at: int) -> None:
        super().__init__(model)
        self.left = at

    def read(self, state, tokens, valid, *, last, parents=None):  # type: ignore[no-untyped-def]
        if self.left == 0:
            raise torch.OutOfMemoryError("no memory left")
        self.left -= 1
        return super().read(state, tokens, valid, last=last, parents=parents)


@pytest.mark.parametrize("which", ["target", "draft"])
def test_what_was_written_survives_an_error(which: str, models: dict[str, tuple[Any, Any]]) -> None:
    target, draft = models["llama"]
    session = Session(
        Failing(target, 3) if which == "target" else TransformersModel(target),
        Failing(draft, 13) if which == "draft" else TransformersModel(draft),
        PROMPTS,
        40,
        [KEY] * 4,
        method("otmc"),
        rng=np.random.default_rng(0),
    )
    steps = []
    with pytest.raises(torch.OutOfMemoryError):
        for step in session:
            steps.append(step)
    assert len(steps) == 3
    texts = session.results()
    for row, text in enumerate(texts):
        assert np.array_equal(text.tokens, np.concatenate([step[row] for step in steps]))
        assert text.tokens.size == text.marked.size == text.log_probs.size == text.emitted.sum()
        assert text.seconds.size == text.nodes.size == 3
    assert_log_probs(target, PROMPTS, texts, fg.Sampling())


# ---------------------------------------------------------------- a real model

SKIPPED = [5, 12, 17, 26]
QUESTIONS = ["Describe a market.", "Write one long sentence about a lighthouse keeper at night."]


@pytest.mark.model
@pytest.mark.parametrize("tag", ["otmc", "pfr:drafts=4"])
def test_a_real_model_and_its_layers(tag: str, smollm2: LoadedModel) -> None:
    small = TransformersModel(without_layers(smollm2.model, SKIPPED), tokenizer=smollm2.tokenizer)
    sampling = fg.Sampling(temperature=0.8, top_k=50)
    prompts = [chat_prompt(smollm2, question).tolist() for question in QUESTIONS]
    texts = generate(
        TransformersModel(smollm2), small, prompts, 20, [KEY, KEY], method(tag),
        rng=np.random.default_rng(0), sampling=sampling,
    )  # fmt: skip
    for prompt, text in zip(prompts, texts, strict=True):
        laws = fresh_laws(smollm2.model, prompt, text, sampling)
        again = [
            np.log(law.probability(token))
            for law, token in zip(laws, text.tokens.tolist(), strict=True)
        ]
        np.testing.assert_allclose(text.log_probs, again, rtol=0.0, atol=2e-3)
    assert sum(int(text.emitted.sum()) for text in texts) > 1.3 * sum(
        text.emitted.size for text in texts
    )


@pytest.mark.model
def test_a_draft_of_a_real_model_takes_no_memory(smollm2: LoadedModel) -> None:
    small = without_layers(smollm2.model, SKIPPED)
    pointers = {weights.data_ptr() for weights in smollm2.model.parameters()}
    assert {weights.data_ptr() for weights in small.parameters()} < pointers
    layers = len(smollm2.model.model.layers)
    assert len(small.model.layers) == layers - 4 == small.config.num_hidden_layers
    assert smollm2.model.config.num_hidden_layers == layers
