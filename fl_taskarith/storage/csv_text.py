"""The one writer of CSV text for tables: floats read back to the same bits, what is unknown is an empty cell."""

import csv
import io
from collections.abc import Mapping, Sequence


def csv_text(records: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """Return CSV text with one line per record below a header.

    Floats are written by repr. None, NaN and absent columns become empty cells.

    Args:
        columns: the header; by default the keys of the first record, and no header without a record.

    Raises:
        ValueError: a record has a key that is no column.
    """
    if columns is None:
        columns = list(records[0]) if records else []
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if columns:
        writer.writeheader()
    for record in records:
        writer.writerow({key: "" if value is None or value != value else value for key, value in record.items()})
    return text.getvalue()
