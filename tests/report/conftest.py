"""What the tests of reports share: all studies, made up, and no TeX but in slow tests."""

from pathlib import Path

import pytest
from report_studies import write_studies


@pytest.fixture(autouse=True)
def _no_tex(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Typesetting takes seconds: only tests marked `slow` do it."""
    if "slow" not in request.keywords:
        monkeypatch.setattr("fl_taskarith.report.document.find_tex", lambda: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All seven studies."""
    return write_studies(tmp_path_factory.mktemp("digits"))
