"""Which files of a repository a source means. Pure.

The choice is llama.cpp's own (`find_best_model` in common/download.cpp): the quantization that was asked
for, or else Q4_K_M, then Q8_0, then the first model there is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from tidegate_lifecycle.hub.cache import Listing, RepoFile
from tidegate_lifecycle.hub.source import InRepo, Repo
from tidegate_lifecycle.hub.words import Missing

PREFERRED = ("Q4_K_M", "Q8_0")
_ASIDE = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
"""Parts of names of files that aren't the model itself."""
_SPLIT = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_QUANT = re.compile(
    r"[-.]((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|BF16|F16|F32|FP16|MXFP\d\w*|NVFP\d\w*))$", re.IGNORECASE
)
_OLD_WEIGHTS = re.compile(r"pytorch_model.*\.bin")
_BITS = re.compile(r"(?:Q|F|FP)(\d+)", re.IGNORECASE)
_SHOWN = 12
"""How many names an error tells at most."""


@dataclass(frozen=True)
class Picked:
    """The files to have."""

    files: tuple[RepoFile, ...]
    """All parts of the model, in order: the server is given the first."""
    projector: RepoFile | None = None
    """What a model that sees images needs beside it."""


def pick(source: InRepo | Repo, listing: Listing) -> Picked:
    """The files of a GGUF source; Missing, with what there is, when there are none."""
    models = [file for file in listing.files if _is_model(file.path)]
    if isinstance(source, InRepo):
        chosen = listing.find(source.path)
        if chosen is None:
            raise _missing(f"has no file {source.path}", listing, [file.path for file in models])
    else:
        chosen = _best(source.quant, models)
        if chosen is None:
            what = f"has no GGUF file of {source.quant}" if source.quant and models else "has no GGUF file"
            raise _missing(what, listing, _quants(models))
    files = _parts(chosen, listing)
    return Picked(files, _projector(files[0], listing.files))


def weights(listing: Listing) -> tuple[RepoFile, ...]:
    """What is large of what vLLM loads of a repository that isn't GGUF: its safetensors, or else its .bin
    files. What else it needs, and what is left out here and needed after all, it downloads itself."""
    top = [file for file in listing.files if "/" not in file.path]
    tensors = [file for file in top if file.path.endswith(".safetensors")]
    named = [file for file in tensors if not file.path.startswith("consolidated")]
    return tuple(named or tensors or [file for file in top if _OLD_WEIGHTS.fullmatch(file.path)])


def _is_model(path: str) -> bool:
    name = path.rpartition("/")[2].lower()
    return name.endswith(".gguf") and not any(part in name for part in _ASIDE)


def _best(quant: str, models: Sequence[RepoFile]) -> RepoFile | None:
    """Where it begins a word, so that F16 isn't BF16; else anywhere, as llama.cpp does."""
    first = [
        file for file in models if (found := _SPLIT.fullmatch(file.path)) is None or int(found["index"]) == 1
    ]
    for wanted in (quant,) if quant else PREFERRED:
        for pattern in (rf"(?<![A-Za-z0-9]){re.escape(wanted)}[.-]", rf"{re.escape(wanted)}[.-]"):
            for file in first:
                if re.search(pattern, file.path, re.IGNORECASE):
                    return file
    return None if quant else next(iter(first), None)


def _parts(chosen: RepoFile, listing: Listing) -> tuple[RepoFile, ...]:
    """All parts of a split file; itself when it isn't one."""
    split = _SPLIT.fullmatch(chosen.path)
    if split is None:
        return (chosen,)
    count = int(split["count"])
    parts = []
    for index in range(1, count + 1):
        path = f"{split['stem']}-{index:05}-of-{split['count']}.gguf"
        part = listing.find(path)
        if part is None:
            raise Missing(
                f"the repository {listing.repo} lacks {path}, part {index} of {count}; choose another file"
            )
        parts.append(part)
    return tuple(parts)


def _projector(model: RepoFile, files: Iterable[RepoFile]) -> RepoFile | None:
    """In the model's folder or one above, the innermost; of several the one nearest in precision."""
    above = [str(folder) for folder in PurePosixPath(model.path).parents]  # innermost first
    bits = _bits(model.path)
    found = [
        (above.index(folder), abs(_bits(file.path) - bits), file.path, file)
        for file in files
        if "mmproj" in (name := file.path.rpartition("/")[2].lower()) and name.endswith(".gguf")
        if (folder := str(PurePosixPath(file.path).parent)) in above
    ]
    return min(found, key=lambda one: one[:3])[3] if found else None


def _bits(path: str) -> int:
    found = _BITS.findall(path.rpartition("/")[2])
    return int(found[-1]) if found else 0


def _quants(models: Iterable[RepoFile]) -> list[str]:
    """Their quantizations; of files that don't tell it, their names."""
    names = []
    for file in models:
        split = _SPLIT.fullmatch(file.path)
        stem = split["stem"] if split else file.path[: -len(".gguf")]
        quant = _QUANT.search(stem)
        names.append(quant[1] if quant else file.path)
    return list(dict.fromkeys(names))


def _missing(what: str, listing: Listing, there: Sequence[str]) -> Missing:
    shown = ", ".join(there[:_SHOWN]) + (f" and {len(there) - _SHOWN} more" if len(there) > _SHOWN else "")
    where = "the cache's copy of " if listing.cached else ""
    has = f"it has {shown}" if there else "give a repository that has some"
    return Missing(f"{where}{listing.repo} {what}; {has}")
