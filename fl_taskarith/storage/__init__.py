"""Files, folders, locks and logs: how what a run finds is kept and read again."""
