"""The ranks that the tests of the update wing share."""

import pytest
import torch.distributed as dist

from tests.update import cases, matrix
from tests.update.ranks import Results, start


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The results of four ranks, all of which have ended."""
    if not dist.is_gloo_available():
        pytest.skip("needs gloo")
    return start(tmp_path_factory.mktemp("ranks"), matrix.CASES | cases.CASES)
