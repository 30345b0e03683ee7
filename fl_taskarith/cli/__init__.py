"""The command `fl-taskarith`."""
