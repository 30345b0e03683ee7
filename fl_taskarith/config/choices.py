"""Names that settings accept, and that code beyond the settings asks for too."""

from pathlib import Path

IMAGE_DATASETS = tuple(  # a file each; listed and not imported, for they need torch and settings do not
    sorted(path.stem.replace("_", "-") for path in Path(__file__).parents[1].joinpath("data/sets").glob("[a-z]*.py"))
)
REGRESSION = "linear-regression"  # a data set of numbers in place of images, made by each client from the seed
CLUSTER_RULES = ("mean", "median", "trimmed-mean", "geometric-median", "krum")
ATTACKS = ("sign-flip", "alie", "inner-product", "scaled-model", "random-labels")
