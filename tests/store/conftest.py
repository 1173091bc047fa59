"""A PostgreSQL for all tests of the store, and stores of both kinds."""

from collections.abc import Iterator
from pathlib import Path

import pytest

import pgkit
import storekit
from filigrane.keys import _Secret
from filigrane.kms.local import LocalRoot


@pytest.fixture(scope="session")
def cluster() -> Iterator[pgkit.Cluster]:
    with pgkit.cluster() as made:
        yield made


@pytest.fixture(scope="session")
def root_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("root") / "root"


@pytest.fixture(scope="session")
def kms(root_path: Path) -> Iterator[LocalRoot]:
    root = LocalRoot.create(root_path, _Secret("a passphrase for tests alone"))
    yield root
    root.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def dialect(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def stores(
    dialect: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[storekit.Stores]:
    cluster = request.getfixturevalue("cluster") if dialect == "postgresql" else None
    with storekit.stores(tmp_path, cluster) as made:
        yield made


@pytest.fixture
def store(stores: storekit.Stores, kms: LocalRoot) -> storekit.Opened:
    """A fresh store with the tenant acme."""
    opened = stores.fresh(kms)
    opened.keybook.create_tenant("acme", actor="operator")
    return opened
