"""One file per kind of bad input: `FAULT`, `prepare(folder)` and `attempt(prepared, drawn, folder)`."""
