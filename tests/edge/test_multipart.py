"""Forms: what is found in them and what is changed, against two parsers that model servers use as judges."""

from __future__ import annotations

import email.policy
import itertools
from collections.abc import Iterable
from email.parser import BytesParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from python_multipart.multipart import MultipartParser, parse_options_header

from tests.edge.test_request import SPOTS, spoiled
from tidegate_edge.envelope import Failure
from tidegate_edge.multipart import Form
from tidegate_edge.request import Said, splice

CORPUS = sorted((Path(__file__).parent / "corpus" / "bodies").glob("*.form"))
KIND = b"multipart/form-data; boundary=B"


def read(raw: bytes, kind: bytes = KIND, cuts: Iterable[int] = ()) -> Said:
    """A form that comes in pieces. Raises Failure."""
    form = Form(kind)
    places = sorted({min(cut, len(raw)) for cut in cuts} | {0, len(raw)})
    for begin, end in itertools.pairwise(places):
        form.feed(raw[begin:end])
    return form.finish()


def tried(raw: bytes, kind: bytes = KIND, cuts: Iterable[int] = ()) -> Said | Failure:
    """What it says, or the refusal."""
    try:
        return read(raw, kind, cuts)
    except Failure as failure:
        return failure


def by_python_multipart(raw: bytes, kind: bytes) -> list[tuple[bytes, bytes]]:
    """Names and contents as the parser behind starlette and FastAPI finds them."""
    found: list[tuple[bytes, bytes]] = []
    field, value, content = bytearray(), bytearray(), bytearray()
    name = b""

    def header_end() -> None:
        nonlocal name
        if bytes(field).lower() == b"content-disposition":
            name = parse_options_header(bytes(value))[1].get(b"name", b"")
        field.clear()
        value.clear()

    def part_end() -> None:
        found.append((name, bytes(content)))
        content.clear()

    calls: Any = {
        "on_header_field": lambda data, begin, end: field.extend(data[begin:end]),
        "on_header_value": lambda data, begin, end: value.extend(data[begin:end]),
        "on_header_end": header_end,
        "on_part_data": lambda data, begin, end: content.extend(data[begin:end]),
        "on_part_end": part_end,
    }
    parser = MultipartParser(parse_options_header(kind)[1][b"boundary"], calls)
    parser.write(raw)
    parser.finalize()
    return found


def by_email(raw: bytes, kind: bytes) -> list[tuple[bytes, bytes]]:
    """Names and contents as Python's own parser finds them."""
    message = BytesParser(policy=email.policy.HTTP).parsebytes(b"Content-Type: " + kind + b"\r\n\r\n" + raw)
    found = []
    for part in message.iter_parts():
        name = part.get_param("name", header="content-disposition")
        content = part.get_payload(decode=True)
        assert isinstance(content, bytes)
        found.append((str(name).encode("utf-8", "surrogateescape"), content))
    return found


def alike(raw: bytes, kind: bytes = KIND, cuts: Iterable[int] = ()) -> Said | Failure:
    """Whole and in pieces it is read alike; what is accepted is read alike by others."""
    whole, cut = tried(raw, kind), tried(raw, kind, cuts)
    if isinstance(whole, Failure) or isinstance(cut, Failure):
        assert isinstance(whole, Failure), f"only in pieces: {cut}"
        assert isinstance(cut, Failure), f"only as a whole: {whole}"
        assert whole.status == cut.status == 400
        assert len(whole.message) <= 500
        return whole
    assert whole == cut
    assert raw[slice(*whole.span)] == whole.model.encode()
    parts = by_python_multipart(raw, kind)
    assert [value for name, value in parts if name == b"model"] == [whole.model.encode()]
    assert {name.decode("utf-8", "replace") for name, _ in parts} == whole.keys
    return whole


def part(name: str, value: bytes, more: str = "", headers: str = "") -> bytes:
    """One part, boundary first."""
    head = f'--B\r\nContent-Disposition: form-data; name="{name}"{more}\r\n{headers}\r\n'
    return head.encode() + value + b"\r\n"


NAMES = st.sampled_from(["model", "stream", "file", "language", "timestamps[]", "Model", "modél", "prompt"])
CONTENTS = st.binary(max_size=40) | st.sampled_from(
    [
        b"",
        b"m",
        b"\r\n",
        b"--",
        b"\r\n--",
        b"--B",
        b"\r\n--B",
        b"\n--B\n",
        b"\r\n--C\r\n",
        b"\r\n--B--\r\n",
        b"\r",
    ]
)
PARTS = st.builds(
    part,
    NAMES,
    CONTENTS,
    st.sampled_from(["", '; filename="a.wav"', "; filename=a.wav", '; filename="; name=model"', "; x=y"]),
    st.sampled_from(["", "Content-Type: audio/wav\r\n", "content-length: 1\r\n", "X: 1\r\n"]),
)
FORMS = st.builds(
    lambda before, model, after, end: b"".join([*before, part("model", model), *after, end]),
    st.lists(PARTS, max_size=3),
    st.sampled_from([b"m", b"gpt-small", "modèle".encode(), b"", b"m\r\n"]),
    st.lists(PARTS, max_size=3),
    st.sampled_from([b"--B--\r\n", b"--B--", b"--B--\r\n \r\n"]),
)
CUTS = st.lists(st.integers(0, 600), max_size=20)


@given(FORMS, CUTS)
def test_what_is_accepted_is_read_alike_by_others(raw: bytes, cuts: list[int]) -> None:
    """Whatever parts there are, and wherever the body is cut into pieces."""
    alike(raw, cuts=cuts)


HEADER = b"Content-Disposition: form-data; name=model\r\n"
BITS = st.sampled_from(
    [b"\r\n", b"\r", b"--B", b"\r\n--B\r\n", b"name=", b'; name="model"', b"; name*=UTF-8''model", b";", b"=",
     HEADER, b"\r\n\r\n", b"\t", b" "]
)  # fmt: skip
SPOILT = SPOTS | st.tuples(st.integers(0, 600), st.integers(0, 2), BITS)


@given(FORMS, st.lists(SPOILT, min_size=1, max_size=3), CUTS)
def test_a_spoiled_form_is_never_read_in_two_ways(
    raw: bytes, spots: list[tuple[int, int, bytes]], cuts: list[int]
) -> None:
    """It is refused with 400, or others find the same in it."""
    alike(spoiled(raw, spots), cuts=cuts)


RICH = (
    part("file", b"\r\n--\r\nx--A", '; filename="a; name=model"', "Content-Type: audio/wav\r\n")
    + part("a", b"")
    + part("model", b"m")
    + b"--B--\r\n"
)
TOKENS = (
    b"\r\n", b"\r", b"\n", b"--B", b"\r\n--B\r\n", b"\n--B\n", b"--B--", b'"', b"\\", b";", b"=",
    b":", b" ", b"\x00", b"-",
    b"name=model", b"; name*=UTF-8''model",
)  # fmt: skip


def test_each_single_change_of_a_form_is_read_in_one_way() -> None:
    """Every byte taken away, replaced, or with something before it, whole and in two pieces."""
    assert isinstance(alike(RICH, cuts=[40]), Said)
    for place in range(len(RICH)):
        alike(RICH[:place] + RICH[place + 1 :], cuts=[place])
        for token in TOKENS:
            alike(RICH[:place] + token + RICH[place:], cuts=[place + 1])
            alike(RICH[:place] + token + RICH[place + 1 :])


@given(st.binary(max_size=200), st.binary(max_size=60))
def test_no_form_makes_it_fail_otherwise_than_with_400(raw: bytes, kind: bytes) -> None:
    """Garbage, as a body or as a content type, is refused with 400."""
    for content in (raw, b"--B\r\n" + raw, part("model", b"m") + raw + b"--B--"):
        for content_type in (b"multipart/form-data" + kind, KIND + kind, KIND):
            found = tried(content, content_type)
            assert found.status == 400 if isinstance(found, Failure) else found.model


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_the_corpus_is_read_as_before(path: Path) -> None:
    """Forms that were interesting once: first the content type; the name says if it is accepted."""
    kind, _, raw = path.read_bytes().partition(b"\n")
    for size in (1, 2, 3, 7, 64, 1024):
        found = alike(raw, kind, range(0, len(raw), size))
        assert isinstance(found, Failure) is path.stem.startswith("bad-"), found
    if isinstance(found, Said):
        values = [value for name, value in by_email(raw, kind) if name == b"model"]
        assert values == [found.model.encode()]


def test_a_form_is_spliced_in_place() -> None:
    """The part's content is replaced; every other byte stays. The model may follow a file."""
    raw = part("file", b"\x00\xff" * 500, '; filename="a"') + part("stream", b"true") + part("model", b"m")
    raw += b"--B--\r\n"
    said = read(raw)
    assert (said.model, said.stream) == ("m", True)
    assert splice(raw, said.edits("up/m", {})) == raw.replace(b"\r\nm\r\n", b"\r\nup/m\r\n")


def test_defaults_of_a_form_are_parts_of_their_own() -> None:
    """Texts, numbers and truth values; the caller's win, and lists and the like are left out."""
    raw = part("model", b"m") + part("temperature", b"1") + b"--B--\r\n"
    defaults = {
        "temperature": b"0",
        "language": b'"fr\\u00e9"',
        "vad": b"false",
        "n": b"2.5",
        "list": b"[1]",
        "map": b"{}",
        "none": b"null",
        'q"': b'"x"',
    }
    merged = splice(raw, read(raw).edits("up", defaults))
    assert by_python_multipart(merged, KIND) == [
        (b"language", "fré".encode()),
        (b"vad", b"false"),
        (b"n", b"2.5"),
        (b"q%22", b"x"),
        (b"model", b"up"),
        (b"temperature", b"1"),
    ]
    assert merged.endswith(raw.replace(b"\r\nm\r\n", b"\r\nup\r\n"))
    with pytest.raises(Failure):
        read(raw).edits("", {"language": b'"a --B b"'})


HEAD = part("model", b"m")
ENCODED = part("model", b"bQ==", headers="Content-Transfer-Encoding: base64\r\n")
LONG = part("a", b"x", headers="X: " + "y" * 9000 + "\r\n")


@pytest.mark.parametrize(
    ("raw", "kind", "code"),
    [
        (HEAD + b"--B--", b"multipart/form-data", "invalid_multipart"),
        (HEAD + b"--B--", b"multipart/form-data; boundary=B; boundary=C", "invalid_multipart"),
        (HEAD + b"--B--", b"multipart/form-data; boundary=", "invalid_multipart"),
        (HEAD + b"--B--", b"multipart/form-data; boundary=B; charset=utf-16", "invalid_multipart"),
        (HEAD + b"--B--", b"multipart/form-data; boundary=B, text/plain", "invalid_multipart"),
        (b"preamble\r\n" + HEAD + b"--B--", KIND, "invalid_multipart"),
        (b"\r\n" + HEAD + b"--B--", KIND, "invalid_multipart"),
        (b"--B--", KIND, "invalid_multipart"),
        (HEAD, KIND, "invalid_multipart"),
        (HEAD + b"--B", KIND, "invalid_multipart"),
        (HEAD + b"--BB\r\n", KIND, "invalid_multipart"),
        (HEAD + b"--B \r\n" + HEAD + b"--B--", KIND, "invalid_multipart"),
        (HEAD + b"--B--\r\nepilogue", KIND, "invalid_multipart"),
        (HEAD + b"--B--" + b" " * 2000, KIND, "invalid_multipart"),
        (HEAD.replace(b"\r\n", b"\n") + b"--B--", KIND, "invalid_multipart"),
        (HEAD.replace(b"name=", b"name*="), KIND, "invalid_multipart"),
        (HEAD.replace(b'"model"', b"\"a\"; name*=UTF-8''model") + b"--B--", KIND, "invalid_multipart"),
        (HEAD.replace(b'"model"', b'"a"; name="model"') + b"--B--", KIND, "invalid_multipart"),
        (HEAD.replace(b"form-data", b"attachment") + b"--B--", KIND, "invalid_multipart"),
        (part("_charset_", b"utf-16") + HEAD + b"--B--", KIND, "invalid_multipart"),
        (part("model", b"mm", headers="Content-Length: 1\r\n") + b"--B--", KIND, "invalid_multipart"),
        (part("a", b"--B\r\n") + HEAD + b"--B--", KIND, "invalid_multipart"),
        (part("a", b"x\n--B\n") + HEAD + b"--B--", KIND, "invalid_multipart"),
        (LONG + HEAD + b"--B--", KIND, "invalid_multipart"),
        (part("a", b"") * 101 + HEAD + b"--B--", KIND, "invalid_multipart"),
        (HEAD + HEAD + b"--B--", KIND, "duplicate_model"),
        (HEAD + part("model", b"m", '; filename="x"') + b"--B--", KIND, "duplicate_model"),
        (HEAD.replace(b'"model"', b'"other"') + b"--B--", KIND, "missing_model"),
        (part("model", b"m", '; filename="x"') + b"--B--", KIND, "missing_model"),
        (ENCODED + b"--B--", KIND, "missing_model"),
        (part("model", b"m", headers="Content-Encoding: gzip\r\n") + b"--B--", KIND, "missing_model"),
        (part("model", b"m", headers="Content-Type: text/plain; charset=utf-16\r\n") + b"--B--", KIND,
         "missing_model"),
        (part("model", b"") + b"--B--", KIND, "missing_model"),
        (part("model", b"m" * 300) + b"--B--", KIND, "missing_model"),
        (part("model", b"\xff") + b"--B--", KIND, "missing_model"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_bad_forms_are_refused(raw: bytes, kind: bytes, code: str, size: int) -> None:
    """Whatever two readers could take apart differently is refused, in pieces of any size."""
    with pytest.raises(Failure) as caught:
        read(raw, kind, range(0, len(raw), size))
    assert caught.value.code == code


def test_little_of_a_form_is_kept() -> None:
    """A file of any size passes through a few bytes of memory."""
    form = Form(KIND)
    form.feed(part("file", b"", '; filename="a"')[:-2])
    for _ in range(100):
        form.feed(b"\r\n--" * 1000)
        assert len(form._held) < 8
    form.feed(b"\r\n" + HEAD + b"--B--\r\n")
    assert form.finish().model == "m"
