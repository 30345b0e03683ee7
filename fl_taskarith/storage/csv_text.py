"""The one writer of CSV text for tables: floats read back to the same bits, what is unknown is an empty cell.

A spreadsheet takes words that begin as `FORMULA` for one, and some formulas run programs. Such words are written behind
an apostrophe, which `plain_words` takes off again.
"""

import csv
import io
import re
from collections.abc import Mapping, Sequence

FORMULA = "[=+@\t-]"


def csv_text(records: Sequence[Mapping[str, object]], columns: Sequence[str] | None = None) -> str:
    """Return CSV text with one line per record below a header.

    Floats are written by repr. None, NaN and absent columns become empty cells; words never become formulas.

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
        writer.writerow({column: _cell(column) for column in columns})
    for record in records:
        writer.writerow({key: _cell(value) for key, value in record.items()})
    return text.getvalue()


def plain_words(cell: str) -> str:
    """Return the words that `csv_text` wrote as this cell."""
    return cell[1:] if re.match(f"'+{FORMULA}", cell) else cell


def _cell(value: object) -> object:
    if isinstance(value, str):
        words = re.sub("\r\n?", "\n", value)  # which csv would not quote by itself
        return f"'{words}" if re.match(f"'*{FORMULA}", words) else words
    return "" if value is None or value != value else value
