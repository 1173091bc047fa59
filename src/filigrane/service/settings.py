"""What an operator writes down: one strict TOML file, read once, without a secret in it.

    [listen]      host, port, workers, TLS files, proxies that are believed
    [database]    url without password; password_file, or url_env
    [kms]         provider and what that provider asks for
    [oidc]        issuer, audience, keys of an identity provider; absent: API tokens only
    [limits]      sizes, times, counts
    [public]      the tier without a token; absent: there is none
    [tokenizers]  name = "folder, .gguf file, or alias"
    [detector]    alpha, age of what is kept in memory
    [engine]      lifetime of leases
    [telemetry]   log level, metrics
    [web]         the web page

Unknown names are refused: a misspelt limit would be no limit. Secrets are named by file or by
environment variable, never written here. Paths count from the file's own folder.
"""

import dataclasses
import difflib
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar, cast
from urllib.parse import parse_qsl, urlsplit

from filigrane.custody.hierarchy import check_name
from filigrane.errors import FiligraneError
from filigrane.keys import _Secret
from filigrane.private_files import open_to_others

if TYPE_CHECKING:
    from filigrane.service.office import Office

__all__ = [
    "DatabaseAt",
    "DetectorSettings",
    "EngineSettings",
    "Limits",
    "Listen",
    "Oidc",
    "PublicSettings",
    "Settings",
    "TelemetrySettings",
    "WebSettings",
    "open_office",
    "settings_path",
]

FILE: Final = "filigrane.toml"
ENVIRONMENT: Final = "FILIGRANE_CONFIG"
"""The variable by which the processes of a service, and the commands, find the file."""

ASYMMETRIC: Final = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512")
ASYMMETRIC_CURVES: Final = ("ES256", "ES384", "ES512", "EdDSA", "Ed25519")
_LOG_LEVELS: Final = ("debug", "info", "warning", "error")
_KMS_PATH: Final = re.compile(r"(path|folder|library|module|.*_file)")
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """Where the service listens. proxies: addresses whose X-Forwarded-For is believed."""

    host: str = "127.0.0.1"
    port: int = 8470
    workers: int = 1
    tls_certificate: Path | None = None
    tls_key: Path | None = None
    proxies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _within("listen.port", self.port, 1, 65535)
        _within("listen.workers", self.workers, 1, 256)
        if (self.tls_certificate is None) != (self.tls_key is None):
            raise FiligraneError(
                "[listen] TLS takes two files: name both tls_certificate and tls_key."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class DatabaseAt:
    """Where the database is. url: without a password; password_file: its one line is the password;
    url_env: a variable that holds the whole URL instead.
    """

    url: str = "sqlite:///filigrane.db"
    password_file: Path | None = None
    url_env: str | None = None

    def __post_init__(self) -> None:
        # Libraries of the database also take it as a parameter.
        named = [name.lower() for name, _ in parse_qsl(urlsplit(self.url).query)]
        if re.match(r"[^/]*//[^/@]*:[^@]+@", self.url) or any("password" in n for n in named):
            raise FiligraneError(
                "[database] url holds a password; put it into a file that only the service can "
                "read, and name that as password_file."
            )

    def open_url(self) -> _Secret[str]:
        """The URL with its password, for the library of the database alone."""
        if self.url_env is not None:
            value = os.environ.get(self.url_env)
            if not value:
                raise FiligraneError(f"[database] url_env: set the variable {self.url_env}.")
            return _Secret(value)
        if self.password_file is None:
            return _Secret(self.url)
        from sqlalchemy.engine import make_url

        password = secret_line(self.password_file, "[database] password_file")
        url = make_url(self.url).set(password=password.reveal())
        return _Secret(url.render_as_string(hide_password=False))


@dataclass(frozen=True, slots=True, kw_only=True)
class Oidc:
    """An identity provider whose JWTs are accepted as bearer tokens.

    issuer, audience: what `iss` and `aud` must be; jwks_file or jwks_url: its public keys;
    algorithms: asymmetric ones; tenant_claim, roles_claim: where a token says for whom it acts
    (roles by the names of the service); leeway_s: how far clocks may differ.
    """

    issuer: str
    audience: str
    jwks_file: Path | None = None
    jwks_url: str | None = None
    jwks_lifetime_s: float = 300.0
    algorithms: tuple[str, ...] = ("RS256", "ES256", "EdDSA")
    tenant_claim: str = "filigrane_tenant"
    roles_claim: str = "filigrane_roles"
    leeway_s: int = 60

    def __post_init__(self) -> None:
        if not self.issuer or not self.audience:
            raise FiligraneError("[oidc] needs an issuer and an audience; without them any token.")
        if (self.jwks_file is None) == (self.jwks_url is None):
            raise FiligraneError("[oidc] name one place of the keys: jwks_file or jwks_url.")
        if self.jwks_url is not None and not re.match(
            r"https://|http://(127\.0\.0\.1|\[::1\]|localhost)[:/]", self.jwks_url
        ):
            raise FiligraneError("[oidc] jwks_url must be https: whoever changes keys can sign.")
        known = (*ASYMMETRIC, *ASYMMETRIC_CURVES)
        if not self.algorithms or any(name not in known for name in self.algorithms):
            # With HS256 the public key of the provider would be the secret.
            raise FiligraneError(f"[oidc] algorithms are among {', '.join(known)}.")
        _within("oidc.leeway_s", self.leeway_s, 0, 60)
        _within("oidc.jwks_lifetime_s", self.jwks_lifetime_s, 1, 86_400)


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Sizes, times and counts beyond which a request is refused before it costs anything.

    body_bytes: of one request; job_bytes, job_items: of one job; batch_items: of one batch;
    text_tokens: of one text; seconds: until an answer begins, trace_seconds: of a trace;
    body_seconds: until a body is here; unfinished: requests at a time of one address that are not
    sent to their end; buffered_bytes: of all bodies that are in memory at a time, a quarter of it
    from one address; concurrent: requests at a time, all three of one process; page: entries of a
    list at a time;
    secret_lifetime_s: how long a tenant's secret stays in memory; token_cache_s: how long an
    answer about a token is believed, and outage_s while the database does not answer; job_chunk,
    job_lease_s: how many items a worker takes at a time, and for how long; job_days: how long
    results are kept; expert_per_minute: texts that one process tests for one token of the expert
    tier, jobs aside, of which one thread does one item after another.
    """

    body_bytes: int = 2_000_000
    job_bytes: int = 64_000_000
    job_items: int = 10_000
    batch_items: int = 256
    text_tokens: int = 200_000
    seconds: float = 30.0
    trace_seconds: float = 120.0
    body_seconds: float = 20.0
    unfinished: int = 256
    buffered_bytes: int = 256_000_000
    concurrent: int = 512
    page: int = 100
    secret_lifetime_s: float = 600.0
    token_cache_s: float = 2.0
    outage_s: float = 300.0
    job_chunk: int = 32
    job_lease_s: float = 60.0
    job_days: float = 7.0
    expert_per_minute: int = 100_000

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            _within(f"limits.{item.name}", getattr(self, item.name), 1e-3, 1e12)
        _within("limits.job_items", self.job_items, 1, 10_000)
        _within("limits.expert_per_minute", self.expert_per_minute, 1, 1e9)
        _within("limits.token_cache_s", self.token_cache_s, 0.001, 10)
        least = max(self.job_bytes, 4 * self.body_bytes)
        _within("limits.buffered_bytes", self.buffered_bytes, least, 1e12)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicSettings:
    """The tier without a token: whose keys it reads, and how much anybody may ask.

    min_tokens: shorter texts are "too_short"; per_identity, per_network: of one address and of
    its network (/24, /48), in the words of `limits` ("30/minute"); near_duplicates: how many texts
    that are nearly alike one identity, or one network without identities, may ask about in an hour,
    and fifty times as many all together; max_characters: of one text; receipts: rate of signed
    receipts, each a line in the log for ever, of one identity or network.
    """

    tenant: str
    min_tokens: int = 200
    per_identity: str = "30/minute"
    per_network: str = "120/minute"
    near_duplicates: int = 20
    max_characters: int = 20_000
    receipts: str = "20/hour"

    def __post_init__(self) -> None:
        check_name("tenant", self.tenant)
        _within("public.min_tokens", self.min_tokens, 1, 1_000_000)
        _within("public.near_duplicates", self.near_duplicates, 1, 1_000_000)
        _within("public.max_characters", self.max_characters, 1, 10_000_000)


@dataclass(frozen=True, slots=True, kw_only=True)
class DetectorSettings:
    """alpha: what requests that name none are tested at; revalidate_s: how long a tenant's keys are
    used without asking the database whether they changed.
    """

    alpha: float = 1e-6
    revalidate_s: float = 1.0

    def __post_init__(self) -> None:
        _within("detector.alpha", self.alpha, 1e-300, 0.1)
        _within("detector.revalidate_s", self.revalidate_s, 0, 60)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """lease_s: how long an engine may mark without asking again."""

    lease_s: int = 3600

    def __post_init__(self) -> None:
        _within("engine.lease_s", self.lease_s, 10, 604_800)


@dataclass(frozen=True, slots=True, kw_only=True)
class TelemetrySettings:
    """log_level: debug, info, warning or error; metrics: whether /metrics answers. Spans are
    switched on by the standard OTEL_* variables.
    """

    log_level: str = "info"
    metrics: bool = True

    def __post_init__(self) -> None:
        if self.log_level not in _LOG_LEVELS:
            raise FiligraneError(f"[telemetry] log_level is one of {', '.join(_LOG_LEVELS)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class WebSettings:
    """enabled: whether there is a web page; session_s: how long a log-in lasts; secure_cookie: off
    only where the page is reached without TLS, on one machine.
    """

    enabled: bool = True
    session_s: int = 3600
    secure_cookie: bool = True

    def __post_init__(self) -> None:
        _within("web.session_s", self.session_s, 60, 86_400)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All of the file. folder: where it lies, from which its paths count.

    kms: the table for `filigrane.kms.opening.open_kms`; tokenizers: name -> path or alias.
    """

    folder: Path
    kms: Mapping[str, str]
    listen: Listen = field(default_factory=Listen)
    database: DatabaseAt = field(default_factory=DatabaseAt)
    oidc: Oidc | None = None
    limits: Limits = field(default_factory=Limits)
    public: PublicSettings | None = None
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    detector: DetectorSettings = field(default_factory=DetectorSettings)
    engine: EngineSettings = field(default_factory=EngineSettings)
    telemetry: TelemetrySettings = field(default_factory=TelemetrySettings)
    web: WebSettings = field(default_factory=WebSettings)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file. Raises FiligraneError, naming the file and what is wrong in it."""
        where = Path(path)
        try:
            content = tomllib.loads(where.read_text("utf-8-sig"))
        except FileNotFoundError:
            raise FiligraneError(
                f"{where} does not exist; `filigrane serve --init FOLDER` writes one."
            ) from None
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise FiligraneError(f"{where} cannot be read: {error}.") from None
        try:
            return cls._of(where.absolute().parent, content)
        except FiligraneError as error:
            raise FiligraneError(f"{where}: {error}") from None

    @classmethod
    def _of(cls, folder: Path, content: dict[str, Any]) -> Self:
        sections = {item.name for item in dataclasses.fields(cls)} - {"folder"}
        _only("the file", content, sections)
        hints = typing.get_type_hints(cls)
        found: dict[str, Any] = {"folder": folder}
        for name, table in content.items():
            if not isinstance(table, dict):
                raise FiligraneError(f"{name} is a table; write [{name}].")
            kind = _plain(hints[name])
            if dataclasses.is_dataclass(kind):
                found[name] = _section(cast(type, kind), name, table, folder)
            else:
                found[name] = _texts(name, table)
        if "provider" not in found.get("kms", {}):
            raise FiligraneError("add a table [kms] with a provider: local, transit, aws, pkcs11.")
        found["kms"] = {
            name: str(folder / value) if _KMS_PATH.fullmatch(name) else value
            for name, value in found["kms"].items()
        }
        found["tokenizers"] = {
            # An alias is no path, unless there is something of that name.
            name: str(folder / value) if value and (folder / value).exists() else value
            for name, value in found.get("tokenizers", {}).items()
        }
        settings = cls(**found)
        return dataclasses.replace(
            settings,
            database=dataclasses.replace(
                settings.database, url=_absolute(settings.database.url, folder)
            ),
        )

    @classmethod
    def initial(cls, folder: str | os.PathLike[str], tenant: str = "demo") -> Self:
        """Write a first service into a new folder, and read its settings.

        The folder (0700) gets filigrane.toml, a root key with its passphrase, a SQLite database
        with one tenant, and tokens.json: role -> API token; every file 0600. Raises FiligraneError
        if there is a service already.
        """
        from filigrane.service.initial import write

        return cls.load(write(Path(folder), tenant))


def settings_path(named: str | os.PathLike[str] | None) -> Path:
    """The settings file: the one named, else the one of FILIGRANE_CONFIG, else filigrane.toml."""
    return Path(named or os.environ.get(ENVIRONMENT) or FILE)


def secret_line(path: Path, what: str) -> _Secret[str]:
    """The one line of a file that only its owner can read; FiligraneError otherwise."""
    try:
        exposed = open_to_others(path, path.stat())
        if exposed is not None:
            raise FiligraneError(f"{what}: {path}: {exposed}.")
        text = _Secret(path.read_text("utf-8").strip("\r\n"))
    except (OSError, UnicodeDecodeError):
        raise FiligraneError(f"{what}: {path} cannot be read; write the secret into it.") from None
    if not text.reveal() or "\n" in text.reveal():
        raise FiligraneError(f"{what}: {path} must hold exactly one line.")
    return text


def _section(kind: type[_T], name: str, table: dict[str, Any], folder: Path) -> _T:
    fields = {item.name: item for item in dataclasses.fields(cast(Any, kind))}
    _only(f"[{name}]", table, set(fields))
    hints = typing.get_type_hints(kind)
    values = {
        key: _value(f"{name}.{key}", _plain(hints[key]), value, folder)
        for key, value in table.items()
    }
    for key, item in fields.items():
        if (
            key not in values
            and item.default is dataclasses.MISSING
            and item.default_factory is dataclasses.MISSING
        ):
            raise FiligraneError(f"[{name}] lacks {key}.")
    return kind(**values)


def _value(where: str, kind: Any, value: object, folder: Path) -> object:
    if kind is Path and isinstance(value, str) and value:
        return folder / value
    if kind is str and isinstance(value, str) and value:
        return value
    if kind is bool and isinstance(value, bool):
        return value
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        return value
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if (
        typing.get_origin(kind) is tuple
        and isinstance(value, list)
        and all(isinstance(item, str) for item in value)
    ):
        return tuple(value)
    words = {Path: "a path", str: "a text", bool: "true or false", int: "a whole number"}
    raise FiligraneError(
        f"{where} must be {words.get(kind, 'a number' if kind is float else 'a list of texts')}."
    )


def _texts(name: str, table: dict[str, Any]) -> dict[str, str]:
    for key, value in table.items():
        if not isinstance(value, str):
            raise FiligraneError(f'{name}.{key} must be a text: write {key} = "...".')
    return dict(table)


def _plain(hint: Any) -> Any:
    """The type of `X | None` without None."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _only(where: str, table: Mapping[str, object], known: set[str]) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        said = ", ".join(name + _instead_of(name, known) for name in unknown)
        raise FiligraneError(f"{where} has {said}; known are {', '.join(sorted(known))}.")


def _instead_of(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _within(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise FiligraneError(f"{name} is {value:g}; use {low:g} to {high:g}.")


def _absolute(url: str, folder: Path) -> str:
    """A SQLite URL whose path does not depend on where the process was started."""
    head = "sqlite:///"
    if not url.startswith(head) or url.startswith(head + "/") or url == head + ":memory:":
        return url
    return head + str(folder / url.removeprefix(head))


def open_office(settings: Settings) -> "Office":
    """`filigrane.service.office.open_office`."""
    from filigrane.service import office

    return office.open_office(settings)
