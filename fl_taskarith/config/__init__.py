"""The settings of a run: what each may hold, which contradict one another, and a reference of all."""
