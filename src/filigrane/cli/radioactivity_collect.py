"""filigrane radioactivity collect."""

import os
import random
import sys
from typing import TYPE_CHECKING, Annotated, Literal
from urllib.parse import urlsplit

import typer

from filigrane.cli import records, render
from filigrane.cli.options import Form, Format, Json
from filigrane.cli.records import Problem
from filigrane.cli.secrets import looks_like_key
from filigrane.errors import FiligraneError, RecordError

if TYPE_CHECKING:
    from filigrane.adapters.collecting import Collected, Prompt
    from filigrane.adapters.endpoints import Endpoint, Parameters

_SAMPLING = "Sampling"
_BUDGET = "Budget and pace"
_SHOWN = 20
_LOOPBACK = ("localhost", "127.0.0.1", "::1")


def collect(
    endpoint: Annotated[
        str,
        typer.Option(
            "--endpoint",
            metavar="URL",
            help="Address of an OpenAI-compatible server, e.g. http://localhost:8000/v1.",
            show_default=False,
        ),
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model", "-m", metavar="NAME", help="What the server calls it.", show_default=False
        ),
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="JSON Lines file to append to; what is answered in it already is not asked again.",
            show_default=False,
        ),
    ],
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts",
            metavar="FILE",
            help='One prompt a line, or JSON Lines with "prompt" and perhaps "id" and "system"; '
            "- or nothing reads stdin.",
            show_default=False,
        ),
    ] = None,
    form: Format = "auto",
    api: Annotated[
        Literal["chat", "completions"],
        typer.Option("--api", help="chat asks; completions lets the prompt itself go on."),
    ] = "chat",
    system: Annotated[
        str | None,
        typer.Option(
            "--system",
            metavar="TEXT",
            help="System prompt of prompts that have none of their own.",
            show_default=False,
        ),
    ] = None,
    api_key_file: Annotated[
        str | None,
        typer.Option(
            "--api-key-file",
            metavar="PATH",
            help="File with the API key. Else FILIGRANE_API_KEY is used, and OPENAI_API_KEY for "
            "OpenAI's own hosts.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int,
        typer.Option("--max-tokens", "-n", min=1, help="Per answer.", rich_help_panel=_SAMPLING),
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, rich_help_panel=_SAMPLING)
    ] = 0.8,
    top_p: Annotated[
        float, typer.Option("--top-p", help="1 is off.", rich_help_panel=_SAMPLING)
    ] = 0.95,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            min=0,
            help="Prompt number n is asked with seed + n; the server's choice if not given.",
            rich_help_panel=_SAMPLING,
            show_default=False,
        ),
    ] = None,
    top_logprobs: Annotated[
        int,
        typer.Option(
            "--top-logprobs",
            min=0,
            help="Also keep so many log-probabilities per token of an answer.",
            rich_help_panel=_SAMPLING,
        ),
    ] = 0,
    max_requests: Annotated[
        int | None,
        typer.Option(
            "--max-requests",
            metavar="N",
            min=1,
            help="Stop this run after N requests, tries that failed included.",
            rich_help_panel=_BUDGET,
            show_default=False,
        ),
    ] = None,
    max_output_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-output-tokens",
            metavar="N",
            min=1,
            help="Begin no request of this run that could go beyond N tokens written in all.",
            rich_help_panel=_BUDGET,
            show_default=False,
        ),
    ] = None,
    requests_per_minute: Annotated[
        float | None,
        typer.Option(
            "--requests-per-minute",
            metavar="N",
            min=0.001,
            rich_help_panel=_BUDGET,
            show_default=False,
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option("--concurrency", min=1, help="At a time.", rich_help_panel=_BUDGET)
    ] = 4,
    timeout: Annotated[
        float,
        typer.Option("--timeout", min=0.1, help="Seconds for one answer.", rich_help_panel=_BUDGET),
    ] = 120.0,
    retries: Annotated[
        int,
        typer.Option("--retries", min=0, help="Tries after the first.", rich_help_panel=_BUDGET),
    ] = 6,
    json: Json = False,
) -> None:
    """Ask a suspect behind a network address, and keep its answers before anything is tested.

    Answers are appended to --out one by one as they come; the same command goes on with a run that
    was stopped, for whatever reason. How they were drawn stands beside them in FILE.run.json, and
    other settings are refused. Busy or failing servers are asked again after a while, or after as
    long as they say; a server whose model changes ends the run.

    Exit codes: 0 every prompt has an answer; 2 bad usage, or the endpoint cannot be used; 3 some
    prompts have none (they could not be read, the endpoint did not answer them, or the budget is
    spent), the others do; 130 interrupted. In all cases what was collected stays.
    """
    if out == "-":
        raise FiligraneError("--out takes a file: answers are kept before they are used.")
    if not os.path.isdir(folder := os.path.dirname(out) or "."):
        raise FiligraneError(f"{out}: there is no folder {folder}; make it first.")
    if system is not None and api == "completions":
        raise FiligraneError(
            "--api completions knows no system prompt; drop --system, or write it into the prompts."
        )
    from filigrane.adapters.endpoints import Budget, Endpoint, Parameters, read_api_key

    parameters = Parameters(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        top_logprobs=top_logprobs,
    )
    key = read_api_key(endpoint, api_key_file)
    asked, problems = _prompts(prompts, form, system, turns=api == "chat")
    with Endpoint(
        endpoint,
        model,
        api=api,
        key=key,
        timeout=timeout,
        retries=retries,
        requests_per_minute=requests_per_minute,
        jitter=random.random,
        budget=Budget(max_requests, max_output_tokens),
    ) as suspect:
        place = urlsplit(suspect.url)
        if key is not None and place.scheme == "http" and place.hostname not in _LOOPBACK:
            render.warn(f"the API key goes to {place.hostname} unencrypted (http)")
        done = _ask(suspect, asked, out, parameters, concurrency)
    if json:
        render.dump(
            {
                "command": "radioactivity collect",
                "out": out,
                "endpoint": suspect.url,
                "model": done.model,
                "written": done.written,
                "skipped": done.skipped,
                "left": done.left,
                "cut": done.cut,
                "without_tokens": done.without_tokens,
                "requests": done.requests,
                "output_tokens": done.output_tokens,
                "failures": [{"id": each.id, "message": each.message} for each in done.failures],
                "errors": [problem.as_json() for problem in problems],
            }
        )
    else:
        _say(done, out)
    if problems or not done.complete:
        raise typer.Exit(3)


# ---------------------------------------------------------------- prompts


def _prompts(
    path: str | None, form: Form, system: str | None, *, turns: bool
) -> "tuple[list[Prompt], list[Problem]]":
    from filigrane.adapters.collecting import Prompt

    if path is None and sys.stdin.isatty():
        raise FiligraneError("no prompts: use --prompts FILE, or pipe them in.")
    found: list[Prompt] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    # Numbers count what could not be read too: mending a line does not move the others.
    for number, item in enumerate(records.read([path or "-"], form, plain="prompt", by_line=True)):
        checked = item if isinstance(item, Problem) else _prompt(number, item, system, turns)
        if isinstance(checked, Prompt) and checked.id in seen:
            assert not isinstance(item, Problem)
            checked = Problem(item.place, '"id" is that of an earlier prompt')
        if isinstance(checked, Problem):
            render.warn(str(checked))
            problems.append(checked)
        else:
            seen.add(checked.id)
            found.append(checked)
    if not found:
        raise RecordError("no prompt could be read; what was wrong with each is said above.")
    return found, problems


def _prompt(
    number: int, record: records.Record, system: str | None, turns: bool
) -> "Prompt | Problem":
    from filigrane.adapters.collecting import Prompt

    name = records.name_field(record)
    text = records.text_field(record, "prompt")
    own = records.text_field(record, "system")
    if isinstance(name, Problem):
        return name
    if isinstance(text, Problem):
        return text
    if isinstance(own, Problem):
        return own
    if text is None or not text.strip():
        return Problem(record.place, 'has no "prompt"')
    if own is not None and not turns:
        return Problem(record.place, 'has a "system" prompt; --api completions knows none')
    if looks_like_key(text) or looks_like_key(own or ""):
        return Problem(record.place, "holds the text of a key; it is not sent to anybody")
    return Prompt(
        id=str(number if name is None else name),
        text=text,
        system=system if own is None else own,
        number=number,
    )


# ---------------------------------------------------------------- asking


def _ask(
    suspect: "Endpoint",
    prompts: "list[Prompt]",
    out: str,
    parameters: "Parameters",
    concurrency: int,
) -> "Collected":
    from filigrane.adapters.collecting import collect as run

    try:
        with render.progress("prompts") as report:
            return run(
                suspect,
                prompts,
                out,
                parameters,
                concurrency=concurrency,
                report=report,
                notice=render.notice,
            )
    except BaseException:
        if os.path.exists(out) and os.path.getsize(out):
            render.notice(
                f"what was collected is safe in {out}; the same command continues from there"
            )
        raise


def _say(done: "Collected", out: str) -> None:
    """How it went, in a few lines on stderr."""
    for failure in done.failures[:_SHOWN]:
        render.warn(f"prompt {failure.id}: {failure.message}")
    if len(done.failures) > _SHOWN:
        render.warn(f"and {len(done.failures) - _SHOWN} more prompts without an answer")
    if not done.written and not done.skipped:
        render.notice(f"no answers were written to {out}; check the address and the model's name")
        return
    answers = "answer" if done.written == 1 else "answers"
    before = f", {done.skipped} were there already" if done.skipped else ""
    render.notice(f"{done.written} {answers} of {done.model} written to {out}{before}")
    if done.cut:
        render.notice(f"{done.cut} of them end at --max-tokens, which does no harm")
    if done.without_tokens:
        render.notice(
            f"{done.without_tokens} of them came without token ids; `test` will re-tokenise their "
            "text (--tokenizer)"
        )
    if done.left:
        render.warn(
            f"{done.left} prompts were not asked: the budget is spent ({done.requests} requests, "
            f"{done.output_tokens} tokens); the same command continues from there"
        )
