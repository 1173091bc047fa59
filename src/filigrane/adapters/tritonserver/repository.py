"""Writes a model repository for Triton: config.pbtxt and model.py.

What model.py does is in the installed package, so that an upgrade needs no new repository. Knows
nothing of models and keys: they are named, not read.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from filigrane.adapters.tritonserver.tensors import INPUTS, OUTPUTS
from filigrane.errors import FiligraneError

_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_MODEL: Final = '''"""Marked text; what it does is in the installed package filigrane."""

from filigrane.adapters.tritonserver.backend import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What config.pbtxt says.

    name: of the model in Triton; model: what `adapters.models.load` takes; keyring: folder, None
    leaves it to FILIGRANE_KEYRING; gpu: an instance on each GPU instead of one on the processor;
    rows: most requests that are written together; delay_us: how long Triton waits for more of them,
    in microseconds; max_answer: most tokens of an answer.
    """

    name: str = "filigrane"
    model: str
    keyring: str | None = None
    gpu: bool = False
    rows: int = 16
    delay_us: int = 20_000
    max_answer: int = 4096


def write_repository(folder: str | Path, deployment: Deployment) -> Path:
    """Write the model into a repository, new or not; returns the model's folder.

    Raises FiligraneError if it is there already: nothing is overwritten.
    """
    if not _NAME.fullmatch(deployment.name):
        raise FiligraneError(
            f"{deployment.name!r} is no name for a model of Triton: use letters, digits, _ . -"
        )
    home = Path(folder) / deployment.name
    if home.exists():
        raise FiligraneError(f"{home} exists; remove it, or name another folder or model.")
    version = home / "1"
    version.mkdir(parents=True)
    (home / "config.pbtxt").write_text(config(deployment), "utf-8")
    (version / "model.py").write_text(_MODEL, "utf-8")
    return home


def config(deployment: Deployment) -> str:
    """The text of config.pbtxt."""
    parameters = {
        "model": deployment.model,
        "max_answer": str(deployment.max_answer),
        "FORCE_CPU_ONLY_INPUT_TENSORS": "yes",
    }
    if deployment.keyring is not None:
        parameters["keyring"] = deployment.keyring
    lines = [
        f"name: {_quoted(deployment.name)}",
        'backend: "python"',
        f"max_batch_size: {deployment.rows}",
        "dynamic_batching {",
        f"  max_queue_delay_microseconds: {deployment.delay_us}",
        "}",
        f"instance_group [{{ count: 1, kind: {'KIND_GPU' if deployment.gpu else 'KIND_CPU'} }}]",
    ]
    for name, value in parameters.items():
        lines += [
            "parameters {",
            f"  key: {_quoted(name)}",
            f"  value: {{ string_value: {_quoted(value)} }}",
            "}",
        ]
    for name, kind in INPUTS.items():
        # Prompts of different lengths would otherwise not be batched.
        form = "dims: [-1], allow_ragged_batch: true" if name == "input_ids" else "dims: [1]"
        lines.append(
            f"input {{ name: {_quoted(name)}, data_type: TYPE_{kind}, {form}, optional: true }}"
        )
    for name, kind in OUTPUTS.items():
        dims = -1 if name == "output_ids" else 1
        lines.append(f"output {{ name: {_quoted(name)}, data_type: TYPE_{kind}, dims: [{dims}] }}")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A string as protobuf's text format writes it."""
    if not text.isprintable():
        raise FiligraneError(f"{text!r} cannot be written into config.pbtxt.")
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
