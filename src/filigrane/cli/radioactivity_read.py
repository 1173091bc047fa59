"""filigrane radioactivity read."""

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from filigrane.cli import render
from filigrane.cli.options import Json, SchemeTag
from filigrane.cli.radioactivity_inputs import Context, MarkedText, Texts, described, each
from filigrane.errors import FiligraneError
from filigrane.schemes import from_tag

if TYPE_CHECKING:
    from filigrane.adapters.evidence import ReadingFolder
    from filigrane.radioactivity.evidence import Reading

_SUSPECT = "Suspect (a model, or an endpoint with its model's name)"


def read(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="TEXTS",
            help="JSON Lines of marked texts, as `filigrane embed` writes them.",
            show_default=False,
        ),
    ],
    scheme: SchemeTag,
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="Folder for the reading: new, or of the same settings, to go on with it.",
            show_default=False,
        ),
    ],
    suspect: Annotated[
        str | None,
        typer.Option(
            "--suspect",
            metavar="MODEL",
            help="smollm2, a .gguf file, a transformers folder or a hub id.",
            rich_help_panel=_SUSPECT,
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base",
            metavar="MODEL",
            help="The model it is presumed to be trained from: the test becomes many times "
            "stronger. A wrong one costs power, never validity; choose it before looking.",
            rich_help_panel=_SUSPECT,
            show_default=False,
        ),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            "--endpoint",
            metavar="URL",
            help="Instead of --suspect: an OpenAI-compatible server that gives log-probabilities "
            "of prompts (vLLM, or completions with echo).",
            rich_help_panel=_SUSPECT,
            show_default=False,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="NAME",
            help="What the endpoint calls the suspect.",
            rich_help_panel=_SUSPECT,
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="NAME",
            help="What the endpoint calls the base model, if it serves that too.",
            rich_help_panel=_SUSPECT,
            show_default=False,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            "-t",
            metavar="MODEL",
            help="Of the model that wrote the texts; the suspect's own if not given. If the two "
            "differ, the suspect's law is carried over where token borders meet.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help="The prompts, for records that hold only their hash.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        Context,
        typer.Option(
            "--context",
            help="What the suspect sees before each text: the writer's prompt, or nothing. "
            "Windows of the prompt are never scored either way.",
        ),
    ] = "prompt",
    api_key_file: Annotated[
        str | None,
        typer.Option(
            "--api-key-file",
            metavar="PATH",
            help="Key of the endpoint; else FILIGRANE_API_KEY, or none.",
            rich_help_panel=_SUSPECT,
            show_default=False,
        ),
    ] = None,
    top: Annotated[
        int | None,
        typer.Option(
            "--top",
            min=1,
            help="Tokens kept per position: 64, or 18 of an endpoint, where 20 is a usual limit.",
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, help="Texts read at a time.")
    ] = 8,
    device: Annotated[str, typer.Option("--device", help="Where models run.")] = "cpu",
    dtype: Annotated[
        Literal["float32", "bfloat16"] | None,
        typer.Option("--dtype", help="The checkpoint's own if not given.", show_default=False),
    ] = None,
    json: Json = False,
) -> None:
    """Read marked texts with a suspect: what does it expect after each window?

    No key is needed. The same command goes on with a reading that was stopped. `radioactivity
    test` then tests the folder.

    Exit codes: 0 read; 2 bad usage, or models, texts and tokenizers that do not fit; 130
    interrupted (what was read is kept).
    """
    chosen = from_tag(scheme)
    width = chosen.context_width
    if (suspect is None) == (endpoint is None):
        raise FiligraneError("name one suspect: --suspect MODEL, or --endpoint URL --model NAME.")
    if endpoint is not None and (model is None or tokenizer is None or base is not None):
        raise FiligraneError(
            "--endpoint takes --model NAME, the --tokenizer of the texts, and for a base model "
            "--base-model NAME on the same endpoint."
        )
    from filigrane.adapters.evidence import ReadingFolder
    from filigrane.adapters.models import load_tokenizer

    writer = load_tokenizer(tokenizer or str(suspect))
    reader = Texts(writer, prompts, chosen)
    texts: list[MarkedText] = []
    inputs = []
    for path in each(files):
        found = reader.read(path)
        inputs.append(described(path, len(found), "texts").as_json())
        texts += found
    settings: dict[str, Any] = {
        "inputs": inputs,
        "width": width,
        "context": context,
        "top": top or (64 if endpoint is None else 18),
        "key_fingerprints": sorted({t.key_fingerprint for t in texts if t.key_fingerprint}),
        "encoded": sum(text.encoded for text in texts),
        "writer": {"name": writer.name, "tokenizer_sha256": writer.tokenizer_sha256},
    }
    folder = ReadingFolder(out)
    if endpoint is None:
        where = {"device": device, "dtype": dtype}
        names = (str(suspect), base)
        parts = _from_model(texts, writer, folder, settings, names, batch_size, where)
    else:
        asked = (str(model), base_model)
        parts = _from_endpoint(texts, writer, folder, settings, endpoint, asked, api_key_file)
    try:
        with render.progress("texts") as report:
            for after, reading in parts:
                folder.add(reading, after)
                report(after, len(texts), out)
    except BaseException:
        render.notice(f"what was read is safe in {out}; the same command continues from there")
        raise
    reading = folder.load()
    document = {
        "command": "radioactivity read",
        "out": out,
        "texts": len(texts),
        "positions": len(reading),
        "ledger": reading.ledger,
        "notes": folder.notes,
    }
    if json:
        render.dump(document | folder.settings)
        return
    out_ = render.stdout()
    out_.print(render.facts({rule: str(count) for rule, count in reading.ledger.items()}))
    render.notice(
        f"{len(texts)} texts read into {out}; next: filigrane radioactivity test {out} "
        f"--scheme {chosen.tag} --key-file KEY"
    )


def _documents(texts: list[MarkedText], context: Context, kind: Any) -> list[Any]:
    """kind: the class Document, which is imported late."""
    import numpy as np

    made = []
    for text in texts:
        prompt = text.prompt
        if prompt is None:
            made.append(kind(tokens=text.tokens, start=0))
        elif context == "prompt":
            joined = np.concatenate([prompt, text.tokens])
            made.append(kind(tokens=joined, start=prompt.shape[0]))
        else:
            made.append(kind(tokens=text.tokens, start=0, earlier=(prompt,)))
    return made


def _from_model(
    texts: list[MarkedText],
    writer: Any,
    folder: "ReadingFolder",
    settings: dict[str, Any],
    models: tuple[str, str | None],
    batch_size: int,
    where: dict[str, Any],
) -> "Iterator[tuple[int, Reading]]":
    """Readings of what the folder lacks, each with the number of documents done after it."""
    from filigrane.adapters.alignment import Alignment
    from filigrane.adapters.models import load, weights_sha256
    from filigrane.adapters.reading import read as run
    from filigrane.radioactivity.evidence import Document

    suspect, base = models
    render.notice(f"loading {suspect}" + (f" and {base}" if base else ""))
    one = load(suspect, **where)
    two = None if base is None else load(base, **where)

    def facts(loaded: Any) -> dict[str, Any]:
        return {
            "name": loaded.name,
            "access": "open",
            "vocab_size": loaded.vocab_size,
            "tokenizer_sha256": loaded.tokenizer_sha256,
            "weights_sha256": weights_sha256(loaded.model),
            "endpoint": None,
        }

    about: dict[str, Any] = {"suspect": facts(one), "base": None if two is None else facts(two)}
    if about["base"] and about["base"]["weights_sha256"] == about["suspect"]["weights_sha256"]:
        raise FiligraneError(
            "suspect and base model are the same model: nothing has changed between them. Name the "
            "model that the suspect is presumed to be trained from, or none."
        )
    documents = _documents(texts, settings["context"], Document)
    vocab_size = max((text.vocab_size or 0 for text in texts), default=0) or None
    alignment = None
    if writer.tokenizer_sha256 != one.tokenizer_sha256:
        alignment = Alignment(writer, one, vocab_size=vocab_size)
        # All of them, also those that were read before: what is counted is the whole.
        alignment.require([document.tokens for document in documents])
    first = folder.begin(settings | about | {"aligned": alignment is not None})
    after = first
    for reading in run(
        one,
        documents[first:],
        settings["width"],
        base=two,
        alignment=alignment,
        vocab_size=vocab_size,
        tokenizer_sha256=writer.tokenizer_sha256,
        top=settings["top"],
        batch_size=batch_size,
        first=first,
    ):
        after = min(after + batch_size, len(documents))
        yield after, reading
    if alignment is not None:
        found = alignment.summary()
        folder.note(
            "alignment",
            {"rate": found.rate, "mass": found.mass, "refuse_below": alignment.limit},
        )


def _from_endpoint(
    texts: list[MarkedText],
    writer: Any,
    folder: "ReadingFolder",
    settings: dict[str, Any],
    url: str,
    models: tuple[str, str | None],
    key_file: str | None,
) -> "Iterator[tuple[int, Reading]]":
    from contextlib import ExitStack

    from filigrane.adapters.endpoints import (
        Endpoint,
        read_api_key,
        read_endpoint,
        token_strings,
    )
    from filigrane.radioactivity.evidence import Document

    with ExitStack() as stack:
        key = read_api_key(url, key_file)

        def open_(name: str | None) -> Any:
            if name is None:
                return None
            made = Endpoint(url, name, api="completions", key=key, jitter=random.random)
            return stack.enter_context(made)

        one, two = open_(models[0]), open_(models[1])

        def facts(name: str | None) -> dict[str, object] | None:
            return name and {  # type: ignore[return-value]
                "name": name,
                "access": "semi-open",
                "vocab_size": None,
                "tokenizer_sha256": None,
                "weights_sha256": None,
                "endpoint": one.url,
            }

        settings |= {"suspect": facts(models[0]), "base": facts(models[1]), "aligned": False}
        documents = _documents(texts, settings["context"], Document)
        after = folder.begin(settings)
        for reading in read_endpoint(
            one,
            documents[after:],
            settings["width"],
            vocab_size=writer.tokenizer_size,
            base_endpoint=two,
            top=settings["top"],
            vocabulary=token_strings(writer.tokenizer),
            first=after,
        ):
            after += 1
            yield after, reading
