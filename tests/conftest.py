"""Tiers, and fixtures that more than one test file uses."""

from pathlib import Path

import pytest
from hypothesis import settings

from filigrane.adapters.models import LoadedModel, load

# The first example of a test may compile a kernel; that is no reason to fail.
settings.register_profile("filigrane", deadline=None)
settings.load_profile("filigrane")

HERE = Path(__file__).parent
SLOW = {
    HERE / "adapters",
    HERE / "cli",
    HERE / "deploy",
    HERE / "kms",
    HERE / "service",
    HERE / "store",
    HERE / "study",
    HERE / "test_bench.py",
    HERE / "test_models.py",
}


def is_slow(path: Path) -> bool:
    """Whether a whole file belongs to the slow tier; single tests say so with the marker."""
    return bool(SLOW & {path, *path.parents})


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Importing a framework takes longer than all core tests: do not even look at such files."""
    if "not slow" in config.getoption("markexpr") and is_slow(collection_path):
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests of slow files."""
    for item in items:
        if is_slow(item.path):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """SmolLM2-135M-Instruct in float32; a test that takes it is marked `model`."""
    return load("smollm2")
