"""Names that settings accept, and that code beyond the settings asks for too."""

REGRESSION = "linear-regression"  # a data set of numbers in place of images, made by each client from the seed
CLUSTER_RULES = ("mean", "median", "trimmed-mean", "geometric-median", "krum")
ATTACKS = ("sign-flip", "alie", "inner-product", "scaled-model", "random-labels")
