"""Local steps: masked SGDM over batches of one client, or of several at once."""
