"""Files, folders, locks and logs: how the results of a run are written and read back."""
