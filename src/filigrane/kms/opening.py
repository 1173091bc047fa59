"""Which key management a settings file means, opened.

    provider = "local"      path, passphrase_file or passphrase_env
    provider = "transit"    address, key (filigrane), mount (transit), namespace, ca_file,
                            token_file or token_env, timeout_s (5)
    provider = "aws"        prefix (filigrane), region, profile, endpoint, timeout_s (5);
                            credentials by the AWS SDK's own chain
    provider = "pkcs11"     module, token, label (filigrane), pin_file or pin_env, timeout_s (5)

Secrets are never among the values: only the names of files (readable by their owner alone) and of
environment variables that hold them.
"""

import os
from collections.abc import Callable, Mapping
from typing import Final

from filigrane.errors import KmsError
from filigrane.keys import _Secret
from filigrane.kms.base import KeyManagement
from filigrane.private_files import open_to_others

__all__ = ["PROVIDERS", "create_kms", "open_kms"]


_MAX_FILE_BYTES: Final = 65_536


def open_kms(settings: Mapping[str, str]) -> KeyManagement:
    """The key management that settings name, its root existing.

    Raises KmsError for settings that make no sense, a root that is not there or a refusal;
    KmsUnavailable if it does not answer; MissingDependency if its package is not installed.
    """
    return _provider(settings)(_Settings(settings), False)


def create_kms(settings: Mapping[str, str]) -> KeyManagement:
    """The same with a new root of one version; KmsError if there is one under this name."""
    return _provider(settings)(_Settings(settings), True)


class _Settings:
    """Reads each setting once and refuses what nobody read."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        self.__left = {name: value for name, value in settings.items() if name != "provider"}

    def text(self, name: str, default: str | None = None) -> str:
        value = self.__left.pop(name, default)
        if value is None:
            raise KmsError(f"the setting {name} of the key management is missing.")
        if not isinstance(value, str):
            raise KmsError(f"the setting {name} of the key management is not text.")
        return value

    def optional(self, name: str) -> str | None:
        return self.text(name) if name in self.__left else None

    def seconds(self, name: str, default: str) -> float:
        try:
            value = float(self.text(name, default))
        except ValueError:
            value = 0.0
        if not 0.1 <= value <= 60:
            raise KmsError(f"the setting {name} of the key management is 0.1 to 60 seconds.")
        return value

    def source(self, name: str) -> Callable[[], _Secret[str]]:
        """How to read a secret: from the file of name_file, or the variable of name_env."""
        file, variable = self.optional(f"{name}_file"), self.optional(f"{name}_env")
        if (file is None) == (variable is None):
            raise KmsError(
                f"say where the {name} is, in one place: {name}_file, a file that only its owner "
                f"reads, or {name}_env, the name of an environment variable."
            )
        return lambda: _read_secret(name, file, variable)

    def done(self) -> None:
        if self.__left:
            names = ", ".join(sorted(self.__left))
            raise KmsError(f"this provider has no setting {names}; docs/kms.md lists them.")


def _read_secret(name: str, file: str | None, variable: str | None) -> _Secret[str]:
    if variable is not None:
        held = _Secret(os.environ.get(variable, "").strip())
        if not held.reveal():
            raise KmsError(f"the environment variable {variable}, for the {name}, is not set.")
        return held
    assert file is not None
    try:
        # Opened first and looked at after, so that what is checked is what is read.
        with open(file, "rb") as stream:
            about = os.fstat(stream.fileno())
            exposed = open_to_others(file, about)
            if exposed is not None:
                raise KmsError(
                    f"{file}: {exposed}; it holds the {name}: if somebody may have read it, "
                    "change it."
                )
            data = _Secret(stream.read(_MAX_FILE_BYTES + 1))
    except KmsError:
        raise
    except OSError as error:
        raise KmsError(
            f"{file}: this file, which should hold the {name}, cannot be read ({error.strerror})."
        ) from None
    held = _Secret(data.reveal().decode("utf-8", "replace").strip())
    if not held.reveal() or len(data.reveal()) > _MAX_FILE_BYTES or "\ufffd" in held.reveal():
        raise KmsError(f"{file}: this file should hold the {name}, one line of text.")
    return held


def _local(settings: _Settings, new: bool) -> KeyManagement:
    from filigrane.kms.local import LocalRoot

    path, passphrase = settings.text("path"), settings.source("passphrase")
    settings.done()
    return (LocalRoot.create if new else LocalRoot.open)(path, passphrase())


def _transit(settings: _Settings, new: bool) -> KeyManagement:
    from filigrane.kms.transit import TransitPlace, TransitRoot

    place = TransitPlace(
        address=settings.text("address"),
        token=settings.source("token"),
        key=settings.text("key", "filigrane"),
        mount=settings.text("mount", "transit"),
        namespace=settings.optional("namespace"),
        ca_file=settings.optional("ca_file"),
        timeout_s=settings.seconds("timeout_s", "5"),
    )
    settings.done()
    return (TransitRoot.create if new else TransitRoot.open)(place)


def _aws(settings: _Settings, new: bool) -> KeyManagement:
    from filigrane.kms.aws import AwsPlace, AwsRoot

    place = AwsPlace(
        prefix=settings.text("prefix", "filigrane"),
        region=settings.optional("region"),
        profile=settings.optional("profile"),
        endpoint=settings.optional("endpoint"),
        timeout_s=settings.seconds("timeout_s", "5"),
    )
    settings.done()
    return (AwsRoot.create if new else AwsRoot.open)(place)


def _pkcs11(settings: _Settings, new: bool) -> KeyManagement:
    from filigrane.kms.pkcs11 import Pkcs11Place, Pkcs11Root

    place = Pkcs11Place(
        module=settings.text("module"),
        token=settings.text("token"),
        pin=settings.source("pin"),
        label=settings.text("label", "filigrane"),
        timeout_s=settings.seconds("timeout_s", "5"),
    )
    settings.done()
    return (Pkcs11Root.create if new else Pkcs11Root.open)(place)


PROVIDERS: Final[Mapping[str, Callable[[_Settings, bool], KeyManagement]]] = {
    "local": _local,
    "transit": _transit,
    "aws": _aws,
    "pkcs11": _pkcs11,
}
"""Name of a provider -> how it is opened, or made."""


def _provider(settings: Mapping[str, str]) -> Callable[[_Settings, bool], KeyManagement]:
    name = settings.get("provider", "")
    if name not in PROVIDERS:
        raise KmsError(f"the key management's provider is one of {', '.join(PROVIDERS)}.")
    return PROVIDERS[name]
