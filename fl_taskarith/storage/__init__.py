"""Files, folders, checkpoints, locks and logs: how runs are written to disk and read again."""
