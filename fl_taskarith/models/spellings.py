"""Finds a backbone in the contents of a weights file and spells it as timm does, by the table spellings.toml."""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from fl_taskarith.config.toml import read_toml
from fl_taskarith.errors import WeightsError, listed, printable
from fl_taskarith.storage.paths import shipped_file

SPELLINGS: dict[str, Any] = read_toml(shipped_file("models/spellings.toml"))
_NAMES = [(re.compile(rf"(?<![^.]){pattern}"), name) for pattern, name in SPELLINGS["names"].items()]

log = logging.getLogger(__name__)


def known_name(spelt: str) -> str:
    """Return the name in the table's words of a tensor that is spelt in any way that is known."""
    name = ".".join(word for word in spelt.split(".") if word not in SPELLINGS["inserted"])
    for pattern, replacement in _NAMES:
        name = pattern.sub(replacement, name)
    return name


def is_head(name: str) -> bool:
    """Return whether this names a classifier's tensor."""
    return _matches(name, SPELLINGS["heads"])


def find_backbone(contents: Mapping[Any, Any], expected: Collection[str], path: Path) -> dict[str, Tensor]:
    """Return the tensors of the backbone in `contents`, of any shapes, under known names and without its head.

    Dictionaries may be nested, and any prefix may stand before the names. The backbone is the one with the most of the
    `expected` names; of several that have all, the one that `preferred` in the table chooses.

    Raises:
        WeightsError: there is none, or several between which nothing decides; names the file at `path`.
    """
    tables = {words: _renamed(table) for words, table in _tables(contents)}
    places = Counter(
        (words, prefix) for words, table in tables.items() for name in table for prefix in _prefixes(name, expected)
    )
    places = Counter({place: count for place, count in places.items() if not _of_training(place)})
    if not places:
        names = [f"{'.'.join((*words, name))}" for words, table in tables.items() for name in table]
        raise WeightsError(
            f"{path} holds no vision transformer in a spelling that is known. Expected tensors such as cls_token, "
            "pos_embed and blocks.0.attn.qkv.weight (timm, DINO, DINOv2), or as Hugging Face, CLIP or torchvision name "
            f"them, behind any prefix; found {len(names)} tensors:{listed(names) or ' none'}"
        )
    most = max(places.values())
    best = sorted((place for place, count in places.items() if count == most), key=_preference)
    if len(best) > 1 and _preference(best[0]) == _preference(best[1]):
        raise WeightsError(
            f"{path} holds several backbones:{listed(_words(place) for place in best)}\nSave the one that is "
            "meant in a file of its own."
        )
    words, prefix = best[0]
    if len(best) > 1:  # a warning is seen on the terminal of every command
        others = ", ".join(_words(place) for place in best[1:5])
        log.warning("Weights: %s of %s is taken, not %s. To take another one, save it in a file of its own.",
                    _words(best[0]), path, others)  # fmt: skip
    elif words or prefix:
        log.info("Weights: %s of %s.", _words(best[0]), path)
    inner = tuple(other for there, other in best if there == words and other != prefix and other.startswith(prefix))
    state = {name.removeprefix(prefix): value for name, value in tables[words].items()
             if name.startswith(prefix) and not name.startswith(inner)}  # fmt: skip
    return {name: value for name, value in _with_qkv(state).items()
            if not is_head(name) and not _matches(name, SPELLINGS["extras"])}  # fmt: skip


def hints(names: Collection[str]) -> str:
    """Return what the table says of tensors with such names: sentences, each with a space before it."""
    return "".join(f" {hint}" for pattern, hint in SPELLINGS["hints"].items()
                   if any(re.search(pattern, name) for name in names))  # fmt: skip


def quantised_names(names: Iterable[str]) -> list[str]:
    """Return those of `names` that only quantised weights have, as bitsandbytes and GPTQ write them."""
    return [name for name in names if re.search(SPELLINGS["quantised"], name)]


def unsupported(path: Path) -> str:
    """Return what weights in a format that is not read are, and what to do, by the file's name; "" for others."""
    return str(SPELLINGS["formats"].get(path.suffix.lower(), ""))


def is_number(tensor: Tensor) -> bool:
    """Return whether a tensor of any shape holds floating-point numbers of 16 to 64 bits, each of them in memory."""
    return (
        tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and tensor.layout is torch.strided
        and not tensor.is_quantized
        and not tensor.is_nested
        and tensor.device.type == "cpu"
        and tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()
    )


def _tables(contents: Mapping[Any, Any]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """Yield the dictionaries in `contents` that hold tensors, with the words that lead to each."""
    waiting: list[tuple[tuple[str, ...], Mapping[Any, Any]]] = [((), contents)]
    seen = {id(contents)}  # a pickled dictionary may hold itself
    while waiting:
        words, table = waiting.pop()
        if tensors := {str(name): value for name, value in table.items()
                       if isinstance(value, Tensor) and not value.is_nested}:  # fmt: skip
            yield words, tensors
        for name, value in table.items():
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(((*words, str(name)), value))


def _renamed(table: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under timm's names; of several with one name, all but the first keep their own spelling."""
    renamed: dict[str, Tensor] = {}
    names = {spelt: known_name(spelt) for spelt in table}
    for spelt in sorted(table, key=lambda spelt: names[spelt] != spelt):  # names that are timm's already come first
        renamed[spelt if names[spelt] in renamed else names[spelt]] = table[spelt]
    return renamed


def _prefixes(name: str, expected: Collection[str]) -> Iterator[str]:
    """Yield each start of `name` behind which one of the `expected` names stands."""
    whole = re.sub(r"\.attn\.q\.(weight|bias)$", r".attn.qkv.\1", name)  # one of the three stands for all
    for start in [0, *(match.end() for match in re.finditer(r"\.", whole))]:
        if whole[start:] in expected:
            yield whole[:start]


def _of_training(place: tuple[tuple[str, ...], str]) -> bool:
    words, prefix = place
    every = (*words, *prefix.split("."))
    parts = {part for word in every for part in word.split("_")}
    return not (parts.isdisjoint(SPELLINGS["not_weights_parts"]) and set(every).isdisjoint(SPELLINGS["not_weights"]))


def _preference(place: tuple[tuple[str, ...], str]) -> int:
    """Return where in the table's `preferred` the first word that leads to a backbone stands."""
    words, prefix = place
    parts = {part for word in (*words, *prefix.split(".")) for part in (word, *word.split("_"))}
    preferred: list[str] = SPELLINGS["preferred"]
    return next((rank for rank, word in enumerate(preferred) if word in parts), len(preferred))


def _words(place: tuple[tuple[str, ...], str]) -> str:
    words, prefix = place
    return printable(".".join((*words, prefix)).strip(".") or "the one without a prefix")


def _with_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Join the query, key and value [d, ...] of each attention to timm's [3d, ...]; unlike ones stay as they are."""
    joined = dict(state)
    for name in state:
        if match := re.fullmatch(r"(.*\.attn\.)q\.(weight|bias)", name):
            parts = [state.get(f"{match[1]}{letter}.{match[2]}") for letter in "qkv"]
            if _alike(parts):
                for letter in "qkv":
                    del joined[f"{match[1]}{letter}.{match[2]}"]
                joined[f"{match[1]}qkv.{match[2]}"] = torch.cat(list(parts))
    return joined


def _alike(parts: Sequence[Tensor | None]) -> TypeGuard[Sequence[Tensor]]:
    kinds = {part if part is None else (part.shape, part.dtype, part.dim() > 0 and is_number(part)) for part in parts}
    return len(kinds) == 1 and None not in kinds and all(kind[-1] for kind in kinds if kind)


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
