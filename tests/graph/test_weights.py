import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from llmc.graph.weights import (
    CastRows,
    ConcatRows,
    LazyWeight,
    StoredRows,
    TensorInfo,
    TransposedRows,
    read_all,
    row_chunks,
)


class Store:
    """Arrays by name, counting what is read."""

    def __init__(self, **arrays: np.ndarray) -> None:
        self.arrays = arrays
        self.rows_read = 0

    def infos(self) -> dict[str, TensorInfo]:
        return {n: TensorInfo(n, a.shape, ir.DataType.from_numpy(a.dtype)) for n, a in self.arrays.items()}

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        rows = self.arrays[name][start:stop]
        self.rows_read += len(rows)
        return rows

    def rows(self, name: str) -> StoredRows:
        return StoredRows(self, self.infos()[name])


@pytest.fixture
def store() -> Store:
    return Store(
        a=np.arange(12, dtype=np.float32).reshape(4, 3), b=-np.arange(6, dtype=np.float32).reshape(2, 3)
    )


def test_concat_reads_only_the_rows_asked_for(store: Store) -> None:
    joined = ConcatRows((store.rows("a"), store.rows("b")))
    assert joined.shape == (6, 3)
    assert joined.sources == ("a", "b")
    np.testing.assert_array_equal(joined.rows(3, 5), [[9, 10, 11], [0, -1, -2]])
    assert store.rows_read == 2


def test_transposed(store: Store) -> None:
    rows = TransposedRows(store.rows("a"))
    assert rows.shape == (3, 4)
    np.testing.assert_array_equal(rows.rows(1, 2), [[1, 4, 7, 10]])


def test_cast_from_bfloat16() -> None:
    store = Store(w=np.array([[1.5, 2.25]], dtype=ml_dtypes.bfloat16))
    rows = CastRows(store.rows("w"), ir.DataType.FLOAT)
    assert read_all(rows).dtype == np.float32
    np.testing.assert_array_equal(read_all(rows), [[1.5, 2.25]])


def test_chunks_cover_every_row_once(store: Store) -> None:
    chunks = list(row_chunks(store.rows("a"), chunk_bytes=24))
    assert chunks == [(0, 2), (2, 4)]


def test_a_row_larger_than_a_chunk_is_a_chunk(store: Store) -> None:
    assert list(row_chunks(store.rows("b"), chunk_bytes=1)) == [(0, 1), (1, 2)]


def test_a_scalar_is_one_chunk() -> None:
    assert list(row_chunks(Store(c=np.float32(3.0).reshape(())).rows("c"))) == [(0, 1)]


def test_lazy_weight_reads_when_asked_and_keeps_nothing(store: Store) -> None:
    weight = LazyWeight.from_rows("w", store.rows("a"))
    assert store.rows_read == 0
    np.testing.assert_array_equal(weight.numpy(), store.arrays["a"])
    np.testing.assert_array_equal(weight.numpy(), store.arrays["a"])
    assert store.rows_read == 8
