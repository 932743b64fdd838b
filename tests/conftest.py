"""Fixtures that several packages' tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with golden outputs and test pictures that CI has beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (golden outputs, test pictures), which a user's clone does not have")
    return SHARED
