"""What a run may be asked for: settings, what each may hold, and which contradict one another."""
