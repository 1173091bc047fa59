"""Leases of several tenants in one keyring folder, where engines find their keys.

    base.toml       the operator's: policy, schemes, tenants and tokens, keys of his own (optional)
    keyring.toml    written here, from base.toml and the leases; engines read this one
    leases.json     which lease holds what, and until when; no secret
    ID.key          one version of a key, mode 0600

Key files are written first and keyring.toml last, as a whole: an engine sees the keys of before or
those of after. A version's file never changes; what no lease holds any more is removed.
"""

import json
import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Self, final

from filigrane.adapters.leases.sealing import Lease, LeasedKey
from filigrane.errors import KeyFormatError, KeyringError
from filigrane.keys import Key, _Secret
from filigrane.private_files import new_file
from filigrane.serving.keyring import FILE, Keyring

__all__ = ["BASE", "LEASES", "LeaseFolder", "Leased"]

BASE: Final = "base.toml"
LEASES: Final = "leases.json"
_LOCK: Final = ".lease.lock"
_KEPT: Final = timedelta(days=1)
"""How long keys outlive their lease, so that requests are refused with the reason that it is over.
"""
_WRITTEN_BY: Final = (
    "# Written by `filigrane engine lease`, and again: what is yours goes into base.toml."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LeasedVersion:
    """One version in the folder: its id, state, scheme and fingerprint."""

    id: str
    state: str
    scheme: str
    fingerprint: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """What one lease has put into the folder. everybody: its keys serve requests of all tenants.

    expires: by this machine's clock.
    """

    tenant: str
    expires: datetime
    everybody: bool
    versions: tuple[LeasedVersion, ...]

    def says(self, other: "Leased") -> bool:
        """Whether another one says the same, until whenever."""
        return (self.everybody, self.versions) == (other.everybody, other.versions)


@final
class LeaseFolder:
    """A keyring folder that leases are written to; one process at a time. Used with `open`."""

    def __init__(self, path: Path) -> None:
        """See `open`."""
        self._path = path
        self._leased = _read_leases(path / LEASES)

    @classmethod
    @contextmanager
    def open(cls, path: str | os.PathLike[str]) -> Iterator[Self]:
        """Take the folder, made if need be (mode 0700). KeyringError if somebody else has it."""
        folder = Path(path)
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise KeyringError(f"{folder} cannot be written: {error.strerror}.") from None
        try:
            _lock(handle, folder)
            yield cls(folder)
        finally:
            os.close(handle)

    @property
    def leased(self) -> Mapping[str, Leased]:
        """By tenant, what is in the folder."""
        return dict(self._leased)

    def put(
        self, lease: Lease, *, expires: datetime, everybody: bool = False, at: datetime
    ) -> tuple[str, ...]:
        """Write a lease instead of the tenant's last one; ids of keys for other tools' marks.

        expires: by this machine's clock, of which `at` is the time. A lease that says what the last
        one said is written when half of that one's time is over: engines need not read what has not
        changed. Keys for other tools' marks have no place in a keyring and are not written. Raises
        KeyringError if a key cannot be read or the keyring would contradict itself; then nothing
        that an engine sees has changed.
        """
        schemes = [key for key in lease.keys if key.kind == "scheme"]
        keys = {leased.id: _key(leased) for leased in schemes}
        versions = tuple(
            LeasedVersion(
                id=leased.id,
                state=leased.state,
                scheme=leased.mark,
                fingerprint=keys[leased.id].fingerprint,
            )
            for leased in schemes
        )
        mine = Leased(tenant=lease.tenant, expires=expires, everybody=everybody, versions=versions)
        before = self._leased.get(lease.tenant)
        if before is not None and before.says(mine) and before.expires - at > lease.lifetime / 2:
            mine = before
        for id, key in keys.items():
            self._write_key(id, key)
        self._publish({**self._leased, lease.tenant: mine})
        return tuple(key.id for key in lease.keys if key.kind == "profile")

    def drop(self, tenant: str) -> tuple[str, ...]:
        """Take out a tenant's lease with its keys; their ids. Raises KeyringError."""
        gone = self._leased.get(tenant)
        if gone is None:
            return ()
        self._publish({name: lease for name, lease in self._leased.items() if name != tenant})
        return tuple(version.id for version in gone.versions)

    def sweep(self, at: datetime) -> tuple[str, ...]:
        """Take out keys whose lease has been over for a day; their ids. Raises KeyringError.

        Not where expired = "unmarked": without its key a request would be refused.
        """
        if self._base().get("expired") == "unmarked":
            return ()
        over = [name for name, lease in self._leased.items() if at - lease.expires >= _KEPT]
        return tuple(id for tenant in over for id in self.drop(tenant))

    def compose(self) -> None:
        """Write keyring.toml anew, after base.toml has changed or somebody has changed the other.

        Does nothing if it is as it would be written, or there is no lease yet.
        """
        if self._leased:
            self._publish(self._leased)

    def _publish(self, leased: dict[str, Leased]) -> None:
        now = self._now()
        text = compose(self._base(), leased, _defaults(now))
        if text != now:
            self._check(text)
            _replace(self._path / FILE, text)
        before = {version.id for lease in self._leased.values() for version in lease.versions}
        after = {version.id for lease in leased.values() for version in lease.versions}
        if leased != self._leased:
            _replace(self._path / LEASES, _written(leased))
        self._leased = leased
        for id in before - after:
            with suppress(FileNotFoundError):
                (self._path / f"{id}.key").unlink()

    def _write_key(self, id: str, key: Key) -> None:
        path = self._path / f"{id}.key"
        if path.exists():
            with suppress(KeyFormatError):
                if Key.load(path) == key:
                    return
        _replace(path, f"# leased; `filigrane engine lease` removes it\n{key.export_text()}\n")

    def _check(self, text: str) -> None:
        """Read it as an engine would, before an engine does."""
        trial = self._path / f".trial.{FILE}"
        _replace(trial, text)
        try:
            Keyring.load(self._path, file=trial.name)
        except KeyringError as error:
            said = str(error).replace(trial.name, FILE)
            raise KeyringError(f"{said} (From {BASE} and the leases; nothing changed.)") from None
        finally:
            trial.unlink()

    def _now(self) -> str | None:
        with suppress(OSError, UnicodeDecodeError):
            return (self._path / FILE).read_text("utf-8")
        return None

    def _base(self) -> dict[str, Any]:
        path = self._path / BASE
        try:
            return tomllib.loads(path.read_text("utf-8-sig"))
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise KeyringError(f"{path} cannot be read: {error}.") from None


def compose(
    base: Mapping[str, Any], leased: Mapping[str, Leased], before: Mapping[str | None, str]
) -> str:
    """The text of keyring.toml: what the operator says, and the keys of the leases.

    A tenant without a default gets its key if there is only one, whichever of its versions marks;
    and so does the server if there is one key for everybody. before: tenant (None: the server) ->
    the default of the keyring so far, which stays when a second key comes: requests that name none
    worked yesterday.
    """
    keys = {name: dict(table) for name, table in base.get("keys", {}).items()}
    tenants = {name: dict(table) for name, table in base.get("tenants", {}).items()}
    head = {name: value for name, value in base.items() if name not in ("keys", "tenants")}
    shared = set[str]()
    for tenant, lease in leased.items():
        names = {version.id.rpartition("@")[0] for version in lease.versions}
        for version in lease.versions:
            if version.id in keys:
                raise KeyringError(f"{BASE} has a key {version.id}, and a lease has one, too.")
            owner = {} if lease.everybody else {"tenant": tenant}
            keys[version.id] = owner | {
                "state": version.state,
                "expires": lease.expires,
                "schemes": [version.scheme],
            }
        if lease.everybody:
            shared |= names
        else:
            _set_default(tenants.setdefault(tenant, {}), names, before.get(tenant))
    _set_default(head, shared, before.get(None))
    for table in (head, *tenants.values()):
        _drop_default(table, keys, leased)
    lines = [_WRITTEN_BY, *_assignments(head)]
    if not keys:
        lines += ["", "[keys]"]  # none at all, and on purpose: everything is refused
    for kind, tables in (("keys", keys), ("tenants", tenants)):
        for name, table in tables.items():
            lines += ["", f"[{kind}.{json.dumps(name)}]", *_assignments(table)]
    return "\n".join(lines) + "\n"


def _set_default(table: dict[str, Any], names: set[str], before: str | None) -> None:
    if len(names) == 1:
        table.setdefault("default", *names)
    elif before in names:
        table.setdefault("default", before)


def _defaults(text: str | None) -> dict[str | None, str]:
    """Tenant (None: the server) -> default, of what this program has written."""
    try:
        found = tomllib.loads(text or "")
    except tomllib.TOMLDecodeError:
        return {}
    tables = {None: found, **found.get("tenants", {})}
    return {
        name: table["default"]
        for name, table in tables.items()
        if isinstance(table, dict) and isinstance(table.get("default"), str)
    }


def _drop_default(
    table: dict[str, Any], keys: Mapping[str, Mapping[str, Any]], leased: Mapping[str, Leased]
) -> None:
    """Take out a default that a lease no longer holds.

    A keyring with it would contradict itself and could not be written, and the key that is gone
    would go on marking.
    """
    default = table.get("default")
    if not isinstance(default, str) or default.partition(".")[0] not in leased:
        return
    marks = keys.get(default, {}).get("state") == "active"
    if not marks and not any(id.startswith(f"{default}@") for id in keys):
        del table["default"]


def _assignments(table: Mapping[str, Any]) -> list[str]:
    return [f"{name} = {_toml(value)}" for name, value in table.items()]


def _toml(value: object) -> str:
    """A value of keyring.toml. (JSON's strings and lists of them are TOML's, too.)"""
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    texts = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if texts or isinstance(value, str | bool | int):
        return json.dumps(value, ensure_ascii=False)
    raise KeyringError(f"{BASE} holds a value that no keyring has; see docs/serving.md.")


def _key(leased: LeasedKey) -> Key:
    try:
        return Key.from_text(leased.key.reveal())
    except KeyFormatError:
        raise KeyringError(f"the lease's key {leased.id} is not a key of filigrane.") from None


def _written(leased: Mapping[str, Leased]) -> str:
    content = {
        tenant: {
            "expires": lease.expires.astimezone(UTC).isoformat(),
            "everybody": lease.everybody,
            "versions": [
                {"id": v.id, "state": v.state, "scheme": v.scheme, "fingerprint": v.fingerprint}
                for v in lease.versions
            ],
        }
        for tenant, lease in leased.items()
    }
    return json.dumps({"v": 1, "leases": content}, indent=1) + "\n"


def _read_leases(path: Path) -> dict[str, Leased]:
    try:
        content = json.loads(path.read_text("utf-8"))
        return {
            tenant: Leased(
                tenant=tenant,
                expires=datetime.fromisoformat(lease["expires"]),
                everybody=bool(lease["everybody"]),
                versions=tuple(LeasedVersion(**version) for version in lease["versions"]),
            )
            for tenant, lease in content["leases"].items()
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise KeyringError(
            f"{path} is damaged: remove it and keyring.toml, and lease again."
        ) from None


def _replace(path: Path, text: str) -> None:
    """Write a file of mode 0600 as a whole, or leave it as it was. Raises KeyringError."""
    held = _Secret(text)
    del text
    temporary = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with suppress(FileNotFoundError):
            temporary.unlink()
        with new_file(temporary) as out:
            out.write(held.reveal().encode("utf-8"))
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise KeyringError(f"{path} cannot be written: {error.strerror}.") from None


def _lock(handle: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # not POSIX: whoever starts two is on their own
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise KeyringError(
            f"another `filigrane engine lease` works on {folder}; give each a folder, or one "
            "process several token files."
        ) from None
