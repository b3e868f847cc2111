"""What the tests of the wrapper run under."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
import torch.distributed as dist

from tests.wrapper import cases, matrix
from tests.wrapper.ranks import Results, start

Disk = Callable[[int], AbstractContextManager[None]]


@pytest.fixture
def disk_with_room_for() -> Disk:
    """Lets no file grow beyond a number of bytes, as a full disk would."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limited


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
