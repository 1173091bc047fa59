"""One deployment for all tests: they leave it as they found it, or better."""

from collections.abc import Iterator

import pytest
from deploykit import Site, deployed


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with deployed(tmp_path_factory.mktemp("site")) as made:
        yield made
