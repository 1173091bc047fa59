"""OpenBao: the documented policy, tokens that change, keys that will not do, servers that lie."""

import base64
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import kmskit
from filigrane.errors import KmsError, KmsUnavailable
from filigrane.keys import _Secret
from filigrane.kms.opening import create_kms, open_kms
from filigrane.kms.transit import TransitRoot

DOCUMENT = Path(__file__).parents[2] / "docs" / "kms.md"

Answer = tuple[int, dict[str, str], bytes]


@contextmanager
def serving(answer: Callable[[str, str], Answer]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that says what it is told to; yields its address and the headers it saw."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            seen.append(dict(self.headers))
            status, headers, body = answer(self.command, self.path)
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_PUT = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()
        server.server_close()


def token() -> _Secret[str]:
    return _Secret("s.canary-token")


def as_json(status: int, value: object) -> Answer:
    return status, {"Content-Type": "application/json"}, json.dumps(value).encode()


ABOUT = {"type": "aes256-gcm96", "keys": {"1": 1}, "exportable": False, "derived": False}


def test_the_documented_policy_is_enough_and_no_more(transit: kmskit.Transit) -> None:
    settings, kms = transit.fresh()
    (policy,) = re.findall(r"^```hcl\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S)
    policy = policy.replace("filigrane", settings["key"])
    file = transit.secret_file("documented", transit.token_with(policy))
    mine = open_kms(settings | {"token_file": file})
    blob = mine.wrap(_Secret(b"data"), b"context")
    assert mine.unwrap(blob, b"context").reveal() == b"data"
    assert mine.rotate() == 2 and mine.versions() == (1, 2)
    assert mine.mac(1, b"m").reveal() == kms.mac(1, b"m").reveal()
    with pytest.raises(KmsError):
        create_kms(settings | {"token_file": file, "key": "another"})
    with pytest.raises(KmsError, match="policy"):
        open_kms(transit.settings | {"token_file": file})
    # Without the last line it cannot rotate, and all else works.
    file = transit.secret_file("fewer", transit.token_with(policy[: policy.rindex("path")]))
    fewer = open_kms(settings | {"token_file": file})
    with pytest.raises(KmsError, match="policy"):
        fewer.rotate()
    assert fewer.versions() == (1, 2)
    mine.close()
    fewer.close()


def test_a_token_that_an_agent_renewed(transit: kmskit.Transit) -> None:
    policy = 'path "transit/*" { capabilities = ["read", "update"] }'
    old = transit.token_with(policy)
    file = transit.secret_file("renewed", old)
    kms = open_kms(transit.settings | {"token_file": file})
    before = kms.mac(1, b"m").reveal()
    transit.ask("POST", "auth/token/revoke", {"token": old})
    with pytest.raises(KmsError, match="expired"):
        kms.mac(1, b"m")
    transit.secret_file("renewed", transit.token_with(policy))
    assert kms.mac(1, b"m").reveal() == before
    kms.close()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ({"exportable": True}, "read out"),
        ({"allow_plaintext_backup": True, "exportable": True}, "read out"),
        ({"derived": True}, "another kind"),
        ({"type": "ed25519"}, "another kind"),
        ({"type": "hmac", "key_size": 32}, "another kind"),
    ],
)
def test_a_key_that_will_not_do(
    transit: kmskit.Transit, kind: dict[str, object], says: str
) -> None:
    name = f"bad-{len(says)}-{len(str(kind))}"
    transit.ask("POST", f"transit/keys/{name}", kind)
    with pytest.raises(KmsError, match=says):
        open_kms(transit.settings | {"key": name})


def test_roots_that_are_there_and_not_there(transit: kmskit.Transit) -> None:
    with pytest.raises(KmsError, match="no key none"):
        open_kms(transit.settings | {"key": "none"})
    with pytest.raises(KmsError, match="no key"):
        open_kms(transit.settings | {"mount": "elsewhere"})
    with pytest.raises(KmsError, match="already"):
        create_kms(transit.settings)
    for bad in ("", "a/b", "../x", "a b"):
        with pytest.raises(KmsError, match="name"):
            open_kms(transit.settings | {"key": bad})


def test_a_sealed_server_is_unavailable(transit: kmskit.Transit) -> None:
    settings, kms = transit.fresh()
    before = kms.mac(1, b"m").reveal()
    transit.ask("PUT", "sys/seal")
    try:
        with pytest.raises(KmsUnavailable, match="sealed"):
            kms.mac(1, b"m")
        with pytest.raises(KmsUnavailable, match="sealed"):
            open_kms(settings)
    finally:
        transit.stop()
        transit.start()
    assert kms.mac(1, b"m").reveal() == before


def test_versions_that_an_administrator_retired(transit: kmskit.Transit) -> None:
    settings, kms = transit.fresh()
    blob = kms.wrap(_Secret(b"data"), b"context")
    kms.rotate()
    transit.ask("POST", f"transit/keys/{settings['key']}/config", {"min_decryption_version": 2})
    assert kms.versions() == (2,)
    with pytest.raises(KmsError) as caught:
        kms.unwrap(blob, b"context")
    assert not isinstance(caught.value, KmsUnavailable)


def test_a_redirect_does_not_get_the_token() -> None:
    with serving(lambda *_: as_json(200, {"data": ABOUT})) as (elsewhere, stolen):
        away = {"Location": f"{elsewhere}/v1/transit/keys/filigrane"}
        with (
            serving(lambda *_: (307, away, b"")) as (address, seen),
            pytest.raises(KmsError),
        ):
            TransitRoot.open(address, token)
        assert seen and not stolen


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_an_overloaded_server_is_unavailable(status: int) -> None:
    with (
        serving(lambda *_: as_json(status, {"errors": ["s.canary-token"]})) as (address, _),
        pytest.raises(KmsUnavailable) as caught,
    ):
        TransitRoot.open(address, token)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b"<html>hello</html>"),
        (200, {}, b""),
        (204, {}, b""),
        as_json(200, {}),
        as_json(200, []),
        as_json(200, {"data": None}),
        as_json(200, {"data": {}}),
        as_json(200, {"data": ABOUT | {"keys": {}}}),
        as_json(200, {"data": ABOUT | {"keys": {"one": 1}}}),
        as_json(404, {"errors": []}),
        as_json(418, {"errors": ["canary"]}),
    ],
)
def test_a_server_that_is_no_transit_engine(answer: Answer) -> None:
    with serving(lambda *_: answer) as (address, _), pytest.raises(KmsError) as caught:
        TransitRoot.open(address, token).versions()
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "said",
    [
        "vault:v2:" + base64.b64encode(bytes(32)).decode(),
        "vault:v1:" + base64.b64encode(bytes(31)).decode(),
        "vault:v1:not base64",
        base64.b64encode(bytes(32)).decode(),
        "",
        None,
        7,
    ],
)
def test_a_mac_of_another_version_or_form_is_not_taken(said: object) -> None:
    def answer(method: str, path: str) -> Answer:
        return as_json(200, {"data": {"hmac": said} if "hmac" in path else ABOUT})

    with serving(answer) as (address, _):
        kms = TransitRoot.open(address, token)
        with pytest.raises(KmsError, match="not as a transit engine"):
            kms.mac(1, b"m")
        kms.close()


def test_a_wrapped_text_of_another_form_is_not_taken() -> None:
    for said in ("secret", "vault:v0:AAAA", "vault:v1:", None):
        answer = as_json(200, {"data": ABOUT | {"ciphertext": said}})
        with serving(lambda *_, answer=answer: answer) as (at, _):
            kms = TransitRoot.open(at, token)
            with pytest.raises(KmsError, match="not as a transit engine"):
                kms.wrap(_Secret(b"data"), b"context")
            kms.close()
