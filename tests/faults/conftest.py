import os
from pathlib import Path

import pytest

from tests.faults.harness import Reference, make_reference


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> Reference:
    """The run that nothing disturbed; both processes of pytest share it."""
    base: Path = tmp_path_factory.getbasetemp()
    return make_reference((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "R")
