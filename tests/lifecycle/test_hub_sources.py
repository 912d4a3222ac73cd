"""What a source means, and which files of a repository it stands for."""

from __future__ import annotations

import pytest

from tidegate_lifecycle.hub.cache import Listing, RepoFile
from tidegate_lifecycle.hub.pick import Picked, pick, weights
from tidegate_lifecycle.hub.source import (
    InRepo,
    Local,
    Repo,
    Source,
    Url,
    downloadable,
    file_name,
    is_gguf,
    parse,
)
from tidegate_lifecycle.hub.words import Missing


def listing(*paths: str, cached: bool = False) -> Listing:
    return Listing("org/m-GGUF", "c", tuple(RepoFile(path, 1) for path in paths), cached)


def chosen(text: str, *paths: str) -> list[str]:
    source = parse(text)
    assert isinstance(source, InRepo | Repo)
    return [file.path for file in pick(source, listing(*paths)).files]


@pytest.mark.parametrize(
    ("text", "source", "gguf"),
    [
        ("https://host/a/m.gguf?x=1", Url("https://host/a/m.gguf?x=1"), True),
        ("/models/m.gguf", Local("/models/m.gguf"), True),
        ("~/m.GGUF", Local("~/m.GGUF"), True),
        ("./folder", Local("./folder"), False),
        ("m.gguf", Local("m.gguf"), True),
        ("folder/m.gguf", Local("folder/m.gguf"), True),
        ("org/repo/m.gguf", InRepo("org/repo", "m.gguf"), True),
        ("org/repo/Q8_0/m-00001-of-00002.gguf", InRepo("org/repo", "Q8_0/m-00001-of-00002.gguf"), True),
        ("org/repo-GGUF", Repo("org/repo-GGUF"), True),
        ("org/repo:Q5_K_M", Repo("org/repo", "Q5_K_M"), True),
        ("org/repo", Repo("org/repo"), False),
    ],
)
def test_the_forms_of_a_source(text: str, source: Source, gguf: bool) -> None:
    """File, URL, file of a repository, repository, repository with a quantization."""
    assert parse(text) == source
    assert is_gguf(source) is gguf
    assert downloadable(source) is not isinstance(source, Local)


def test_what_is_no_repository_is_not_downloaded() -> None:
    """A name without an owner, or with more than one slash, is left to the server."""
    assert not downloadable(parse("gpt2"))
    assert not downloadable(parse("a/b/c"))
    assert not downloadable(parse("../x"))


def test_a_name_for_what_a_url_gives() -> None:
    """The last part of the path, fit for a file system."""
    assert file_name("https://h/a/m-Q4.gguf?download=true#x") == "m-Q4.gguf"
    assert file_name("https://h/a/m%20x.gguf") == "m_20x.gguf"
    assert file_name("https://h/") == "h"
    assert file_name("https://h/../..") == "model.gguf"


def test_the_preferred_quantization() -> None:
    """Q4_K_M, then Q8_0, then the first model: never a projector or an importance matrix."""
    assert chosen("org/m-GGUF", "m-F16.gguf", "m-Q8_0.gguf", "m-q4_k_m.gguf") == ["m-q4_k_m.gguf"]
    assert chosen("org/m-GGUF", "m-F16.gguf", "m-Q8_0.gguf") == ["m-Q8_0.gguf"]
    aside = ("imatrix.gguf", "mmproj-Q8_0.gguf", "readme.md", "m-Q5_0.gguf", "m-Q6_K.gguf")
    assert chosen("org/m-GGUF", *aside) == ["m-Q5_0.gguf"]


def test_a_quantization_in_any_case() -> None:
    """`:q8_0` is Q8_0; F16 isn't BF16, unless there is nothing else; folders count."""
    files = ("m-BF16.gguf", "m-F16.gguf", "m-Q8_0.gguf", "Q2_K/m-Q2_K.gguf", "m.Q3_K_S.gguf")
    assert chosen("org/m:q8_0", *files) == ["m-Q8_0.gguf"]
    assert chosen("org/m:f16", *files) == ["m-F16.gguf"]
    assert chosen("org/m:Q2_K", *files) == ["Q2_K/m-Q2_K.gguf"]
    assert chosen("org/m:Q3_K_S", *files) == ["m.Q3_K_S.gguf"]
    assert chosen("org/m:F16", "m-BF16.gguf") == ["m-BF16.gguf"]
    with pytest.raises(Missing, match="has no GGUF file of F6; it has BF16, F16, Q8_0, Q2_K, Q3_K_S"):
        chosen("org/m:F6", *files)


def test_all_parts_of_a_split_file() -> None:
    """Whichever part is named, all are fetched and the first is what the server is given."""
    parts = [f"Q8_0/m-Q8_0-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    assert chosen("org/m-GGUF", *reversed(parts), "Q8_0/x.md") == parts
    assert chosen(f"org/m/{parts[1]}", *parts) == parts
    with pytest.raises(Missing, match="part 2 of 3"):
        chosen("org/m:Q8_0", parts[0], parts[2])


def test_a_file_that_is_not_there() -> None:
    """The error names what there is, and not too much of it; and when only the cache could be asked."""
    with pytest.raises(Missing, match=r"has no file x.gguf; it has a.gguf, b.gguf"):
        chosen("org/m/x.gguf", "a.gguf", "b.gguf", "c.txt")
    with pytest.raises(Missing, match=r" and 8 more$"):
        chosen("org/m/x.gguf", *(f"{n}.gguf" for n in range(20)))
    with pytest.raises(Missing, match="has no GGUF file; give a repository that has some"):
        chosen("org/m:Q8_0", "model.safetensors")
    with pytest.raises(Missing, match="the cache's copy of org/m-GGUF has no GGUF file of Q8_0"):
        pick(Repo("org/m-GGUF", "Q8_0"), listing("m-Q4_0.gguf", cached=True))


def test_the_projector_beside_a_model() -> None:
    """The innermost folder's, and of several the one nearest in precision."""
    one = pick(
        Repo("o/m"), listing("m-Q8_0.gguf", "mmproj-F16.gguf", "mmproj-Q8_0.gguf", "x/mmproj-Q8_0.gguf")
    )
    assert one.projector == RepoFile("mmproj-Q8_0.gguf", 1)
    deep = pick(Repo("o/m"), listing("a/m-Q8_0.gguf", "mmproj-Q8_0.gguf", "a/mmproj-F16.gguf"))
    assert deep.projector == RepoFile("a/mmproj-F16.gguf", 1)
    assert pick(Repo("o/m"), listing("m-Q8_0.gguf")) == Picked((RepoFile("m-Q8_0.gguf", 1),))


def test_what_vllm_loads_of_a_repository() -> None:
    """Its safetensors; neither copies in other formats nor folders of them, nor what is small."""
    shards = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    small = ("config.json", "tokenizer.json", "tokenizer.model", "merges.txt", "model.safetensors.index.json")
    other = ("consolidated.safetensors", "pytorch_model.bin", "original/x.pth", "onnx/m.onnx", "README.md")
    found = weights(listing(*shards, *small, *other))
    assert {file.path for file in found} == set(shards)
    assert [file.path for file in weights(listing("consolidated.safetensors", "a.bin"))] == [
        "consolidated.safetensors"
    ]
    assert [file.path for file in weights(listing("pytorch_model.bin", "training_args.bin"))] == [
        "pytorch_model.bin"
    ]
