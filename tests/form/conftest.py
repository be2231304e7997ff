import pytest

from autosloth.form import glance


@pytest.fixture(autouse=True)
def nothing_is_looked_up(monkeypatch, request):
    """Unless a test is about that."""
    if "looked_up" not in request.fixturenames:
        monkeypatch.setattr(glance, "PAUSE", 3600)
