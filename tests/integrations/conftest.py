"""What the tests of several stacks compare with."""

import pytest

from tests.integrations.exact import log, plain


@pytest.fixture(scope="module")
def plain_log(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The log of a plain loop over the same batches."""
    plain(folder := tmp_path_factory.mktemp("plain"))
    return log(folder)
