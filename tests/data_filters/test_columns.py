import numpy as np
import pytest
from filter_tables import row, table

from afterglow.data_filters.columns import all_null, arrow_column, source_names, values_of

ROWS = [row(f"r{n}", source="ab"[n % 2] if n % 3 else None, correct=None) for n in range(2_500)]  # three record batches


@pytest.mark.parametrize("chosen", [range(2_500), range(900, 1_200), [2_400, 3, 3, 1_001], []])
def test_a_column_is_that_of_the_selected_rows(chosen):
    rows = table(ROWS).select(chosen)
    assert values_of(rows, "id") == [ROWS[n]["id"] for n in chosen]
    assert source_names(rows) == [ROWS[n]["source"] or "(no source)" for n in chosen]
    assert all_null(rows, "correct") and all_null(rows, "id") == (not len(chosen))


def test_a_selection_has_no_chunk_for_each_row_and_a_source_is_one_object():
    rows = table(ROWS).select(np.flatnonzero(np.arange(2_500) % 5)).add_column("score", [0.5] * 2_000)
    assert arrow_column(rows, "id").num_chunks <= 3
    assert values_of(rows, "score") == [0.5] * 2_000
    assert len({id(name) for name in source_names(rows)}) == 3
