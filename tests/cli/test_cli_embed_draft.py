"""filigrane embed --draft, on toy models: methods, drafts, records, resuming, refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

import filigrane as fg
from filigrane import speculative
from filigrane.cli.embed_drafts import DRAFT_LENGTH

TOY = ("--model", "toy", "--max-new-tokens", "60", "--seed", "1")
KEY = (*TOY, "--scheme", "gumbel", "--key-file", "acme.key")
ONE = ("--prompt", "tell me more")


@pytest.fixture(autouse=True)
def _endless(monkeypatch: Any) -> None:
    """Keys are fresh in every run, and no text is to be short by chance."""
    monkeypatch.setattr("clikit.ToyLM.stop_ids", ())
    monkeypatch.setattr("clikit.ToyTokenizer.eos_token_id", None)


def rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize(
    ("scheme", "draft", "options", "named"),
    [
        ("gumbel", "small", (), "otmc"),
        ("gumbel", "skip:1,2", ("--draft-length", "64"), "otmc"),
        ("gumbel", "ngram", ("--method", "mws"), "mws"),
        ("gumbel", "small", ("--method", "skt", "--draft-length", "1"), "skt"),
        ("gumbel", "small", ("--method", "bv-skt"), "bv-skt"),
        ("gumbel", "small", ("--method", "pfr"), "pfr:drafts=2"),
        ("gumbel", "small", ("--method", "pfr:drafts=4"), "pfr:drafts=4"),
        ("gumbel:context_width=2", "small", ("--method", "frontier:c=2"), "frontier:c=2.0"),
        ("tournament", "small", ("--method", "mws"), "mws"),
        ("gumbel", "ngram", ("--method", "mse"), "mse"),
    ],
)
def test_the_ordinary_detector_finds_what_drafts_wrote(
    run: Any,
    toy: Any,
    world: Any,
    scheme: str,
    draft: str,
    options: tuple[str, ...],
    named: str,
) -> None:
    Path("p.txt").write_text("one\ntwo words\nthree\n")
    where = ("-s", scheme, "-k", "acme.key", "--user", "7")
    done = run(
        *("embed", *TOY, *where, "--draft", draft, *options),
        *("--prompts", "p.txt", "--out", "o.jsonl", "-n", "150"),
    )
    assert done.code == 0, done.err
    for row in rows("o.jsonl"):
        assert speculative.method(row["method"]).name == speculative.method(named).name
        assert row["method"] == named and row["draft"] == draft
        assert row["scheme"] == fg.from_tag(scheme).tag and row["key"] == "acme/7"
        found = fg.detect(row["tokens"], world.key.user(7), fg.from_tag(scheme))
        assert row["n_marked"] == found.n_scored
    assert run("detect", *where, "o.jsonl", "--joint").code == 0
    others = ("-s", scheme, "-k", "acme.key", "--user", "8")
    assert run("detect", *others, "o.jsonl", "--joint").code == 1


def test_a_record_says_how_it_was_drafted(run: Any, toy: Any) -> None:
    assert "method" not in run("embed", *KEY, *ONE, "--json").json
    for length in (None, 2, 1):
        options = () if length is None else ("--draft-length", str(length))
        made = run("embed", *KEY, *ONE, "--json", "--draft", "skip:0", *options).json
        length = length or DRAFT_LENGTH
        assert {k: made[k] for k in ("method", "draft", "draft_length")} == {
            "method": "otmc",
            "draft": "skip:0",
            "draft_length": length,
        }
        # Such a toy drafts what the target writes: all drafts stay, and only the last call of a
        # text can be short.
        assert made["finish_reason"] == "length" and len(made["tokens"]) == 60
        assert made["text"] == " ".join(f"w{i}" for i in made["tokens"])
        assert made["tokens_per_call"] == 60 / -(-60 // (1 + length))
    made = run("embed", *KEY, *ONE, "--json", "--draft", "some/where/small").json
    assert made["draft"] == "small" and 1.0 < made["tokens_per_call"] < 5.0
    assert toy[-2:] == ["model toy", "model some/where/small"]


def test_a_text_that_ends_inside_a_block(run: Any, toy: Any, monkeypatch: Any) -> None:
    drafted = ("embed", *KEY, *ONE, "--draft", "skip:0")
    whole = run(*drafted, "--json").json["tokens"]
    # The first token that is not the first of its block, and has not come before.
    end = next(i for i, token in enumerate(whole) if i % 5 > 1 and token not in whole[:i])
    monkeypatch.setattr("clikit.ToyLM.stop_ids", (whole[end],))
    made = run(*drafted, "--json").json
    assert made["tokens"] == whole[: end + 1] and made["finish_reason"] == "stop"
    assert run(*drafted).out == made["text"] + "\n"


def test_what_streams_is_the_record(run: Any, toy: Any) -> None:
    for options in ((), ("--method", "pfr:drafts=3"), ("--draft-length", "7")):
        drafted = ("embed", *KEY, *ONE, "--draft", "small", *options)
        made = run(*drafted, "--json").json
        done = run(*drafted)
        assert done.code == 0 and done.out == made["text"] + "\n"
        assert f"{len(made['tokens'])} tokens, {made['n_marked']} marked" in done.err
        assert f"{made['tokens_per_call']:.2f} tokens per target call" in done.err
    fresh = {run(*drafted, "--seed", seed).out for seed in ("2", "3")}
    assert len(fresh | {done.out}) == 3
    assert "target call" not in run("embed", *KEY, *ONE).err


def test_blocks_are_shown_as_they_come(run: Any, toy: Any, monkeypatch: Any) -> None:
    whole = run("embed", *KEY, *ONE, "--draft", "skip:1").out.split()
    real, blocks = speculative.Session.__iter__, []

    def breaks(session: Any) -> Any:
        for step in real(session):
            blocks.append(step[0].tolist())
            yield step
            if len(blocks) == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(speculative.Session, "__iter__", breaks)
    done = run("embed", *KEY, *ONE, "--draft", "skip:1")
    shown = [f"w{token}" for block in blocks for token in block]
    assert done.code == 130 and done.out.split() == shown == whole[: len(shown)]
    assert len(shown) == 5 * len(blocks)


def test_batches_continue_where_they_stopped(
    run: Any, toy: Any, world: Any, monkeypatch: Any
) -> None:
    world.write("p.jsonl", [{"id": f"p{i}", "prompt": f"prompt number {i}"} for i in range(7)])
    command = ("embed", *KEY, "--draft", "small", "--prompts", "p.jsonl", "-b", "2", "--out")
    assert run(*command, "whole.jsonl").code == 0
    assert len({tuple(row["tokens"]) for row in rows("whole.jsonl")}) == 7
    real, calls = speculative.Session.results, []

    def breaks(session: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(session)

    with monkeypatch.context() as patch:
        patch.setattr(speculative.Session, "results", breaks)
        done = run(*command, "o.jsonl")
    assert done.code == 130 and "4 of 7 records were written" in done.err
    done = run(*command, "o.jsonl")
    assert done.code == 0 and "4 of 7 prompts are in o.jsonl already" in done.err
    assert rows("o.jsonl") == rows("whole.jsonl")
    loads = len(toy)
    assert run(*command, "o.jsonl").code == 0 and len(toy) == loads


SMALL = ("--draft", "small")


@pytest.mark.parametrize(
    ("first", "then", "named"),
    [
        (SMALL, (), 'method "otmc", now it is null'),
        ((), SMALL, 'method null, now it is "otmc"'),
        (SMALL, ("--draft", "ngram"), 'draft "small", now it is "ngram"'),
        (SMALL, (*SMALL, "--draft-length", "3"), "draft_length 4, now it is 3"),
        (SMALL, (*SMALL, "--method", "skt"), 'method "otmc", now it is "skt"'),
        (
            (*SMALL, "--method", "pfr:drafts=2"),
            (*SMALL, "--method", "pfr:drafts=3"),
            'method "pfr:drafts=2", now it is "pfr:drafts=3"',
        ),
    ],
)
def test_settings_do_not_mix(
    run: Any, toy: Any, first: tuple[str, ...], then: tuple[str, ...], named: str
) -> None:
    Path("p.txt").write_text("one\n")
    Path("q.txt").write_text("one\ntwo\n")
    out = ("--out", "o.jsonl")
    assert run("embed", *KEY, *first, "--prompts", "p.txt", *out).code == 0
    before = Path("o.jsonl").read_bytes()
    done = run("embed", *KEY, *then, "--prompts", "q.txt", *out)
    assert done.code == 2 and named in done.err and "choose another --out" in done.err
    assert Path("o.jsonl").read_bytes() == before
    # What is spelled out and what is left out are the same setting.
    spelled = ("--method", "otmc", "--draft-length", "4") if first == SMALL else ()
    assert run("embed", *KEY, *first, *spelled, "--prompts", "q.txt", *out).code == 0
    assert len(rows("o.jsonl")) == 2


@pytest.mark.parametrize(("options", "named"), [((), "plain"), (("--method", "bv"), "bv")])
def test_drafts_without_a_mark(
    run: Any, toy: Any, world: Any, options: tuple[str, ...], named: str
) -> None:
    made = run("embed", *TOY, *ONE, "--unmarked", *SMALL, *options, "--json")
    assert made.code == 0 and "carries no mark" in made.err
    row = made.json
    assert row["method"] == named and row["scheme"] is None and row["key"] is None
    assert row["n_marked"] == 0 and row["tokens_per_call"] > 1.0
    assert fg.detect(row["tokens"], world.key, fg.Gumbel()).log_pvalue > -14.0
    done = run("embed", *TOY, *ONE, "--unmarked", *SMALL, *options)
    assert done.out == row["text"] + "\n" and "no mark, " in done.err


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ((*KEY, "--method", "otmc"), "--draft"),
        ((*KEY, "--draft-length", "4"), "--draft"),
        ((*KEY, *SMALL, "--draft-length", "0"), "1 to 64"),
        ((*KEY, *SMALL, "--draft-length", "65"), "1 to 64"),
        ((*KEY, "--draft", "skip:"), "skip:5,12,17,26"),
        ((*KEY, "--draft", "skip:a"), "skip:5,12,17,26"),
        ((*KEY, *SMALL, "--method", "otcm"), "Did you mean 'otmc'"),
        ((*KEY, *SMALL, "--method", "pfr:drafts=0"), "drafts"),
        ((*KEY, *SMALL, "--method", "mws@tournament"), "--scheme"),
        ((*KEY, *SMALL, "--method", "watermark"), "takes no drafts"),
        ((*KEY, *SMALL, "--method", "two-key"), "speculative.detectors"),
        ((*KEY, *SMALL, "--method", "keyed-coin"), "Python API"),
        ((*KEY, *SMALL, "--method", "plain"), "--unmarked"),
        ((*TOY, "--unmarked", *SMALL, "--method", "otmc"), "plain or bv"),
        ((*TOY, "--unmarked", *SMALL, "--method", "two-key"), "plain or bv"),
        ((*KEY, *SMALL, "-s", "tournament"), "taken by mws, mse."),
        ((*KEY, *SMALL, "-s", "tournament", "--method", "otmc"), "its scheme is gumbel"),
        ((*KEY, *SMALL, "-s", "greenlist"), "no method of speculative sampling takes greenlist"),
        ((*KEY, *SMALL, "-s", "greenlist", "--method", "mws"), "unbiased"),
        ((*KEY, *SMALL, "--temperature", "0"), "greedy"),
    ],
)
def test_refusals_come_before_the_model(
    run: Any, toy: Any, options: tuple[str, ...], named: str
) -> None:
    done = run("embed", *options, *ONE, "--out", "o.jsonl")
    assert done.code == 2 and named in done.err
    assert toy == [] and not Path("o.jsonl").exists()


@pytest.mark.parametrize(
    ("draft", "named"),
    [
        ("foreign", "do not share a vocabulary"),
        ("large", "larger than the target"),
        ("skip:1,9", "layers 0 to 3"),
    ],
)
def test_a_draft_that_does_not_fit(run: Any, toy: Any, draft: str, named: str) -> None:
    for out in ((), ("--out", "o.jsonl"), ("--json",)):
        done = run("embed", *KEY, *ONE, "--draft", draft, *out)
        assert done.code == 2 and named in done.err and done.out == ""
        assert not Path("o.jsonl").exists()


def test_a_text_without_a_mark_is_noticed(run: Any, toy: Any) -> None:
    short = ("--prompt", "one", "-n", "1", "--draft", "ngram")
    for out in ((), ("--out", "o.jsonl"), ("--json",)):
        done = run("embed", *KEY, *short, *out)
        assert done.code == 0 and "this text carries no mark at all" in done.err
