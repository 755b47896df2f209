"""Libraries of these tests go into a cache of their own."""

from collections.abc import Iterator

import pytest

from tests.caches import own_cache


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLMC_CACHE", own_cache(tmp_path_factory.mktemp("cache")))
        yield
