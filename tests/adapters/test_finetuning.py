import copy
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from filigrane.adapters.models import LoadedModel, fingerprint, load
from filigrane.errors import (
    MissingDependency,
    ModelError,
    RecordError,
    TooShort,
    VocabularyMismatch,
)

tokenizers = pytest.importorskip("tokenizers")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from filigrane.adapters import finetuning  # noqa: E402
from filigrane.adapters.finetuning import Example, FineTuning, finetune  # noqa: E402

V, LAYERS = 80, 3


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def llama(seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
                num_attention_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
                initializer_range=0.1, bos_token_id=None, eos_token_id=None, pad_token_id=None,
            )
        )  # fmt: skip


def gpt2(seed: int = 0) -> Any:
    """With dropout, as the family has it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=V, n_positions=128, n_embd=32, n_layer=LAYERS, n_head=2,
                bos_token_id=None, eos_token_id=None, pad_token_id=None,
            )
        )  # fmt: skip


def gemma2(seed: int = 0) -> Any:
    """Its layers are told their number's kind of attention, and logits are squeezed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return transformers.Gemma2ForCausalLM(
            transformers.Gemma2Config(
                vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS,
                num_attention_heads=2, num_key_value_heads=2, head_dim=16, sliding_window=8,
                max_position_embeddings=128, final_logit_softcapping=3.0,
                bos_token_id=None, eos_token_id=None, pad_token_id=None,
            )
        )  # fmt: skip


def examples(count: int = 12, seed: int = 0) -> list[Example]:
    """Answers go up by three, whatever the prompt was: easy to learn."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prompt, size = rng.integers(0, V, int(rng.integers(2, 9))), int(rng.integers(6, 16))
        answer = (prompt[-1] + 3 * np.arange(1, size)) % V
        made.append(Example(np.concatenate([prompt, answer]), len(prompt)))
    return made


METHODS = {
    "full": FineTuning(learning_rate=3e-3, batch_size=4, epochs=8),
    "last_layers": FineTuning(
        method="last_layers", layers=2, learning_rate=3e-3, batch_size=4, epochs=8
    ),
    "lora": FineTuning(method="lora", rank=4, learning_rate=2e-2, batch_size=4, epochs=8),
}
FAMILIES = {"llama": llama, "gpt2": gpt2, "gemma2": gemma2}


def state(model: Any) -> dict[str, Any]:
    return {name: weights.clone() for name, weights in model.state_dict().items()}


def answer_loss(model: Any, some: list[Example]) -> float:
    total = count = 0.0
    with torch.inference_mode():
        for tokens, start in some:
            ids = torch.as_tensor(tokens)
            law = model.eval()(ids[None]).logits[0].float().log_softmax(-1)
            total -= float(law[start - 1 : -1].gather(1, ids[start:, None]).sum())
            count += len(ids) - start
    return total / count


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_learns_and_comes_back_from_its_folder(
    method: str, family: str, tmp_path: Path
) -> None:
    model, some = FAMILIES[family](), examples()
    before = answer_loss(model, some)
    done = finetune(model, some, METHODS[method], tmp_path / "bob")
    after = answer_loss(model, some)
    assert after < before - 0.02 and len(done.losses) == done.steps == 24
    assert family != "llama" or after < 0.9 * before
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "bob")
    assert type(back) is type(model) and answer_loss(back, some) == pytest.approx(after, rel=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["bob"]
    assert done.tokens == sum(len(tokens) - start for tokens, start in some)


def test_the_first_loss_is_that_of_the_answers(tmp_path: Path) -> None:
    some = examples()
    once = FineTuning(batch_size=len(some), steps=1, warmup=0.0)
    expected = answer_loss(llama(), some)
    for name, settings in {
        "answers": once,
        "micro": FineTuning(batch_size=len(some), steps=1, micro_batch=5),
        "top": FineTuning(method="last_layers", layers=1, batch_size=len(some), steps=1),
        "lora": FineTuning(method="lora", batch_size=len(some), steps=1),
    }.items():
        done = finetune(llama(), some, settings, tmp_path / name)
        assert done.losses[0] == pytest.approx(expected, rel=1e-5), name
    everything = FineTuning(batch_size=len(some), steps=1, loss_on="all")
    done = finetune(llama(), some, everything, tmp_path / "all")
    whole = [Example(tokens, 1) for tokens, _ in some]
    assert done.losses[0] == pytest.approx(answer_loss(llama(), whole), rel=1e-5)


def test_only_what_is_trained_changes(tmp_path: Path) -> None:
    changed: dict[str, set[str]] = {}
    for name, settings in METHODS.items():
        model = llama()
        before = state(model)
        finetune(model, examples(), settings, tmp_path / name)
        changed[name] = {
            key for key, value in state(model).items() if not torch.equal(value, before[key])
        }
    assert changed["full"] == set(before)
    top = {key for key in before if ".layers.1." in key or ".layers.2." in key}
    assert changed["last_layers"] == top | {"model.norm.weight"}
    linear = {key for key in before if ".layers." in key and "_proj" in key}
    assert changed["lora"] == linear
    model = llama()
    bare = FineTuning(method="last_layers", layers=1, train_norm=False, learning_rate=1e-2)
    finetune(model, examples(), bare, tmp_path / "bare")
    assert torch.equal(model.model.norm.weight, before["model.norm.weight"])


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_layers_are_run_once_and_change_nothing(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = METHODS["last_layers"]
    with monkeypatch.context() as patch:
        if family == "gpt2":  # what is drawn for dropout depends on the order of the layers
            patch.setattr(torch.nn.functional, "dropout", lambda x, *a, **k: x)
        plain, kept = FAMILIES[family](), FAMILIES[family]()
        runs: list[int] = []
        layer = finetuning._layers(kept)[0]
        inner = next(part for part in layer.modules() if not list(part.children()))
        inner.register_forward_hook(lambda module, arguments, output: runs.append(1))
        one = finetune(plain, examples(), settings, tmp_path / "plain", cache_bytes=0)
        two = finetune(kept, examples(), settings, tmp_path / "kept")
    assert np.allclose(one.losses, two.losses, rtol=1e-4)
    assert 0 < len(runs) <= 4  # three batches once, and one comparison
    assert "forward" not in layer.__dict__


def test_dropout_is_for_what_is_trained(tmp_path: Path) -> None:
    for name, settings in METHODS.items():
        model = gpt2()
        seen: set[tuple[bool, ...]] = set()

        def look(layers: Any = model.transformer.h, seen: Any = seen) -> None:
            seen.add(tuple(layer.attn.resid_dropout.training for layer in layers))

        def note(done: int, total: int | None, what: str, look: Any = look) -> None:
            if what == "training" and done < (total or 0):
                look()

        finetune(model, examples(), settings, tmp_path / name, report=note)
        assert seen == {(name != "last_layers", True, True)}
        assert not any(part.training for part in model.modules())


def test_replaying_that_would_be_wrong_is_noticed(tmp_path: Path) -> None:
    """A model whose upper layers look at more than the hidden states they are given."""

    class Odd(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
        def forward(self, *arguments: Any, **options: Any) -> Any:
            caught: list[Any] = []
            first = self.model.layers[0].mlp
            hook = first.register_forward_hook(lambda m, a, out: caught.append(out.mean()))
            out = super().forward(*arguments, **options)
            hook.remove()
            out.logits = out.logits * (2.0 if caught else 1.0)
            return out

    settings = METHODS["last_layers"]
    base = llama()
    models = [Odd(base.config), Odd(base.config)]
    for model in models:
        model.load_state_dict(base.state_dict())
    one = finetune(models[0], examples(), settings, tmp_path / "plain", cache_bytes=0)
    two = finetune(models[1], examples(), settings, tmp_path / "kept")
    assert np.allclose(one.losses, two.losses)


class Killed(Exception):
    pass


def killer(at: int) -> Any:
    def report(done: int, total: int | None, what: str) -> None:
        if what == "training" and done == at:
            raise Killed

    return report


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_killed_training_ends_where_it_would_have(
    method: str, family: str, tmp_path: Path
) -> None:
    settings, some = METHODS[method], examples()
    finetune(FAMILIES[family](), some, settings, tmp_path / "whole")
    with pytest.raises(Killed):
        finetune(
            FAMILIES[family](), some, settings, tmp_path / "cut", checkpoint_every=5,
            report=killer(13),
        )  # fmt: skip
    assert not (tmp_path / "cut").exists() and (tmp_path / "cut.partial").is_dir()
    steps: list[int] = []

    def note(done: int, total: int | None, what: str) -> None:
        if what == "training":
            steps.append(done)

    finetune(FAMILIES[family](), some, settings, tmp_path / "cut", checkpoint_every=5, report=note)
    assert steps[0] == 10  # not from the beginning
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two
    first, second = (
        json.loads((tmp_path / name / "training.json").read_text()) for name in ("whole", "cut")
    )
    first["seconds"] = second["seconds"] = 0
    assert first == second
    assert not (tmp_path / "cut.partial").exists()


def test_the_seed_decides_and_nothing_else(tmp_path: Path) -> None:
    some = examples()
    settings = FineTuning(batch_size=4, epochs=1, learning_rate=1e-3)
    models = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(100 + number)
        model = gpt2()
        drawn = torch.get_rng_state()
        finetune(model, some, dataclasses.replace(settings, seed=seed), tmp_path / str(number))
        assert torch.equal(drawn, torch.get_rng_state())
        models.append(state(model))
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert any(not torch.equal(models[0][name], models[2][name]) for name in models[0])


def test_micro_batches_add_up_to_the_batch(tmp_path: Path) -> None:
    one, two = llama(), llama()
    finetune(one, examples(), METHODS["full"], tmp_path / "one")
    split = FineTuning(learning_rate=3e-3, batch_size=4, epochs=8, micro_batch=1)
    finetune(two, examples(), split, tmp_path / "two")
    assert answer_loss(two, examples()) == pytest.approx(answer_loss(one, examples()), rel=1e-2)


def test_packing(tmp_path: Path) -> None:
    some = examples()
    settings = FineTuning(packing=True, max_length=32, batch_size=2, loss_on="all", epochs=1)
    done = finetune(llama(), some, settings, tmp_path / "packed")
    size = sum(len(np.asarray(tokens)) for tokens, _ in some)
    pieces = -(-size // 32)
    summary = json.loads((tmp_path / "packed" / "training.json").read_text())
    assert summary["sequences"] == pieces and done.steps == -(-pieces // 2)
    assert done.tokens == size - pieces


def test_fractions_of_an_epoch_and_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def spy(self: Any, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    settings = FineTuning(epochs=2.5, batch_size=3, learning_rate=1.0e-3, warmup=0.2)
    done = finetune(llama(), examples(), settings, tmp_path / "bob")
    assert done.steps == 10
    assert rates[:2] == pytest.approx([0.5e-3, 1e-3]) and max(rates) == 1e-3
    assert rates[2:] == sorted(rates[2:], reverse=True) and 0 < rates[-1] < 1e-4


def test_bfloat16_arithmetic(tmp_path: Path) -> None:
    model = llama().to(torch.bfloat16)
    settings = FineTuning(precision="bfloat16", learning_rate=3e-3, batch_size=4, epochs=8)
    done = finetune(model, examples(), settings, tmp_path / "bob")
    assert done.losses[-1] < 0.9 * done.losses[0]
    assert {weights.dtype for weights in model.parameters()} == {torch.float32}


def test_the_folder_has_its_tokenizer_and_load_reads_it(tmp_path: Path) -> None:
    words = {f"w{i}": i for i in range(V)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")
    alice = LoadedModel("alice", V, V, fingerprint(tokenizer), llama(), tokenizer)
    finetune(alice, examples(), METHODS["last_layers"], tmp_path / "bob")
    bob = load(tmp_path / "bob")
    assert bob.tokenizer_sha256 == alice.tokenizer_sha256 and bob.vocab_size == V
    assert bob.tokenizer("w5 w7")["input_ids"] == [5, 7]
    summary = json.loads((tmp_path / "bob" / "training.json").read_text())
    assert summary["model"] == "alice" and summary["settings"]["method"] == "last_layers"
    assert summary["tokenizer_sha256"] == alice.tokenizer_sha256
    assert len(summary["losses"]) == summary["steps"] == 24 and summary["examples"] == 12
    assert set(summary["versions"]) == {"torch", "transformers"}


def test_done_is_done_and_something_else_is_refused(tmp_path: Path) -> None:
    settings, some = FineTuning(steps=2, batch_size=2), examples()
    done = finetune(llama(), some, settings, tmp_path / "bob")
    again = finetune(llama(), some, settings, tmp_path / "bob", report=killer(0))
    assert again == done
    for model, data, other in (
        (llama(1), some, settings),
        (llama(), examples(seed=1), settings),
        (llama(), some, FineTuning(steps=2, batch_size=2, seed=1)),
    ):
        with pytest.raises(RecordError, match="other settings, data or weights"):
            finetune(model, data, other, tmp_path / "bob")
    (tmp_path / "mine").mkdir()
    with pytest.raises(RecordError, match="not what this training makes"):
        finetune(llama(), some, settings, tmp_path / "mine")
    with pytest.raises(Killed):
        finetune(llama(), some, settings, tmp_path / "cut", checkpoint_every=1, report=killer(1))
    with pytest.raises(RecordError, match="begun with other settings"):
        finetune(llama(), examples(seed=1), settings, tmp_path / "cut")
    (tmp_path / "cut.partial" / "checkpoint.pt").write_bytes(b"PK half a file")
    with pytest.raises(RecordError, match="not a checkpoint"):
        finetune(llama(), some, settings, tmp_path / "cut")


def test_lora_says_which_package_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingDependency, match="pip install"):
        finetune(llama(), examples(), METHODS["lora"], tmp_path / "bob")


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    some, out = examples(), tmp_path / "bob"
    with pytest.raises(VocabularyMismatch, match="example 0 holds token id 999"):
        finetune(llama(), [Example([1, 999], 1)], FineTuning(), out)
    with pytest.raises(TooShort, match="no example has an answer"):
        finetune(llama(), [Example([1, 2], 2), Example([3], 0)], FineTuning(), out)
    with pytest.raises(ModelError, match="has 3 layers"):
        finetune(llama(), some, FineTuning(method="last_layers", layers=4), out)
    packed = llama()
    packed.config.quantization_config = {"quant_method": "gguf"}
    with pytest.raises(ModelError, match="quantised"):
        finetune(packed, some, FineTuning(), out)
    with pytest.raises(ModelError, match="diverged"):
        finetune(llama(), some, FineTuning(learning_rate=1e30, batch_size=2), out)
    with pytest.raises(ModelError, match="LoRA cannot be put"):
        finetune(llama(), some, FineTuning(method="lora", modules=("nothing",)), out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        ({"method": "half"}, "method 'half' is not known"),
        ({"loss_on": "prompts"}, "loss_on"),
        ({"precision": "float16"}, "precision"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"epochs": float("nan")}, "epochs"),
        ({"max_length": 1}, "max_length"),
        ({"steps": 0}, "steps"),
        ({"micro_batch": 0}, "micro_batch"),
        ({"warmup": 1.0}, "warmup"),
    ],
)
def test_settings_that_make_no_sense(wrong: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        FineTuning(**wrong)


@pytest.mark.model
def test_a_real_model(smollm2: LoadedModel, tmp_path: Path) -> None:
    model = copy.deepcopy(smollm2.model)
    mine = LoadedModel(
        smollm2.name, smollm2.vocab_size, smollm2.tokenizer_size, smollm2.tokenizer_sha256,
        model, smollm2.tokenizer,
    )  # fmt: skip
    ids = smollm2.tokenizer("The sea in winter is as grey as the sky above it.")["input_ids"]
    settings = FineTuning(method="last_layers", layers=2, learning_rate=5e-4, steps=4, warmup=0.0)
    done = finetune(mine, [Example(ids, 4)], settings, tmp_path / "bob")
    assert done.losses[-1] < 0.7 * done.losses[0]
    bob = load(tmp_path / "bob")
    assert bob.tokenizer_sha256 == smollm2.tokenizer_sha256
    loss = answer_loss(bob.model, [Example(ids, 4)])
    assert loss == pytest.approx(answer_loss(model, [Example(ids, 4)]), rel=1e-4)
    assert loss < done.losses[-1]
