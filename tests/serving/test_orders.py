"""What becomes of a request, for every policy and every mistake."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from filigrane.errors import RequestRefused
from filigrane.keys import Key
from filigrane.schemes import GreenList, Gumbel
from filigrane.serving import Decoding, Keyring, Mark, Unmarked, decide
from filigrane.serving.keyring import Entry, Policy, State, Tenant
from filigrane.serving.orders import ARGUMENTS, REASONS

KEYS = {name: Key.generate(name) for name in ("shared", "ours", "theirs", "old")}
SCHEMES = (Gumbel(), GreenList())


def ring(policy: Policy = "default", default: str | None = "shared") -> Keyring:
    def entry(name: str, tenant: str | None, state: State = "active") -> Entry:
        return Entry(id=name, key=KEYS[name], tenant=tenant, state=state, schemes=SCHEMES)

    return Keyring(
        policy=policy,
        default=default,
        entries={
            "shared": entry("shared", None),
            "ours": entry("ours", "us"),
            "theirs": entry("theirs", "them"),
            "old": entry("old", "us", "retired"),
        },
        tenants={
            "us": Tenant(name="us", default="ours", tokens_sha256=()),
            "them": Tenant(name="them", default=None, tokens_sha256=()),
        },
    )


def refused(reason: str, keyring: Keyring | None, arguments: dict[str, Any], **how: Any) -> str:
    with pytest.raises(RequestRefused) as caught:
        decide(keyring, arguments, Decoding(**how))
    assert caught.value.reason == reason and reason in REASONS
    assert str(caught.value).startswith("filigrane: ")
    return str(caught.value)


def marked(keyring: Keyring, arguments: dict[str, Any], **how: Any) -> Mark:
    decided = decide(keyring, arguments, Decoding(**how))
    assert isinstance(decided, Mark)
    return decided


def test_policies() -> None:
    assert marked(ring(), {}).key == KEYS["shared"]
    assert marked(ring("enforce"), {}).scheme == Gumbel()
    assert decide(ring("opt-in"), {}, Decoding()) == Unmarked(reason="not_asked")
    for asks in ({"filigrane_mark": True}, {"filigrane_key": "shared"}):
        assert marked(ring("opt-in"), asks).key_id == "shared"
    no: dict[str, Any] = {"filigrane_mark": False}
    assert decide(ring(), no, Decoding()) == Unmarked(reason="opted_out")
    assert "leave filigrane_mark out" in refused("opt_out", ring("enforce"), no)


def test_without_a_keyring_nothing_is_promised() -> None:
    assert decide(None, None, Decoding()) == Unmarked(reason="not_asked")
    assert decide(None, {"other": 1}, Decoding()) == Unmarked(reason="not_asked")
    refused("no_keyring", None, {"filigrane_mark": True})


def test_tenants_have_their_own_keys() -> None:
    us, them = {"filigrane_tenant": "us"}, {"filigrane_tenant": "them"}
    assert marked(ring(), us).key == KEYS["ours"]
    assert marked(ring(), them).key == KEYS["shared"]
    assert marked(ring(), them | {"filigrane_key": "theirs"}).key == KEYS["theirs"]
    other = refused("unknown_key", ring(), us | {"filigrane_key": "theirs"})
    # Word for word what is said of a key that nobody has.
    nobody = refused("unknown_key", ring(), us | {"filigrane_key": "theirz"})
    assert other.replace("theirs", "theirz") == nobody
    assert "without a tenant" in refused("unknown_key", ring(), {"filigrane_key": "ours"})
    refused("unknown_tenant", ring(), {"filigrane_tenant": "nobody"})
    # Even one who opts out does not learn of others' keys.
    refused("unknown_key", ring(), us | {"filigrane_key": "theirs", "filigrane_mark": False})


def test_users_of_a_key() -> None:
    decided = marked(ring(), {"filigrane_key": "shared/17"})
    assert decided.key == KEYS["shared"].user(17) and decided.key_id == "shared/17"
    assert marked(ring(), {"filigrane_key": f"shared/{2**64 - 1}"})
    for bad in ("shared/", "shared/-1", f"shared/{2**64}", "shared/1/2", "shared/x", "shared/١"):
        refused("malformed", ring(), {"filigrane_key": bad})


def test_other_refusals() -> None:
    refused("retired_key", ring(), {"filigrane_tenant": "us", "filigrane_key": "old"})
    assert "this server has no default" in refused("no_key", ring(default=None), {})
    them = {"filigrane_tenant": "them"}
    assert "[tenants.them]" in refused("no_key", ring(default=None), them)
    mine = Entry(id="k", key=KEYS["old"], tenant="us", state="active", schemes=(GreenList(),))
    alone = Keyring(policy="default", default=None, entries={"k": mine}, tenants={})
    assert "belong to tenants" in refused("no_key", alone, {})
    refused("scheme", ring(), {"filigrane_scheme": "gumbel:context_width=2"})
    refused("malformed", ring(), {"filigrane_scheme": "gumbl"})
    refused("malformed", ring(), {"filigrane_keys": "shared"})
    refused("malformed", ring(), {"filigrane_mark": "perhaps"})
    refused("malformed", ring(), {"filigrane_mark": 2})
    refused("malformed", ring(), {"filigrane_key": ["shared"]})
    assert len(refused("malformed", ring(), {"filigrane_" + "x" * 10**6: 1})) < 400
    refused("malformed", ring(), {"filigrane_key": "s" * 10**6})
    assert marked(ring(), {"filigrane_scheme": "greenlist"}).scheme == GreenList()
    own = Entry(
        id="k", key=KEYS["old"], tenant=None, state="active", schemes=(GreenList(delta=3.0),)
    )
    only = Keyring(policy="default", default="k", entries={"k": own}, tenants={})
    assert marked(only, {"filigrane_scheme": "greenlist"}).scheme == GreenList(delta=3.0)
    refused("scheme", only, {"filigrane_scheme": "greenlist:delta=2"})


def test_what_cannot_carry_a_mark_is_refused() -> None:
    assert "opt out" in refused("greedy", ring(), {}, temperature=0.0)
    assert "opt out" not in refused("greedy", ring("enforce"), {}, temperature=0.0)
    refused("greedy", ring(), {}, top_k=1)
    refused("beams", ring(), {}, beams=True)
    refused("too_short", ring(), {}, max_tokens=4)
    assert marked(ring(), {}, max_tokens=5)
    green = {"filigrane_scheme": "greenlist"}
    assert marked(ring(), green, temperature=0.0)
    refused("beams", ring(), green, beams=True)


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=40),
    st.sampled_from(["ours", "theirs", "shared", "old", "us", "them", "gumbel", "true", "off"]),
    st.lists(st.text(max_size=3), max_size=2),
)
names = st.one_of(st.sampled_from(ARGUMENTS), st.text(max_size=12).map("filigrane_".__add__))


@given(st.dictionaries(names, values, max_size=4), st.sampled_from(["default", "enforce"]))
def test_anything_is_marked_refused_or_opted_out(given_: dict[str, Any], policy: Policy) -> None:
    try:
        decided = decide(ring(policy), given_, Decoding())
    except RequestRefused as error:
        assert error.reason in REASONS and len(str(error)) < 1000
        return
    if isinstance(decided, Unmarked):
        assert policy == "default" and given_["filigrane_mark"] is not None
        return
    tenant = given_.get("filigrane_tenant")
    if decided.key_id.startswith("ours"):
        assert tenant == "us"
    if decided.key_id.startswith("theirs"):
        assert tenant == "them"


def test_the_path_of_an_import(tmp_path: Path) -> None:
    """Deciding needs no framework and reads no file."""
    import subprocess
    import sys

    code = "import filigrane.serving, sys; print('torch' in sys.modules, 'vllm' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["False", "False"]
