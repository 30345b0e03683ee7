"""The data sets that ship, one per file: a file `my_set.py` with `DATASET = ImageSource(...)` is `dataset = "my-set"`.

One's own needs no file here: `dataset = "module:name"` names any importable `ImageSource`.
"""
