"""Names that settings accept, and that code beyond the settings asks for too."""

import re
from pathlib import Path

IMAGE_DATASETS = tuple(  # a file each; listed and not imported, for they need torch and settings do not
    sorted(path.stem.replace("_", "-") for path in Path(__file__).parents[1].joinpath("data/sets").glob("[a-z]*.py"))
)
REGRESSION = "linear-regression"  # a data set of numbers in place of images, made by each client from the seed
CLUSTER_RULES = ("mean", "median", "trimmed-mean", "geometric-median", "krum")
ATTACKS = ("sign-flip", "alie", "inner-product", "scaled-model", "random-labels")
MERGE_RULES = tuple(  # by the decorators of `merging/rules/`, whose files import torch too
    name
    for path in sorted(Path(__file__).parents[1].joinpath("merging/rules").glob("[a-z]*.py"))
    for name in re.findall(r'@merge_rule\(\s*"([^"]+)"', path.read_text(encoding="utf-8"))
)
