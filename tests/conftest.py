"""Settings of the whole test suite.

A random test draws the same few cases every time, so that a run that fails is due to what was changed.
``FUNCPIPE_PROFILE=thorough pytest`` draws many more, others each time. A case that fails prints what repeats it.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tests run beside one another, and some start processes of their own: one thread each.
torch.set_num_threads(1)

# Tracing makes an example slow by nature, and the first one slower than the rest.
_ALWAYS = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=15, derandomize=True, **_ALWAYS)
settings.register_profile("thorough", max_examples=250, derandomize=False, **_ALWAYS)
settings.load_profile(os.environ.get("FUNCPIPE_PROFILE", "ci"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
