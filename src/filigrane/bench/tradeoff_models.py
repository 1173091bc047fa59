"""Target, draft and encoded prompts of a run, from the names that its settings give them.

What a draft may be called: `adapters.drafts`. Knows nothing of keys or methods.
"""

from collections.abc import Sequence
from typing import Any, cast

from filigrane.adapters.models import weights_sha256
from filigrane.bench.tradeoff import Models, Prompt, Settings
from filigrane.errors import FiligraneError


def load_models(settings: Settings, prompts: Sequence[Prompt]) -> Models:
    """Load what the settings name. Raises ModelError, DraftError or MissingDependency."""
    from filigrane.adapters.drafts import check_draft, load_draft
    from filigrane.adapters.models import DType, chat_prompt, load
    from filigrane.adapters.transformers import TransformersModel

    check_draft(settings.draft)
    dtype = cast("DType | None", settings.dtype)
    loaded = load(settings.target, dtype=dtype, device=settings.device)
    target = TransformersModel(loaded)
    facts: dict[str, object] = {"target": _facts(loaded)}
    draft = load_draft(settings.draft, loaded, dtype=dtype, device=settings.device)
    if draft.loaded is not None:
        facts["draft"] = _facts(draft.loaded)
    encoded = [chat_prompt(loaded, prompt.text) for prompt in prompts]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids.size:
            raise FiligraneError(f"prompt {prompt.id!r} has no tokens; say what is to be written.")
    # A chat model ends its turn with a token that its tokenizer knows and its weights may not.
    ends = {loaded.tokenizer.eos_token_id, *target.stop_ids} - {None}
    facts["stop"] = sorted(ends)
    return Models(
        target=target,
        draft=draft.source,
        prompts=encoded,
        stop=tuple(sorted(ends)),
        facts=facts,
        device=_device(settings.device),
    )


def _device(name: str) -> str:
    """The graphics card, if it is one that can say its name."""
    import torch

    return str(torch.cuda.get_device_name(name)) if name.startswith("cuda") else name


def _facts(loaded: Any) -> dict[str, object]:
    parameters = list(loaded.model.parameters())
    return {
        "name": loaded.name,
        "vocab_size": loaded.vocab_size,
        "tokenizer_sha256": loaded.tokenizer_sha256,
        "parameters": sum(weights.numel() for weights in parameters),
        "dtype": str(parameters[0].dtype).removeprefix("torch."),
        "weights_sha256": weights_sha256(loaded.model),
    }
