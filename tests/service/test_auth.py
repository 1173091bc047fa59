"""Who gets in: forged, expired, foreign and confused tokens do not, and are told why in words."""

import base64
import hashlib
import hmac
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from joserfc import jwk, jwt

from filigrane.errors import KmsUnavailable
from filigrane.keys import _Secret
from filigrane.kms.local import LocalRoot
from filigrane.service.web.sessions import Sessions
from filigrane.store.records import Role
from servicekit import OTHER, TENANT, Provider, Service, problem

# Making a client takes longer than asking.
CLIENT = httpx2.Client(timeout=30)


@pytest.fixture(scope="module", autouse=True)
def _closed() -> Iterator[None]:
    yield
    CLIENT.close()


def ask(service: Service, token: str, path: str = "/v1/whoami") -> httpx2.Response:
    return CLIENT.get(f"{service.url}{path}", headers={"Authorization": f"Bearer {token}"})


def refused(service: Service, token: str, words: str) -> None:
    answer = ask(service, token)
    said = problem(answer, 401, "token")
    assert words in said["detail"], said
    assert answer.headers["www-authenticate"].startswith("Bearer ")
    assert token not in answer.text


def test_api_tokens(service: Service) -> None:
    assert ask(service, service.token("auditor")).json() == {
        "tenant": TENANT,
        "name": "auditor",
        "roles": ["auditor"],
        "engine": None,
    }
    problem(CLIENT.get(f"{service.url}/v1/whoami"), 401, "no_token")
    good = service.token("auditor")
    head, _, secret = good.rpartition("_")
    flipped = head + "_" + ("a" if secret[0] != "a" else "b") + secret[1:]
    of_other = good.replace(f"fgt_{TENANT}_", f"fgt_{OTHER}_")
    for forged in (flipped, of_other, good[:-1], good + "a", "fgt_", "fgt_demo_x_y"):
        refused(service, forged, "unknown, expired or revoked")
    for strange in ("x" * 9000, "ü", "a b c"):
        answer = CLIENT.get(
            f"{service.url}/v1/whoami", headers={b"Authorization": f"Bearer {strange}".encode()}
        )
        problem(answer, 401)
    for header in ("Basic dTpw", "Bearer", good):
        answer = CLIENT.get(f"{service.url}/v1/whoami", headers={"Authorization": header})
        problem(answer, 401)


def test_tokens_are_revoked_and_expire_within_seconds(service: Service) -> None:
    with service.client("tenant-admin") as client:
        new = {"name": "short", "roles": ["auditor"]}
        token = client.post("/v1/tokens", json=new).json()["token"]
        assert ask(service, token).status_code == 200
        listed = client.get("/v1/tokens?limit=1000").json()["tokens"]
        assert token not in json.dumps(listed)
        token_id = next(t["id"] for t in listed if t["name"] == "short")
        assert client.delete(f"/v1/tokens/{token_id}").status_code == 204
        until = time.monotonic() + 60
        while ask(service, token).status_code == 200:
            assert time.monotonic() < until
            time.sleep(0.1)
        refused(service, token, "unknown, expired or revoked")
        # A busy machine may need longer than a token lives to show it once.
        for lifetime in (2, 8, 32):
            soon = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + lifetime))
            dying = client.post("/v1/tokens", json=new | {"expires_at": soon}).json()["token"]
            if ask(service, dying).status_code == 200:
                break
        else:
            raise AssertionError("the token was never taken")
        until = time.monotonic() + 60
        while ask(service, dying).status_code == 200:
            assert time.monotonic() < until
            time.sleep(0.1)
        refused(service, dying, "unknown, expired or revoked")


@pytest.mark.parametrize("role", ["custodian", "attribution-officer", "tenant-admin"])
def test_one_admin_is_not_two_people(service: Service, role: str) -> None:
    """Roles of which two people are asked come from the operator, not from one who has a token."""
    with service.client("tenant-admin") as client:
        for roles in ([role], ["auditor", role]):
            answer = client.post("/v1/tokens", json={"name": "one-admin", "roles": roles})
            said = problem(answer, 403, "operator_only")
            assert role in said["detail"] and "filigrane access token" in said["detail"]
        listed = client.get("/v1/tokens?limit=1000").json()["tokens"]
        assert "one-admin" not in {token["name"] for token in listed}
        for name in ("operator", "oidc.alice"):
            problem(client.post("/v1/tokens", json={"name": name, "roles": ["auditor"]}), 422)


def test_roles_are_named_when_missing(service: Service) -> None:
    """Every operation that needs roles, with every role: in, or 403 naming what is missing."""
    needed: dict[tuple[str, str], set[str]] = {
        ("POST", "/v1/keys"): {"key-admin"},
        ("POST", "/v1/keys/none/versions"): {"key-admin"},
        ("POST", "/v1/keys/none/versions/1/promote"): {"key-admin"},
        ("POST", "/v1/keys/none/versions/1/retire"): {"key-admin"},
        ("POST", "/v1/keys/none/versions/1/compromise"): {"key-admin", "custodian"},
        ("POST", "/v1/keys/none/versions/1/destroy"): {"custodian"},
        ("GET", "/v1/keys"): {"key-admin", "custodian", "auditor"},
        ("GET", "/v1/tokens"): {"tenant-admin"},
        ("POST", "/v1/tokens"): {"tenant-admin"},
        ("POST", "/v1/engines"): {"tenant-admin"},
        ("GET", "/v1/log/records"): {"auditor"},
        ("GET", "/v1/log/export"): {"auditor"},
        ("GET", "/v1/jobs"): {"detector-expert"},
        ("POST", "/v1/engine/lease"): {"engine"},
    }
    bodies = {
        "/v1/keys": {"name": "none", "model": "m", "scheme": "nothing"},
        "/v1/keys/none/versions/1/compromise": {"since": "2026-01-01T00:00:00Z"},
        "/v1/keys/none/versions/1/destroy": {"approval": "0"},
        "/v1/tokens": {"name": "none", "roles": ["engine"]},
        "/v1/engines": {
            "name": "none",
            "models": ["!"],
            "public_key": {"kty": "OKP", "crv": "X25519", "x": "A" * 43},
        },
        "/v1/engine/lease": {"nonce": "A" * 22},
    }
    with service.client() as client:
        for (method, path), allowed in needed.items():
            for role in Role:
                if role is Role.ENGINE:
                    continue
                answer = client.request(
                    method,
                    path,
                    headers=service.headers(role, OTHER),
                    json=bodies.get(path) if method == "POST" else None,
                )
                if role in allowed:
                    assert answer.status_code not in (401, 403), (method, path, role, answer.text)
                else:
                    said = problem(answer, 403, "role")
                    assert set(said["missing_roles"]) == allowed
                    for missing in allowed:
                        assert missing in said["detail"]


def test_jwt_of_the_identity_provider(service: Service, provider: Provider) -> None:
    token = provider.sign(provider.claims("auditor", "key-admin", "no-such-role"))
    assert ask(service, token).json() == {
        "tenant": TENANT,
        "name": "oidc.alice",
        "roles": ["auditor", "key-admin"],
        "engine": None,
    }
    by_ec = provider.sign(provider.claims("auditor", tenant=OTHER), "ec-1", "ES256")
    assert ask(service, by_ec).json()["tenant"] == OTHER
    several = provider.claims("auditor") | {"aud": ["another", provider.audience]}
    assert ask(service, provider.sign(several)).status_code == 200
    problem(ask(service, provider.sign(provider.claims("key-admin")), "/v1/log/records"), 403)
    # An engine is enrolled with a key; a person's token cannot be one, whatever it claims.
    assert ask(service, provider.sign(provider.claims("engine"))).json()["roles"] == []
    no_tenant = provider.sign(provider.claims("auditor", tenant="nowhere"))
    problem(ask(service, no_tenant, "/v1/log/records"), 404)


def test_two_people_of_the_provider_are_never_one(service: Service, provider: Provider) -> None:
    subjects = ["a" * 58, "a" * 59, "a" * 60, "a b", "a  b", "ü", "a\nb", "x/y"]
    names = [
        ask(service, provider.sign(provider.claims("auditor", subject=subject))).json()["name"]
        for subject in subjects
    ]
    assert len(set(names)) == len(subjects)
    assert all(len(name) <= 64 and name.isprintable() and " " not in name for name in names)


def change(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda claims: claims | {name: value() if callable(value) else value}


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda claims: {key: value for key, value in claims.items() if key != name}


@pytest.mark.parametrize(
    ("altered", "words"),
    [
        (change("exp", lambda: int(time.time()) - 61), "expired"),
        (change("nbf", lambda: int(time.time()) + 62), "not valid yet"),
        (change("iat", lambda: int(time.time()) + 62), "from the future"),
        (change("iss", "https://login.example.evil"), "another issuer"),
        (change("aud", "another"), "another audience"),
        (change("aud", ["another"]), "another audience"),
        (change("aud", [["filigrane"]]), "another audience"),
        (without("exp"), "no usable time exp"),
        (change("exp", "tomorrow"), "no usable time exp"),
        (change("exp", True), "no usable time exp"),
        (change("nbf", "now"), "no usable time nbf"),
        (without("iss"), "another issuer"),
        (without("aud"), "another audience"),
        (without("sub"), "no tenant or no subject"),
        (without("filigrane_tenant"), "no tenant or no subject"),
        (change("filigrane_tenant", ["demo"]), "no tenant or no subject"),
        (change("filigrane_tenant", "../demo"), "cannot exist"),
    ],
)
def test_claims_that_are_refused(
    service: Service, provider: Provider, altered: Callable[..., dict[str, Any]], words: str
) -> None:
    refused(service, provider.sign(altered(provider.claims("auditor"))), words)


@pytest.mark.parametrize(
    "altered",
    [
        change("exp", lambda: int(time.time()) - 50),
        change("nbf", lambda: int(time.time()) + 50),
        change("iat", lambda: int(time.time()) + 50),
    ],
)
def test_clocks_may_differ_by_a_minute(
    service: Service, provider: Provider, altered: Callable[..., dict[str, Any]]
) -> None:
    token = provider.sign(altered(provider.claims("auditor")))
    assert ask(service, token).status_code == 200


def encoded(part: object) -> str:
    data = part if isinstance(part, bytes) else json.dumps(part).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def test_forged_signatures(service: Service, provider: Provider) -> None:
    claims = provider.claims("tenant-admin")
    good = provider.sign(claims)
    head, body, signature = good.split(".")
    no_alg = encoded({"alg": "none", "typ": "JWT"})
    for token in (f"{no_alg}.{body}.", f"{no_alg}.{body}.{signature}", f"{no_alg}.{body}.AA"):
        refused(service, token, "algorithm is not one")
    for name in ("None", "NONE", "nOnE", "HS256", "RS512", "", 5, None, ["RS256"]):
        refused(
            service, f"{encoded({'alg': name, 'kid': 'rsa-1'})}.{body}.{signature}", "the token"
        )

    # The public key as the secret of a MAC: every form in which an attacker could have it.
    public = provider.keys["rsa-1"]
    jwks = json.loads(provider.file.read_text())
    for secret, kid in itertools.product(
        (
            public.as_pem(private=False),
            public.as_der(private=False),
            json.dumps(jwks["keys"][0]).encode(),
            provider.file.read_bytes(),
        ),
        ("rsa-1", "ec-1", None),
    ):
        header = encoded({"alg": "HS256", "typ": "JWT"} | ({} if kid is None else {"kid": kid}))
        mac = hmac.new(secret, f"{header}.{body}".encode(), hashlib.sha256).digest()
        refused(service, f"{header}.{body}.{encoded(mac)}", "algorithm is not one")

    strangers = jwk.RSAKey.generate_key(2048, {"kid": "rsa-1"})
    forged = jwt.encode({"alg": "RS256", "kid": "rsa-1"}, claims, strangers, algorithms=["RS256"])
    refused(service, forged, "signature is not one")
    unknown = jwt.encode({"alg": "RS256", "kid": "rsa-9"}, claims, strangers, algorithms=["RS256"])
    refused(service, unknown, "does not list")
    # A key that the token itself brings along is nobody's.
    own = {"alg": "RS256", "jwk": strangers.as_dict(private=False), "kid": "rsa-9"}
    refused(service, jwt.encode(own, claims, strangers, algorithms=["RS256"]), "the token")
    without_kid = jwt.encode({"alg": "RS256"}, claims, strangers, algorithms=["RS256"])
    refused(service, without_kid, "does not list")
    # The wrong kind of key for the algorithm.
    crossed = f"{encoded({'alg': 'ES256', 'kid': 'rsa-1'})}.{body}.{signature}"
    refused(service, crossed, "signature is not one")
    critical = encoded({"alg": "RS256", "kid": "rsa-1", "crit": ["x"], "x": 1})
    refused(service, f"{critical}.{body}.{signature}", "the token")

    stronger = encoded(claims | {"filigrane_tenant": OTHER})
    refused(service, f"{head}.{stronger}.{signature}", "signature is not one")
    for damaged in (
        good[:-4] + "AAAA",
        f"{head}.{body}",
        f"{head}.{body}.",
        f".{body}.{signature}",
        f"{head}..{signature}",
        f"{head}.{body}.{signature}.x",
        f"{head}.{body}.{signature}.x.y",
        "a.b.c",
        "eyJ",
        f"{encoded(b'[' * 4000)}.{body}.{signature}",
        f"{encoded([1])}.{body}.{signature}",
    ):
        refused(service, damaged, "the token")


def test_changed_bytes_never_get_in(service: Service, provider: Provider) -> None:
    good = provider.sign(provider.claims("tenant-admin"))
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    parts = good.split(".")
    last = [len(parts[0]) - 1, len(parts[0]) + len(parts[1]), len(good) - 1]
    with service.client() as client:
        for place in range(0, len(good), 7):
            if good[place] == "." or place in last:
                # The last letter of a part may have bits that say nothing.
                continue
            letter = alphabet[(alphabet.index(good[place]) + 1) % 64]
            forged = good[:place] + letter + good[place + 1 :]
            answer = client.get("/v1/whoami", headers={"Authorization": f"Bearer {forged}"})
            assert answer.status_code == 401, place


def test_keys_of_the_provider_change(service: Service, provider: Provider) -> None:
    before = provider.keys["ec-1"]
    provider.keys["ec-2"] = jwk.ECKey.generate_key("P-256", {"kid": "ec-2"})
    provider.publish()
    token = provider.sign(provider.claims("auditor"), "ec-2", "ES256")
    until = time.monotonic() + 60
    while ask(service, token).status_code != 200:
        assert time.monotonic() < until
        time.sleep(0.2)
    del provider.keys["ec-1"]
    provider.publish()
    until = time.monotonic() + 60
    stale = jwt.encode(
        {"alg": "ES256", "kid": "ec-1"}, provider.claims("auditor"), before, algorithms=["ES256"]
    )
    try:
        while ask(service, stale).status_code == 200:
            assert time.monotonic() < until
            time.sleep(0.2)
        refused(service, stale, "does not list")
    finally:
        provider.keys["ec-1"] = before
        provider.publish()


class Counted(LocalRoot):
    """A local root that counts how often its versions are asked for, and can be away."""

    asked = 0
    away = False

    def versions(self) -> tuple[int, ...]:
        self.asked += 1
        if self.away:
            raise KmsUnavailable("away.")
        return super().versions()


def test_forged_cookies_ask_for_nothing(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, words = tmp_path / "root.key", _Secret("a passphrase of tests")
    LocalRoot.create(path, words).close()
    kms = Counted.open(path, words)
    sessions = Sessions(kms, 60)
    for version in ("7", "8", "999999", "0", "01", "\u0661", "1" * 5000):
        assert sessions.open(f"{version}." + "A" * 60) is None
    assert kms.asked == 1
    # Not to be had now is no forgery, and is not asked for by every cookie either.
    kms.away = True
    later = time.monotonic() + 6
    monkeypatch.setattr("filigrane.service.web.sessions.time.monotonic", lambda: later)
    for _ in range(3):
        with pytest.raises(KmsUnavailable):
            sessions.open("7." + "A" * 60)
    assert kms.asked == 2
    kms.close()
    long = CLIENT.get(
        f"{service.url}/expert", headers={"Cookie": "filigrane-session=" + "1" * 5000 + ".AAAA"}
    )
    assert long.status_code < 500


def test_commands_that_hold_secrets_dump_no_core() -> None:
    code = (
        "import resource\n"
        "from filigrane.cli.secrets import no_core_dumps\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (4096, resource.getrlimit("
        "resource.RLIMIT_CORE)[1]))\n"
        "from filigrane.cli.{module} import {name}\n"
        "try:\n"
        "    {call}\n"
        "except Exception:\n"
        "    pass\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE))\n"
    )
    for module, name, call in (
        ("keys_office", "opened", "opened(None).__enter__()"),
        (
            "engine_lease",
            "lease",
            "lease('http://127.0.0.1:1', '/none', ['/none'], '/none')",
        ),
    ):
        ran = subprocess.run(
            [sys.executable, "-c", code.format(module=module, name=name, call=call)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert ran.stdout.strip() == "(0, 0)", (module, ran.stdout, ran.stderr)
