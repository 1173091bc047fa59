"""OpenBao: the documented policy, tokens that change, keys that will not do, servers that lie."""

import base64
import re
from pathlib import Path

import pytest

import kmskit
from filigrane.errors import KmsError, KmsUnavailable
from filigrane.keys import _Secret
from filigrane.kms.opening import create_kms, open_kms
from filigrane.kms.transit import TransitPlace, TransitRoot

DOCUMENT = Path(__file__).parents[2] / "docs" / "kms.md"


def token() -> _Secret[str]:
    return _Secret("s.canary-token")


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
        ({"allow_plaintext_backup": True}, "read out"),
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
    with kmskit.serving(lambda *_: kmskit.as_json(200, {"data": ABOUT})) as (elsewhere, stolen):
        away = {"Location": f"{elsewhere}/v1/transit/keys/filigrane"}
        with (
            kmskit.serving(lambda *_: (307, away, b"")) as (address, seen),
            pytest.raises(KmsError),
        ):
            TransitRoot.open(TransitPlace(address=address, token=token))
        assert seen and not stolen


def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        kmskit.serving(lambda *_: kmskit.as_json(200, {"data": ABOUT})) as (address, seen),
        kmskit.serving(lambda *_: kmskit.as_json(200, {"data": ABOUT})) as (proxy, stolen),
    ):
        for name in ("http_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy)
            monkeypatch.setenv(name.upper(), proxy)
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        TransitRoot.open(TransitPlace(address=address, token=token)).close()
    assert len(seen) == 1 and stolen == []


def test_a_rotation_whose_answer_is_lost_is_not_asked_for_twice() -> None:
    asked: list[str] = []

    def answer(method: str, path: str) -> kmskit.Answer:
        asked.append(path)
        if path.endswith(("rotate", "hmac/filigrane")):
            raise ConnectionError("gone")
        return kmskit.as_json(200, {"data": ABOUT})

    with kmskit.serving(answer) as (address, _):
        kms = TransitRoot.open(TransitPlace(address=address, token=token))
        for call in (kms.rotate, lambda: kms.mac(1, b"m")):
            with pytest.raises(KmsUnavailable):
                call()
        kms.close()
    assert sum(path.endswith("rotate") for path in asked) == 1
    assert sum(path.endswith("hmac/filigrane") for path in asked) == 2, "what changes nothing is"


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_an_overloaded_server_is_unavailable(status: int) -> None:
    with (
        kmskit.serving(lambda *_: kmskit.as_json(status, {"errors": ["s.canary-token"]})) as (
            address,
            _,
        ),
        pytest.raises(KmsUnavailable) as caught,
    ):
        TransitRoot.open(TransitPlace(address=address, token=token))
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    "answer",
    [
        (200, {}, b"<html>hello</html>"),
        (200, {}, b""),
        (204, {}, b""),
        kmskit.as_json(200, {}),
        kmskit.as_json(200, []),
        kmskit.as_json(200, {"data": None}),
        kmskit.as_json(200, {"data": {}}),
        kmskit.as_json(200, {"data": ABOUT | {"keys": {}}}),
        kmskit.as_json(200, {"data": ABOUT | {"keys": {"one": 1}}}),
        kmskit.as_json(404, {"errors": []}),
        kmskit.as_json(418, {"errors": ["canary"]}),
    ],
)
def test_a_server_that_is_no_transit_engine(answer: kmskit.Answer) -> None:
    with kmskit.serving(lambda *_: answer) as (address, _), pytest.raises(KmsError) as caught:
        TransitRoot.open(TransitPlace(address=address, token=token)).versions()
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
    def answer(method: str, path: str) -> kmskit.Answer:
        return kmskit.as_json(200, {"data": {"hmac": said} if "hmac" in path else ABOUT})

    with kmskit.serving(answer) as (address, _):
        kms = TransitRoot.open(TransitPlace(address=address, token=token))
        with pytest.raises(KmsError, match="not as a transit engine"):
            kms.mac(1, b"m")
        kms.close()


def test_a_wrapped_text_of_another_form_is_not_taken() -> None:
    for said in ("secret", "vault:v0:AAAA", "vault:v1:", None):
        answer = kmskit.as_json(200, {"data": ABOUT | {"ciphertext": said}})
        with kmskit.serving(lambda *_, answer=answer: answer) as (at, _):
            kms = TransitRoot.open(TransitPlace(address=at, token=token))
            with pytest.raises(KmsError, match="not as a transit engine"):
                kms.wrap(_Secret(b"data"), b"context")
            kms.close()
