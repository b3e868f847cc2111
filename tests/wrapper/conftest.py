"""What the tests of the wrapper run under."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from tests.wrapper import cases, matrix
from tests.wrapper.ranks import Results, start


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only slow down matrices this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What four ranks came to, all of which have ended."""
    if not dist.is_gloo_available():
        pytest.skip("needs gloo")
    return start(tmp_path_factory.mktemp("ranks"), matrix.CASES | cases.CASES)
