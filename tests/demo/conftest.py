from __future__ import annotations

from pathlib import Path

import pytest

from scale_rae.demo.shared_model import SharedModel
from scale_rae.opening import OpenedModel
from scale_rae.options import ModelChoice


@pytest.fixture(scope="package")
def shared(tmp_path_factory: pytest.TempPathFactory) -> SharedModel:
    choice = ModelChoice("shapes", device="cpu")
    return SharedModel(OpenedModel(choice, decoder=True), choice, Path(tmp_path_factory.mktemp("drawn")))
