"""One service for all tests that do not break theirs: SQLite, local root, identity provider."""

from collections.abc import Iterator

import pytest

from servicekit import Provider, Service, prepare, running


@pytest.fixture(scope="session")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Provider:
    return Provider(tmp_path_factory.mktemp("provider"))


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, provider: Provider) -> Iterator[Service]:
    made = prepare(
        tmp_path_factory.mktemp("service"),
        sections=provider.section + '[public]\ntenant = "demo"\n',
        log_level="debug",
    )
    with running(made):
        with made.client("key-admin") as client:
            spec = {"name": "chat", "model": "toy", "scheme": "gumbel", "slots": 2}
            assert client.post("/v1/keys", json=spec).status_code == 201
            assert client.post("/v1/keys/chat/versions/1/promote").status_code == 200
        yield made
