"""What the tests of the wrapper run under."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

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
