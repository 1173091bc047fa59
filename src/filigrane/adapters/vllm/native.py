"""vLLM's own watermark with filigrane's keys: the number is derived, and travels in a file.

    write_config   a configuration file for `vllm serve --config`, readable by its owner only

`filigrane.foreign` reads such text (profiles vllm-gumbel and vllm-dual-gumbel) with the key that
derives the same number. vLLM's mark knows one key per engine, no tenants, and 64 bits.
"""

import json
import os
from typing import Any, Literal

from filigrane.errors import KeyringError
from filigrane.foreign import ForeignKey
from filigrane.foreign.vllm import VllmDualGumbel, VllmGumbel
from filigrane.keys import MarkingKey
from filigrane.private_files import new_file, why_not

Deduplicate = Literal["none", "single_turn", "all"]


def write_config(
    path: str | os.PathLike[str],
    key: MarkingKey,
    profile: VllmGumbel | VllmDualGumbel,
    *,
    deduplicate_contexts: Deduplicate = "single_turn",
) -> None:
    """Write a new file for `vllm serve --config` (YAML, of which JSON is a part).

    key: derives vLLM's number for this profile, `ForeignKey.derive(key, profile)`. profile: also
    says the width of contexts and, for two keys, alpha. The number is a secret: on a command line
    every user of the machine could read it. vLLM 0.32 and newer leave it out of their logs; older
    ones write all settings there. Raises KeyringError if the file exists or cannot be made.
    """
    numbers = ForeignKey.derive(key, profile).reveal()
    settings: dict[str, Any] = {
        "key": numbers[0],
        "algorithm": "gumbel" if isinstance(profile, VllmGumbel) else "dual_key_gumbel",
        "context_width": profile.context_width,
        "deduplicate_contexts": deduplicate_contexts,
    }
    if isinstance(profile, VllmDualGumbel):
        settings["alpha"] = profile.weight
    try:
        with new_file(path) as out:
            out.write(json.dumps({"watermark-config": settings}).encode("ascii") + b"\n")
    except OSError as error:
        raise KeyringError(f"{os.fspath(path)}: {why_not(error)}.") from None
