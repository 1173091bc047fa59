"""What the web page is made of: sessions, forms, the heat map and its words."""

import asyncio
import json
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from starlette.requests import Request

from filigrane.custody.states import State
from filigrane.keys import _Secret
from filigrane.kms.local import LocalRoot
from filigrane.service.problems import Problem
from filigrane.service.web import rendering, words
from filigrane.service.web.forms import _InMemory, read_form
from filigrane.service.web.heat import MAX_CHARACTERS, cut
from filigrane.service.web.sessions import Sessions

TEMPLATES = Path(rendering.__file__).parent / "templates"


def test_sessions_open_in_every_process_and_end(tmp_path: Path) -> None:
    now = 1000.0
    kms = LocalRoot.create(tmp_path / "root.key", _Secret("a passphrase of tests"))
    first, second = (Sessions(kms, 60, clock=lambda: now) for _ in range(2))
    cookie = first.seal(_Secret("fgt_secret")).reveal()
    assert "secret" not in cookie
    session = second.open(cookie)
    assert session is not None and session.token.reveal() == "fgt_secret"
    assert "secret>" in repr(session) and session.csrf not in repr(session)
    kms.rotate()
    assert second.open(cookie) is not None
    assert first.seal(_Secret("x")).reveal().startswith("2.")
    now += 60
    assert first.open(cookie) is None
    for other in ("", ".", "1.", "7." + cookie[2:], "1." + "A" * 40, "1.é"):
        assert first.open(other) is None
    kms.close()


def form_request(body: bytes, kind: str, headers: dict[str, str] | None = None) -> Request:
    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": body, "more_body": False}

    every = {"content-type": kind, "host": "here", **(headers or {})}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "headers": [(name.encode(), value.encode()) for name, value in every.items()],
    }
    return Request(scope, receive)


def multipart(content: bytes) -> tuple[bytes, str]:
    head = (
        b'--B\r\nContent-Disposition: form-data; name="text"\r\n\r\ntyped\r\n--B\r\n'
        b'Content-Disposition: form-data; name="file"; filename="x.txt"\r\n'
        b"Content-Type: text/plain\r\n\r\n"
    )
    return head + content + b"\r\n--B--\r\n", "multipart/form-data; boundary=B"


def test_a_large_file_never_touches_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    rolled: list[object] = []
    monkeypatch.setattr(tempfile.SpooledTemporaryFile, "rollover", lambda self: rolled.append(self))
    body, kind = multipart(b"x" * 3_000_000)
    form = asyncio.run(read_form(form_request(body, kind)))
    assert form.text() == "x" * 3_000_000 and rolled == []
    monkeypatch.setattr(_InMemory, "spool_max_size", 1 << 20)
    asyncio.run(read_form(form_request(body, kind)))
    assert rolled, "this test would not notice"


def test_forms_are_read_or_refused() -> None:
    kind = "application/x-www-form-urlencoded"
    form = asyncio.run(read_form(form_request(b"text=a%0D%0Ab&text=c%0D%0Ad&x=+1+", kind)))
    assert (form.text(), form.line("x"), form.line("y")) == ("c\nd", "1", "")
    assert "c" not in repr(form).replace("fields", "")
    for content, code in ((b"\xff", "not_text"), (b"a\0b", "not_text")):
        with pytest.raises(Problem) as refused:
            asyncio.run(read_form(form_request(*multipart(content))))
        assert refused.value.code == code
    with pytest.raises(Problem, match="another site"):
        asyncio.run(read_form(form_request(b"", kind, {"origin": "http://there"})))
    with pytest.raises(Problem, match="cannot be read"):
        asyncio.run(read_form(form_request(b"nonsense", "multipart/form-data; boundary=B"))).text()


def test_cut_keeps_every_character() -> None:
    rng = np.random.default_rng(1)
    alphabet = list("ab <&>\n\té日\u200b")
    for _ in range(200):
        n = int(rng.integers(0, 120))
        text = "".join(rng.choice(alphabet, n))
        stops = np.sort(rng.integers(0, n + 1, 2 * int(rng.integers(0, 4))))
        spans = [(int(a), int(b)) for a, b in stops.reshape(-1, 2)]
        starts = np.sort(rng.integers(0, n + 1, int(rng.integers(0, 60))))
        offsets = np.stack([starts, np.minimum(starts + rng.integers(0, 4, starts.size), n)], 1)
        evidence = rng.exponential(size=starts.size)
        evidence[rng.random(starts.size) < 0.3] = math.nan
        stretches = cut(text, spans, evidence, offsets)
        assert "".join(piece.text for one in stretches for piece in one.pieces) == text
        for one in stretches:
            assert all((piece.strength == 0) == (one.number == 0) for piece in one.pieces)


def test_strength_follows_the_evidence() -> None:
    text = "aaaa bbbb cccc dddd " * 4
    offsets = np.stack([np.arange(len(text)), np.arange(len(text)) + 1], 1)
    evidence = np.ones(len(text))
    evidence[40:60] = 8.0
    (stretch,) = cut(text, [(0, len(text))], evidence, offsets)
    place = 0
    for piece in stretch.pieces:
        if place >= 40 and place + len(piece.text) <= 60:
            assert piece.strength == 4
        if place + len(piece.text) <= 30:
            assert piece.strength == 1
        place += len(piece.text)


def test_a_long_text_is_shown_around_its_passages() -> None:
    text = "word " * (MAX_CHARACTERS // 5 + 1)
    none = np.empty(0)
    stretches = cut(text, [(30_000, 30_100)], none, np.empty((0, 2), dtype=np.int64))
    assert [one.number for one in stretches] == [0, 1, 0]
    shown = sum(len(piece.text) + one.skipped for one in stretches for piece in one.pieces[:1])
    assert all(one.skipped > 20_000 for one in stretches if not one.number)
    assert shown < len(text)
    total = sum(sum(len(p.text) for p in one.pieces) + one.skipped for one in stretches)
    assert total == len(text)


@pytest.mark.parametrize(
    ("p", "said"),
    [
        (1.0, "1.00"),
        (0.3, "0.30"),
        (0.01, "1 in 100"),
        (1e-6, "1 in 1.0 million"),
        (2.5e-8, "1 in 40 million"),
        (1e-13, "1 in 10 trillion"),
        (1e-31, "1 in 10³¹"),
    ],
)
def test_chances_in_words(p: float, said: str) -> None:
    assert words.chance(math.log(p) - 1e-12) == said


def test_hashes_are_cut_short_and_nothing_else() -> None:
    digest = "0123456789abcdef" * 4
    assert words.short(f"content {digest} users 0-9 of acme.chat@1") == (
        "content 0123456789ab… users 0-9 of acme.chat@1"
    )
    for kept in ("9f3c0a51d2e47b68", "a-very-long-name-of-a-key-here@1", ""):
        assert words.short(kept) == kept


def test_every_code_has_words() -> None:
    assert set(words.STATES) == {str(state) for state in State}
    assert set(words.VERDICTS) == {"detected", "uncounted", "inconclusive", "too_short"}
    for said in (*words.DONE.values(), *(one.sentence for one in words.VERDICTS.values())):
        assert said.endswith(".")
    # Nobody is told who wrote something.
    everything = json.dumps([file.read_text() for file in TEMPLATES.glob("*.html")])
    assert not re.search(
        r"written by (an? )?(AI|human|machine)|human-written|AI-generated",
        everything,
        re.IGNORECASE,
    )
