"""filigrane engine triton-repository."""

from pathlib import Path
from typing import Annotated

import typer

from filigrane.cli import render
from filigrane.cli.options import Json


def triton_repository(
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="The model repository, new or with other models.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="smollm2, a .gguf file, a transformers folder or a hub id; loaded by the server.",
            show_default=False,
        ),
    ],
    keyring: Annotated[
        str | None,
        typer.Option(
            "--keyring",
            metavar="DIR",
            help="Folder with keyring.toml and the key files, as the server sees it. Else the "
            "server's FILIGRANE_KEYRING is used.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[
        str, typer.Option("--name", help="What Triton and its clients call the model.")
    ] = "filigrane",
    gpu: Annotated[
        bool, typer.Option("--gpu", help="An instance on each GPU, instead of the processor.")
    ] = False,
    max_rows: Annotated[
        int, typer.Option("--max-rows", min=1, help="Requests that are written together.")
    ] = 16,
    delay: Annotated[
        int,
        typer.Option(
            "--delay", metavar="MS", min=0, help="Milliseconds that Triton waits for more of them."
        ),
    ] = 20,
    max_answer: Annotated[
        int, typer.Option("--max-answer", min=1, help="Most tokens of an answer.")
    ] = 4096,
    json: Json = False,
) -> None:
    """Write a model repository for NVIDIA's Triton Inference Server that marks what it writes.

    Nothing is read but these options, and nothing is overwritten.

    Exit codes: 0 written, 2 not written.
    """
    from filigrane.adapters.tritonserver.repository import Deployment, write_repository

    deployment = Deployment(
        name=name,
        model=model,
        keyring=keyring,
        gpu=gpu,
        rows=max_rows,
        delay_us=delay * 1000,
        max_answer=max_answer,
    )
    home = write_repository(out, deployment)
    if json:
        render.dump({"folder": str(home), "name": name, "model": model, "keyring": keyring})
        return
    render.stdout().print(render.facts({"model": name, "written to": str(home)}))
    render.notice(f"tritonserver --model-repository {Path(out).resolve()}")
