"""One real system per provider for all tests of key management."""

from collections.abc import Iterator

import pytest

import kmskit


@pytest.fixture(scope="session")
def transit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kmskit.System]:
    with kmskit.running("transit", tmp_path_factory.mktemp("kms")) as system:
        yield system


@pytest.fixture(scope="session")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kmskit.System]:
    with kmskit.running("aws", tmp_path_factory.mktemp("kms")) as system:
        yield system


@pytest.fixture(scope="session")
def pkcs11_token(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kmskit.System]:
    with kmskit.running("pkcs11", tmp_path_factory.mktemp("kms")) as system:
        yield system


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Iterator[kmskit.System]:
    with kmskit.running("local", tmp_path_factory.mktemp("kms")) as system:
        yield system


@pytest.fixture
def system(request: pytest.FixtureRequest) -> kmskit.System:
    """The system of a provider; a test that rotates takes a root of its own with renew()."""
    name = {"pkcs11": "pkcs11_token"}.get(request.param, request.param)
    found: kmskit.System = request.getfixturevalue(name)
    return found
