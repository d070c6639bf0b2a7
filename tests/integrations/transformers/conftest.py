"""Shared by the tests of the transformers integration."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _eager():
    """Switch off torch.compile in transformers: it takes a minute, and changes only roundings."""
    with torch.compiler.set_stance("force_eager"):
        yield
