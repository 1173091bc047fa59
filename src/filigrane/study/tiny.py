"""A transformer from nothing: small enough to train many of them, real enough to be one.

The source and the writer are those of `radioactivity.ngram`; Bob is a Llama of two layers that was
trained on unmarked text first, and then tuned on text of which a share rho is marked. All four
settings, in a minute on a processor. Knows nothing of terminals.
"""

import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from filigrane.adapters.finetuning import FineTuning, finetune
from filigrane.adapters.reading import read
from filigrane.adapters.transformers import TransformersModel
from filigrane.embedding import embed_batch
from filigrane.errors import MissingDependency
from filigrane.keys import Key
from filigrane.radioactivity import (
    Document,
    Exchange,
    Reading,
    Tuples,
    Weighted,
    answers,
    argmax,
    differential,
    soft,
    testing,
)
from filigrane.radioactivity.ngram import Source, Texts, marked
from filigrane.schemes.base import Scheme

try:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
except ImportError as error:
    raise MissingDependency(
        "this trains a small transformer: pip install 'filigrane[transformers]'"
    ) from error

LENGTH: Final = 96
_PROMPT: Final = 8
_FIRST: Final = FineTuning(learning_rate=4e-3, epochs=3, batch_size=16, loss_on="all")
_SECOND: Final = FineTuning(learning_rate=1e-3, epochs=2, batch_size=16, loss_on="all")


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """One seed: a source, Alice's key and texts, and the base model Bob begins from.

    logged, fresh: (n, LENGTH) marked texts, plain: unmarked ones; base: the model.
    """

    seed: int
    source: Source
    scheme: Scheme
    key: Key
    logged: Texts
    fresh: Texts
    plain: Texts
    base: Any = dataclasses.field(repr=False)


def world(seed: int, scheme: Scheme, *, vocab_size: int = 256, texts: int = 400) -> World:
    """Write the texts and train the base model on other ones of the same source."""
    rng = np.random.default_rng(seed)
    source = Source.draw(vocab_size, rng, successors=16)
    key = Key.generate(f"alice-{seed}", slots=1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=96,
                intermediate_size=192,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=256,
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    return World(
        seed=seed,
        source=source,
        scheme=scheme,
        key=key,
        logged=marked(source, texts, LENGTH, key, scheme, rng),
        fresh=marked(source, 100, LENGTH, key, scheme, rng),
        plain=source.write(texts, LENGTH, rng),
        base=_trained(model, source.write(texts, LENGTH, rng), _FIRST),
    )


def bob(here: World, rho: float) -> Any:
    """The base model, tuned on data of which the share rho is Alice's marked text."""
    n = here.plain.shape[0]
    count = round(rho * n)
    data = np.concatenate([here.logged[:count], here.plain[: n - count]])
    data = np.random.default_rng([here.seed, 1]).permutation(data)
    twin = LlamaForCausalLM(here.base.config)
    twin.load_state_dict(here.base.state_dict())
    return _trained(twin, data, dataclasses.replace(_SECOND, seed=here.seed))


def _trained(model: Any, texts: Texts, how: FineTuning) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        # Trained in place; the folder that it also leaves is not needed.
        finetune(model, [(text, 0) for text in texts], how, Path(folder) / "m", checkpoint_every=0)
    return model.eval()


def reading(here: World, suspect: Any, texts: Texts) -> Reading:
    """Read texts with a suspect and the base model."""
    documents = [Document(tokens=text, start=0) for text in texts]
    width = here.scheme.context_width
    return Reading.join(list(read(suspect, documents, width, base=here.base, batch_size=50)))


def asked(here: World, suspect: Any, prompts: Texts, length: int = LENGTH) -> list[Exchange]:
    """What a suspect says after prompts, (n, p)."""
    written = embed_batch(
        TransformersModel(suspect),
        list(prompts),
        length,
        [None] * prompts.shape[0],
        here.scheme,
        rng=np.random.default_rng([here.seed, 2]),
    )
    return [
        Exchange(prompt=prompt, answer=text.tokens)
        for prompt, text in zip(prompts, written, strict=True)
    ]


def settings(here: World, suspect: Any) -> dict[str, Tuples | Weighted]:
    """The evidence of all four settings, by name."""
    found: dict[str, Tuples | Weighted] = {}
    width = here.scheme.context_width
    for name, texts in (("supervised", here.logged[:100]), ("unsupervised", here.fresh)):
        seen = reading(here, suspect, texts)
        found[f"open, {name}: argmax"] = argmax(seen)
        found[f"open, {name}: soft"] = soft(seen)
        found[f"open, {name}: differential"] = differential(seen)
        said = asked(here, suspect, texts[:, :_PROMPT])
        found[f"closed, {name}"] = answers(said, width)
    return found


def trial(
    here: World, rho: float, report: Callable[[str], None] | None = None
) -> list[dict[str, Any]]:
    """Train one Bob and test him in every setting; rows as those of a study."""
    if report is not None:
        report(f"seed {here.seed}, rho {rho:g}")
    suspect = bob(here, rho)
    rows = []
    for name, evidence in settings(here, suspect).items():
        found = testing.test(evidence, here.key, here.scheme, decoys=0)
        rows.append(
            {
                "setting": name.partition(":")[0],
                "statistic": found.statistic,
                "seed": here.seed,
                "rho": rho,
                "n_scored": found.n_scored,
                "n_windows": found.n_windows,
                "z": found.z,
                "log10_pvalue": found.log10_pvalue,
            }
        )
    return rows
