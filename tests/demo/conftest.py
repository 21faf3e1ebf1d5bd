from __future__ import annotations

from pathlib import Path

import pytest

from scale_rae.demo.work import Studio
from scale_rae.opening import OpenedModel
from scale_rae.options import ModelChoice


@pytest.fixture(scope="package")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    choice = ModelChoice("shapes", device="cpu")
    return Studio(OpenedModel(choice, decoder=True), choice, Path(tmp_path_factory.mktemp("drawn")))
