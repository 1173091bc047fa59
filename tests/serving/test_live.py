"""A keyring that changes under a running server: states, expiry, mistakes, what is remembered."""

import os
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from filigrane.errors import KeyringError, NotReady, RequestRefused
from filigrane.keys import Key
from filigrane.serving import Decoding, Keyring, LiveKeyring, Mark, Unmarked, decide, orders
from filigrane.serving.live import current

AT = datetime(2026, 6, 1, tzinfo=UTC)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def write(folder: Path, *keys: str, head: str = 'default = "acme.chat"') -> None:
    """A keyring as the lease client writes it: 'ID STATE EXPIRES', the file replaced as a whole."""
    lines = [head]
    for line in keys:
        id, state, *expires = line.split()
        if not (folder / f"{id}.key").exists():
            Key.generate(id, slots=2).save(folder / f"{id}.key")
        lines += [f'[keys."{id}"]', f'state = "{state}"']
        lines += [f"expires = {moment}" for moment in expires]
    (folder / "new").write_text("\n".join(lines) + "\n")
    os.replace(folder / "new", folder / "keyring.toml")


def asked(ring: Keyring, *, at: datetime = AT, **arguments: object) -> Mark | Unmarked:
    given = {f"filigrane_{name}": value for name, value in arguments.items()}
    return decide(ring, given, Decoding(), at=at)


def refused(ring: Keyring, *, at: datetime = AT, **arguments: object) -> str:
    with pytest.raises(RequestRefused) as caught:
        asked(ring, at=at, **arguments)
    assert caught.value.reason in orders.REASONS
    return caught.value.reason


def key_id(ring: Keyring, *, at: datetime = AT, **arguments: object) -> str:
    decided = asked(ring, at=at, **arguments)
    assert isinstance(decided, Mark)
    return decided.key_id


# ---------------------------------------------------------------- states and versions


def test_a_name_without_version_is_whatever_is_active(tmp_path: Path) -> None:
    write(tmp_path, "acme.chat@2 retired", "acme.chat@3 active", "acme.chat@10 staged")
    ring = Keyring.load(tmp_path)
    assert key_id(ring) == key_id(ring, key="acme.chat") == key_id(ring, key="acme.chat@3")
    assert key_id(ring, key="acme.chat/17") == "acme.chat@3/17"
    assert refused(ring, key="acme.chat@2") == "retired_key"
    assert refused(ring, key="acme.chat@10") == "staged_key"
    assert refused(ring, key="acme.chat@4") == refused(ring, key="acme.cha") == "unknown_key"


def test_no_version_is_active(tmp_path: Path) -> None:
    """The newest says why; a default of that name is no contradiction."""
    write(tmp_path, "acme.chat@1 retired", "acme.chat@2 staged")
    assert refused(Keyring.load(tmp_path)) == "staged_key"
    write(tmp_path, "acme.chat@2 retired", "acme.chat@10 retired")
    ring = Keyring.load(tmp_path)
    assert refused(ring) == "retired_key"
    entry = ring.entry("acme.chat")
    assert entry is not None and entry.id == "acme.chat@10"
    for default in ("acme.chat@2", "acme.other"):
        write(tmp_path, "acme.chat@2 retired", head=f'default = "{default}"')
        with pytest.raises(KeyringError, match="not an active key"):
            Keyring.load(tmp_path)


def test_an_empty_keyring_refuses(tmp_path: Path) -> None:
    write(tmp_path, head="[keys]")
    assert refused(Keyring.load(tmp_path)) == "no_key"


# ---------------------------------------------------------------- expiry


def test_after_expiry_nothing_is_marked(tmp_path: Path) -> None:
    write(tmp_path, "acme.chat@1 active 2026-06-01T00:00:00Z")
    ring = Keyring.load(tmp_path)
    before = AT - timedelta(microseconds=1)
    assert key_id(ring, at=before) == "acme.chat@1"
    for at in (AT, AT + timedelta(days=9000)):
        assert refused(ring, at=at) == refused(ring, at=at, mark=True) == "lease_expired"
        assert refused(ring, at=at, key="acme.chat@1/3") == "lease_expired"
    assert asked(ring, mark=False) == Unmarked(reason="opted_out")
    # An offset is the same moment.
    write(tmp_path, "acme.chat@1 active 2026-06-01T02:00:00+02:00")
    assert refused(Keyring.load(tmp_path)) == "lease_expired"


def test_a_keyring_may_say_to_go_on_without_the_mark(tmp_path: Path) -> None:
    line = "acme.chat@1 active 2026-06-01T00:00:00Z"
    write(tmp_path, line, head='default = "acme.chat"\nexpired = "unmarked"')
    ring = Keyring.load(tmp_path)
    gone = asked(ring)
    assert gone == Unmarked(reason="lease_expired") and gone.reason in orders.UNMARKED
    for asks in ({"mark": True}, {"key": "acme.chat"}, {"scheme": "gumbel"}):
        assert refused(ring, **asks) == "lease_expired"
    write(tmp_path, line, head='policy = "enforce"\nexpired = "unmarked"')
    with pytest.raises(KeyringError, match="change one of them"):
        Keyring.load(tmp_path)


@pytest.mark.parametrize("expires", ["2026-06-01", "2026-06-01T00:00:00", '"soon"', "12"])
def test_a_moment_has_a_zone(tmp_path: Path, expires: str) -> None:
    write(tmp_path, f"a active {expires}", head="")
    with pytest.raises(KeyringError, match="a moment with its zone"):
        Keyring.load(tmp_path)


def test_a_clock_that_is_set_back_renews_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    first = orders.now()
    assert abs(first - datetime.now(UTC)) < timedelta(minutes=5)

    class Back(datetime):
        @classmethod
        def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
            return datetime(2001, 1, 1, tzinfo=UTC)

    monkeypatch.setattr(orders, "datetime", Back)
    assert orders.now() >= first


# ---------------------------------------------------------------- the folder changes


def test_a_change_is_seen_after_a_second_and_not_before(tmp_path: Path) -> None:
    write(tmp_path, "acme.chat@1 active", "acme.chat@2 staged")
    clock = Clock()
    keys = LiveKeyring(tmp_path, clock=clock)
    first = keys.now()
    write(tmp_path, "acme.chat@1 retired", "acme.chat@2 active")
    clock.now += 0.9
    assert keys.now() is first and key_id(keys.now()) == "acme.chat@1"
    clock.now += 0.2
    assert key_id(keys.now()) == "acme.chat@2"
    # A request keeps the keyring that it was given.
    assert key_id(first) == "acme.chat@1"
    assert current(keys) is keys.now() and current(first) is first and current(None) is None


def test_a_renewed_lease_is_no_change(tmp_path: Path) -> None:
    write(tmp_path, "acme.chat@1 active 2026-06-01T00:00:00Z")
    keys = LiveKeyring(tmp_path)
    before = keys.now()
    write(tmp_path, "acme.chat@1 active 2027-06-01T00:00:00Z")
    after = keys.look()
    assert before.digest == after.digest and key_id(after) == "acme.chat@1"
    write(tmp_path, "acme.chat@1 retired 2027-06-01T00:00:00Z")
    assert keys.look().digest != after.digest


def test_nonsense_changes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, "acme.chat@1 active 2026-06-01T00:00:00Z")
    keys = LiveKeyring(tmp_path)
    good = (tmp_path / "keyring.toml").read_text()
    for bad in ("[keys.gone]", "nonsense", 'default = "x"\n[keys]', "\xff"):
        (tmp_path / "keyring.toml").write_text(bad, encoding="latin-1")
        for _ in range(3):
            assert key_id(keys.look(), at=AT - timedelta(1)) == "acme.chat@1"
    (tmp_path / "keyring.toml").unlink()
    assert key_id(keys.look(), at=AT - timedelta(1)) == "acme.chat@1"
    # It still ends when it ends: nobody makes a lease longer by damaging the folder.
    assert refused(keys.look()) == "lease_expired"
    said = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(said) == 5 and all("left as it was" in line for line in said)
    (tmp_path / "keyring.toml").write_text(good.replace("2026", "2036"))
    assert key_id(keys.look()) == "acme.chat@1"


def test_a_key_file_that_comes_after_its_name(tmp_path: Path) -> None:
    write(tmp_path, "a active", head="")
    keys = LiveKeyring(tmp_path)
    Key.generate("b").save(tmp_path / "elsewhere")
    (tmp_path / "keyring.toml").write_text("[keys.a]\n[keys.b]\n")
    assert "b" not in keys.look().entries
    (tmp_path / "elsewhere").rename(tmp_path / "b.key")
    assert "b" in keys.look().entries


def test_what_is_not_accepted_does_not_count(tmp_path: Path) -> None:
    write(tmp_path, "a active", head='schemes = ["gumbel"]')

    def accept(ring: Keyring) -> None:
        if any(scheme.name == "delta" for scheme in ring.schemes):
            raise NotReady("not on this machine.")

    keys = LiveKeyring(tmp_path, accept=accept)
    write(tmp_path, "a active", head='schemes = ["delta"]')
    assert [scheme.name for scheme in keys.look().schemes] == ["gumbel"]
    with pytest.raises(NotReady):
        LiveKeyring(tmp_path, accept=accept)


def test_what_was_there_is_remembered_for_a_day(tmp_path: Path) -> None:
    write(tmp_path, "acme.chat@1 active")
    clock = Clock()
    keys = LiveKeyring(tmp_path, clock=clock)
    old = keys.now().entries["acme.chat@1"]
    write(tmp_path, "acme.chat@2 active")
    clock.now += 5
    assert set(keys.now().entries) == {"acme.chat@2"}
    assert keys.known("acme.chat@1", old.key.fingerprint) is old
    assert keys.known("acme.chat@1", "0" * 16) is None
    # Not read yet, and asked for: it is read.
    write(tmp_path, "acme.chat@2 active", "acme.chat@3 active")
    new = Key.load(tmp_path / "acme.chat@3.key")
    found = keys.known("acme.chat@3", new.fingerprint)
    assert found is not None and found.key == new
    clock.now += 90_000
    write(tmp_path, "acme.chat@3 active")
    keys.look()
    assert keys.known("acme.chat@1", old.key.fingerprint) is None


def test_threads_see_whole_keyrings(tmp_path: Path) -> None:
    """Whoever looks sees the version of before or that of after, never both or neither."""
    write(tmp_path, "acme.chat@1 active", "acme.chat@2 staged")
    keys = LiveKeyring(tmp_path, every_s=0.0)
    seen, stop = set[tuple[str, ...]](), threading.Event()

    def ask() -> None:
        while not stop.is_set():
            ring = keys.now()
            seen.add(tuple(entry.id for entry in ring.entries.values() if entry.active))

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for number in range(30):
        states = ("active", "staged") if number % 2 else ("retired", "active")
        write(tmp_path, f"acme.chat@1 {states[0]}", f"acme.chat@2 {states[1]}")
    stop.set()
    for thread in threads:
        thread.join()
    assert seen <= {("acme.chat@1",), ("acme.chat@2",)} and seen


def test_it_shows_nothing(tmp_path: Path) -> None:
    write(tmp_path, "acme.chat@1 active")
    keys = LiveKeyring(tmp_path)
    body = keys.now().entries["acme.chat@1"].key.export_text().rpartition(":")[2]
    assert body not in repr(keys) and body not in repr(keys.now())
