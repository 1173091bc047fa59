"""Fixtures that more than one test file uses."""

import pytest

from filigrane.adapters.models import LoadedModel, load


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """SmolLM2-135M-Instruct in float32; a test that takes it is marked `model`."""
    return load("smollm2")
