from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from scale_rae.demo.shared_model import SharedModel
from scale_rae.opening import OpenedModel
from scale_rae.options import ModelChoice

needs_gradio = pytest.mark.skipif(importlib.util.find_spec("gradio") is None, reason="needs the extra `demo`")


@pytest.fixture(scope="package")
def shared(tmp_path_factory: pytest.TempPathFactory) -> SharedModel:
    choice = ModelChoice("shapes", device="cpu")
    return SharedModel(OpenedModel(choice, decoder=True), choice, Path(tmp_path_factory.mktemp("drawn")))
