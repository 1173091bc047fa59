"""Fixtures that more than one test file uses."""

import pytest
from hypothesis import settings

from filigrane.adapters.models import LoadedModel, load

# The first example of a test may compile a kernel; that is no reason to fail.
settings.register_profile("filigrane", deadline=None)
settings.load_profile("filigrane")


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """SmolLM2-135M-Instruct in float32; a test that takes it is marked `model`."""
    return load("smollm2")
