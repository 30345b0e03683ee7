"""Side-by-side measurements: ours against what it is to beat, in one run, medians over repeats."""
