"""Tokens, engines and approvals."""

from datetime import timedelta

import pytest

import storekit
from filigrane.custody.hierarchy import KeySpec
from filigrane.errors import AlreadyExists, KeyFormatError, NotFound, StateError
from filigrane.store.access import Role
from filigrane.store.records import APPROVAL_ROLES

CHAT = KeySpec(tenant="acme", name="chat", model="m", scheme="gumbel", slots=1)


def test_tokens(store: storekit.Opened) -> None:
    access = store.access
    shown = access.issue_token("acme", "ann", [Role.AUDITOR, Role.KEY_ADMIN], actor="op")
    who = access.authenticate(shown)
    assert (who.tenant, who.name, who.engine) == ("acme", "ann", None)
    assert who.roles == {Role.AUDITOR, Role.KEY_ADMIN}
    (record,) = access.tokens("acme")
    assert record.id == who.token_id
    secret = shown.rpartition("_")[2]
    assert secret not in repr(record) + repr(who) + repr(store.log.records("acme"))
    messages = set()
    other = "b" if secret[-1] != "b" else "c"
    forged = [
        "",
        "fgt_acme",
        shown + "a",
        shown[:-1],
        shown[:-1] + other,
        shown.replace("fgt_acme_", "fgt_nobody_"),
        shown.replace(record.id, "a" * 12),
        shown.upper(),
        "fgt_acme'; DROP TABLE tokens; --_" + shown[9:],
        "x" * 100_000,
    ]
    for token in forged:
        with pytest.raises(NotFound) as caught:
            access.authenticate(token)
        messages.add(str(caught.value))
    access.revoke_token("acme", record.id, actor="op")
    short = access.issue_token(
        "acme",
        "bob",
        [Role.AUDITOR],
        expires_at=store.clock() + timedelta(minutes=1),
        actor="op",
    )
    access.authenticate(short)
    store.clock.at += timedelta(minutes=2)
    for token in (shown, short):
        with pytest.raises(NotFound) as caught:
            access.authenticate(token)
        messages.add(str(caught.value))
    # Whoever tries learns nothing from the words.
    assert len(messages) == 1
    with pytest.raises(StateError, match="revoked before"):
        access.revoke_token("acme", record.id, actor="op")
    with pytest.raises(NotFound):
        access.revoke_token("acme", "nothing", actor="op")
    kinds = [r.kind for r in store.log.records("acme")]
    assert kinds == ["tenant.create", "token.issue", "token.revoke", "token.issue"]


def test_what_a_token_may_be(store: storekit.Opened) -> None:
    access = store.access
    with pytest.raises(KeyFormatError, match="without a role"):
        access.issue_token("acme", "ann", [], actor="op")
    with pytest.raises(KeyFormatError, match="role engine alone"):
        access.issue_token("acme", "ann", [Role.ENGINE], actor="op")
    with pytest.raises(NotFound, match="no such engine"):
        access.issue_token("acme", "e", [Role.ENGINE], engine="one", actor="op")
    access.enrol_engine("acme", "one", ["m"], storekit.identity(), actor="op")
    with pytest.raises(KeyFormatError, match="role engine alone"):
        access.issue_token("acme", "e", [Role.ENGINE, Role.AUDITOR], engine="one", actor="op")
    with pytest.raises(KeyFormatError, match="role engine alone"):
        access.issue_token("acme", "e", [Role.AUDITOR], engine="one", actor="op")
    with pytest.raises(KeyFormatError, match="a name"):
        access.issue_token("acme", "a b", [Role.AUDITOR], actor="op")
    with pytest.raises(StateError, match="expired already"):
        access.issue_token("acme", "a", [Role.AUDITOR], expires_at=store.clock(), actor="op")
    with pytest.raises(NotFound, match="no tenant"):
        access.issue_token("nobody", "a", [Role.AUDITOR], actor="op")
    with pytest.raises(ValueError, match="king"):
        access.issue_token("acme", "a", ["king"], actor="op")  # type: ignore[list-item]
    assert access.tokens("acme") == ()


def test_engines(store: storekit.Opened) -> None:
    access = store.access
    key = storekit.identity()
    made = access.enrol_engine("acme", "one", ["m", "n", "m"], {**key, "kid": "x"}, actor="op")
    assert made.models == ("m", "n") and made.public_key == key
    with pytest.raises(AlreadyExists, match="another name"):
        access.enrol_engine("acme", "one", ["m"], key, actor="op")
    wrong = [
        ({**key, "d": "x"}, "private part"),
        ({**key, "crv": "Ed25519"}, "X25519"),
        ({**key, "x": "short"}, "43 characters"),
        ({}, "X25519"),
    ]
    for jwk, said in wrong:
        with pytest.raises(KeyFormatError, match=said):
            access.enrol_engine("acme", "two", ["m"], jwk, actor="op")
    with pytest.raises(KeyFormatError, match="at least one model"):
        access.enrol_engine("acme", "two", [], key, actor="op")
    token = access.issue_token("acme", "one", [Role.ENGINE], engine="one", actor="op")
    assert access.authenticate(token).engine == "one"
    assert access.engine("acme", "one").last_seen_at is None
    access.seen("acme", "one")
    first = access.engine("acme", "one").last_seen_at
    access.seen("acme", "one")
    assert first is not None and access.engine("acme", "one").last_seen_at == first
    store.clock.at += timedelta(minutes=2)
    access.seen("acme", "one")
    later = access.engine("acme", "one").last_seen_at
    assert later is not None and later > first
    access.revoke_engine("acme", "one", actor="op")
    with pytest.raises(NotFound):
        access.authenticate(token)
    with pytest.raises(StateError, match="revoked"):
        access.issue_token("acme", "one", [Role.ENGINE], engine="one", actor="op")
    with pytest.raises(StateError, match="revoked before"):
        access.revoke_engine("acme", "one", actor="op")
    with pytest.raises(AlreadyExists, match="or was"):
        access.enrol_engine("acme", "one", ["m"], key, actor="op")


@pytest.mark.parametrize(
    "name", ["operator", "public", "readyz", "Operator", "oidc.alice", "oidc@0a1b", "OIDC.alice"]
)
def test_names_of_others(store: storekit.Opened, name: str) -> None:
    with pytest.raises(KeyFormatError, match="names of others"):
        store.access.issue_token("acme", name, [Role.CUSTODIAN], actor="op")
    store.access.issue_token("acme", f"my-{name}", [Role.CUSTODIAN], actor="op")


@pytest.mark.parametrize("revoked", [0, 1])
def test_approvals_of_those_who_were_let_out(store: storekit.Opened, revoked: int) -> None:
    access = store.access
    two = [
        access.authenticate(access.issue_token("acme", name, [Role.CUSTODIAN], actor="op"))
        for name in ("ann", "bob")
    ]
    store.keybook.create(CHAT, actor="op")

    def approved() -> str:
        asked = access.request_approval("acme", "destroy", "acme.chat@1", "why", two[0])
        return access.approve("acme", asked.id, two[1]).id

    approval = approved()
    access.revoke_token("acme", two[revoked].token_id, actor="op")
    with pytest.raises(StateError, match=f"which {two[revoked].name} agreed.* was revoked"):
        store.keybook.destroy("acme", "chat", 1, actor="ann", approval=approval)
    assert access.approval("acme", approval).used_at is None
    again = access.issue_token("acme", two[revoked].name, [Role.CUSTODIAN], actor="op")
    two[revoked] = access.authenticate(again)
    store.keybook.destroy("acme", "chat", 1, actor="ann", approval=approved())


@pytest.mark.parametrize("subject", ["acme.chat@2", "acme.other@1", "other.chat@1", "x", "@"])
def test_what_is_not_there_is_not_destroyed(store: storekit.Opened, subject: str) -> None:
    store.keybook.create(CHAT, actor="op")
    ann = store.person("acme", "ann", Role.CUSTODIAN)
    with pytest.raises(NotFound, match="no such version"):
        store.access.request_approval("acme", "destroy", subject, "why", ann)
    assert store.access.approvals("acme") == ()


@pytest.mark.parametrize("kind", APPROVAL_ROLES)
def test_approvals(store: storekit.Opened, kind: str) -> None:
    access, role = store.access, APPROVAL_ROLES[kind]
    store.keybook.create(CHAT, actor="op")
    what = "acme.chat@1"
    ann, bob = (store.person("acme", name, role) for name in ("ann", "bob"))
    wrong_role = store.person("acme", "eve", *(set(Role) - {role}))
    elsewhere = store.person("other", "eve", role)
    for who in (wrong_role, elsewhere):
        with pytest.raises(StateError, match=f"for those with the role {role}"):
            access.request_approval("acme", kind, what, "why", who)
    for subject, purpose in (("", "why"), ("x", " "), ("x" * 201, "why"), ("x", "a\nb")):
        with pytest.raises(KeyFormatError, match="characters"):
            access.request_approval("acme", kind, subject, purpose, ann)
    with pytest.raises(KeyFormatError, match="approvals are for"):
        access.request_approval("acme", "party", "x", "why", ann)
    asked = access.request_approval("acme", kind, what, "why", ann)

    def spend(id: str = asked.id, **changed: str) -> object:
        given = {"kind": kind, "subject": what, "actor": "ann", **changed}
        return access.spend_approval("acme", id, **given)

    with pytest.raises(StateError, match="waits for a second person"):
        spend()
    with pytest.raises(StateError, match="cannot also approve"):
        access.approve("acme", asked.id, ann)
    for who in (wrong_role, elsewhere):
        with pytest.raises(StateError, match="for those with the role"):
            access.approve("acme", asked.id, who)
    given = access.approve("acme", asked.id, bob)
    assert (given.requested_by, given.approved_by) == ("ann", "bob")
    with pytest.raises(StateError, match="given before"):
        access.approve("acme", asked.id, bob)
    for changed in ({"subject": "y"}, {"kind": next(k for k in APPROVAL_ROLES if k != kind)}):
        with pytest.raises(StateError, match="nothing else"):
            spend(**changed)
    with pytest.raises(StateError, match="two people"):
        spend(actor="eve")
    spend()
    with pytest.raises(StateError, match="used before"):
        spend()
    # Again only where that is asked for, by the one who used it.
    with pytest.raises(StateError, match="used before"):
        access.spend_approval("acme", asked.id, kind=kind, subject=what, actor="bob", again=True)
    used = access.approval("acme", asked.id)
    assert used.used_by == "ann"
    store.clock.at += timedelta(seconds=1)
    repeat = access.spend_approval(
        "acme", asked.id, kind=kind, subject=what, actor="ann", again=True
    )
    assert repeat == used
    with pytest.raises(NotFound):
        spend("nothing")
    late = access.request_approval("acme", kind, what, "why", ann, lifetime=timedelta(minutes=1))
    later = access.request_approval("acme", kind, what, "why", ann, lifetime=timedelta(minutes=1))
    access.approve("acme", later.id, bob)
    store.clock.at += timedelta(minutes=2)
    with pytest.raises(StateError, match="expired"):
        access.approve("acme", late.id, bob)
    with pytest.raises(StateError, match="expired"):
        spend(later.id)
    assert [a.id for a in access.approvals("acme")] == [asked.id, late.id, later.id]
    kinds = [r.kind for r in store.log.records("acme")]
    assert kinds.count("approval.use") == 1 and kinds.count("approval.give") == 2
    assert kinds.count("approval.repeat") == 1
    store.verify("acme")
