"""JSON bodies: what is found in them and what is changed, against Python's json as the judge, whole and in
pieces."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tidegate_edge.envelope import Failure
from tidegate_edge.request import Said, read_json, scanned, splice
from tidegate_edge.scanner import MAX_CONTAINERS, MAX_DEPTH, MAX_KEYS, MAX_NAME, Scanner

CORPUS = sorted((Path(__file__).parent / "corpus" / "bodies").glob("*.json"))


def tried(read: Callable[..., Said], *given: Any) -> Said | Failure:
    """What a reader makes of bytes: what they say, or its refusal."""
    try:
        return read(*given)
    except Failure as failure:
        return failure


def in_pieces(raw: bytes, cuts: Iterable[int]) -> Said:
    """The scanner's reading of a body that comes in pieces."""
    scanner = Scanner()
    places = sorted({min(cut, len(raw)) for cut in cuts} | {0, len(raw)})
    for begin, end in itertools.pairwise(places):
        scanner.feed(raw[begin:end])
    return scanned(scanner)


TEXTS = st.text(max_size=8) | st.sampled_from(
    ["model", "stream", 'x"model', "\\", '"model":', "mödel", "\u2028", "max_tokens", "😀"]
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)
CUTS = st.lists(st.integers(0, 300), max_size=20)
BODIES = st.builds(
    lambda rest, model, ascii_only, indent: json.dumps(
        {**rest, "model": model}, ensure_ascii=ascii_only, indent=indent
    ).encode("utf-8", "surrogatepass"),
    st.dictionaries(TEXTS, VALUES, max_size=6),
    VALUES,
    st.booleans(),
    st.sampled_from([None, 1]),
)
SPOTS = st.tuples(
    st.integers(0, 400),
    st.integers(0, 2),
    st.sampled_from(
        [b"", b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u", b"\\ud800", b"\\uDC00", b"0", b"-",
         b"e", b".", b" ", b"\n", b"\x00", b"\x1f", b"\x7f", b"\xff", b"\xe2\x82", b"\xed\xa0\x80", b"true",
         b"NaN", b"-Infinity", b"1e999", b"1" * 400, b"0.1e+5", b"01", b'"model":', b'"mod\\u0065l":1,',
         b"\xef\xbb\xbf", b"/**/", b"'"]
    ),
)  # fmt: skip


def spoiled(raw: bytes, spots: list[tuple[int, int, bytes]]) -> bytes:
    """A body in which something was put or taken away."""
    for place, length, new in spots:
        at = place % (len(raw) + 1)
        raw = raw[:at] + new + raw[at + length :]
    return raw


def same(raw: bytes, cuts: Iterable[int]) -> Said | Failure:
    """Both readers accept a body or both refuse it, and find the same; json finds that, too."""
    whole, cut = tried(read_json, raw), tried(in_pieces, raw, cuts)
    if isinstance(whole, Failure) and "infinity" in whole.message:
        return whole  # what is too large for a double is the model server's to judge where nothing is parsed
    if isinstance(whole, Failure) or isinstance(cut, Failure):
        assert isinstance(whole, Failure), f"only in pieces: {cut}"
        assert isinstance(cut, Failure), f"only as a whole: {whole}"
        assert whole.status == cut.status == 400
        assert max(len(whole.message), len(cut.message)) <= 500
        return whole
    assert whole == cut
    pairs = json.loads(raw, object_pairs_hook=list)
    assert [value for key, value in pairs if key == "model"] == [whole.model]
    assert whole.keys == {key for key, _ in pairs}
    assert whole.stream is (dict(pairs).get("stream") is True)
    assert json.loads(raw[slice(*whole.span)]) == whole.model
    return whole


@given(BODIES, CUTS)
def test_both_readers_find_what_json_finds(raw: bytes, cuts: list[int]) -> None:
    """Whatever a body holds, and wherever it is cut into pieces."""
    same(raw, cuts)


@given(BODIES, st.lists(SPOTS, min_size=1, max_size=4), CUTS)
def test_both_readers_refuse_the_same(
    raw: bytes, spots: list[tuple[int, int, bytes]], cuts: list[int]
) -> None:
    """A spoiled body is refused by both with 400, or accepted by both and by json, all with one meaning."""
    same(spoiled(raw, spots), cuts)


RICH = (
    b'{"a":[[1,-2.5e+3,"x\\n",{"b":[true,{}],"c":"\\ud83d\\ude00"},[]],null,{"k":[{"d":{"e":[0]},"f":"\xc3\xa9"}]},7],'
    b'"stream":true,"model":"m","g":{"h":[1,2],"i":{"j":"\\\\"},"k":false},"max_tokens":5}'
)
"""Everything that JSON has, also inside of what is matched at once."""
TOKENS = (
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b" ", b"0", b"1", b"-", b".", b"e", b"t", b"\n", b"\x00",
    b"\xff",    b"\\u", b"\\ud800", b',"model":"n"',
)  # fmt: skip


def test_each_single_change_of_a_body_is_read_alike() -> None:
    """Every byte taken away, replaced, or with something before it, whole and in two pieces."""
    assert isinstance(same(RICH, [40]), Said)
    for place in range(len(RICH)):
        same(RICH[:place] + RICH[place + 1 :], [place])
        for token in TOKENS:
            same(RICH[:place] + token + RICH[place:], [place + 1])
            same(RICH[:place] + token + RICH[place + 1 :], [])


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:\\umodel1 \n', max_size=60).map(str.encode), CUTS)
def test_no_bytes_make_it_fail_otherwise_than_with_400(raw: bytes, cuts: list[int]) -> None:
    """Garbage is refused with 400 and a bounded message, and never accepted when json refuses it."""
    same(raw, cuts)


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.stem)
def test_the_corpus_is_read_as_before(path: Path) -> None:
    """Bodies that were interesting once: the name says whether they are accepted; in pieces of any size."""
    raw = path.read_bytes()
    for size in (1, 2, 3, 7, 64, 1024):
        found = same(raw, range(0, len(raw), size))
        assert isinstance(found, Failure) is path.stem.startswith("bad-"), found


@given(st.dictionaries(TEXTS, VALUES, max_size=6), TEXTS.filter(bool), st.booleans())
def test_only_the_model_changes(rest: dict[str, Any], model: str, ascii_only: bool) -> None:
    """Splicing changes that value alone; every other byte stays."""
    data = {**rest, "model": model}
    raw = json.dumps(data, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    body = tried(read_json, raw)
    if isinstance(body, Failure):
        assert body.code == "invalid_json"  # a lone surrogate, which is no UTF-8
        return
    begin, end = body.span
    changed = splice(raw, body.edits("the/upstream", {}))
    assert json.loads(changed) == {**data, "model": "the/upstream"}
    assert (changed[:begin], changed[len(changed) - len(raw) + end :]) == (raw[:begin], raw[end:])
    assert splice(raw, body.edits(model, {})) is splice(raw, body.edits("", {})) is raw


@given(st.dictionaries(TEXTS, VALUES, max_size=4), st.dictionaries(TEXTS, VALUES, max_size=4), st.booleans())
@example({"a": 1}, {"n": 2**70, "o": "\ud800", "": []}, True)
def test_defaults_are_merged_under_the_caller(
    rest: dict[str, Any], defaults: dict[str, Any], alias: bool
) -> None:
    """The merge is Python's `{**defaults, **body}`; the caller's bytes stay as they are, in their order."""
    data = {"model": "m", **{key: value for key, value in rest.items() if key != "model"}}
    defaults = {key: value for key, value in defaults.items() if key != "model"}
    raw = b" \n" + json.dumps(data).encode()
    body = tried(read_json, raw)
    if isinstance(body, Failure):
        return
    assert body == in_pieces(raw, range(0, len(raw), 5))
    texts = {key: json.dumps(value).encode() for key, value in defaults.items()}
    merged = splice(raw, body.edits("other" if alias else "", texts))
    expected = {**defaults, **data, "model": "other" if alias else "m"}
    assert json.loads(merged) == expected
    assert [key for key in json.loads(merged) if key in data] == list(data)
    if not alias:
        assert merged.endswith(raw[3:])
    caller = json.loads(merged[len(merged) - len(raw) + 3 :].join((b"{", b""))) if not alias else data
    assert caller == data


def test_hints_are_those_of_the_request_as_the_model_server_sees_it() -> None:
    """A default counts where the caller says nothing."""
    defaults = {"stream": b"true", "max_tokens": b"9", "temperature": b"0.5"}
    assert read_json(b'{"model":"m"}').hints(defaults) == (True, 9)
    assert read_json(b'{"model":"m"}').hints({}) == (False, 0)
    assert read_json(b'{"model":"m","stream":false,"max_tokens":7}').hints(defaults) == (False, 7)
    assert read_json(b'{"model":"m","max_tokens":null,"stream":1}').hints(defaults) == (False, 0)


KEYS = [b'"model"', b'"mod\\u0065l"', b'"\\u006d\\u006F\\u0064\\u0065\\u006C"', b'"other"', b'"x\\"model"']


@given(
    st.lists(
        st.tuples(st.sampled_from(KEYS), st.sampled_from([b'"a"', b'"b"', b'{"model":"c"}', b"[1]"])),
        max_size=6,
    ),
    CUTS,
)
def test_a_model_said_twice_is_refused_however_it_is_written(
    pairs: list[tuple[bytes, bytes]], cuts: list[int]
) -> None:
    """Equal keys, escaped or not, are an error; the one that is accepted is what every reader sees."""
    raw = b"{" + b" ,".join(key + b" : " + value for key, value in pairs) + b"}"
    models = [value for key, value in json.loads(raw, object_pairs_hook=list) if key == "model"]
    body = same(raw, cuts)
    assert isinstance(body, Failure) is (len(models) != 1 or not isinstance(models[0], str))


DEEP = b"[" * 10_000 + b"]" * 10_000


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "invalid_json"),
        (b"[]", "invalid_json"),
        (b'"model"', "invalid_json"),
        (b"{'model':'m'}", "invalid_json"),
        (b'{"model":"m"', "invalid_json"),
        (b'{"model":"m","t":NaN}', "invalid_json"),
        (b'{"model":"m\xff"}', "invalid_json"),
        (b'{"model":"m","t":"\\ud800"}', "invalid_json"),
        (b'{"model":"m"} {}', "invalid_json"),
        (b'\xef\xbb\xbf{"model":"m"}', "invalid_json"),
        (b"{}", "missing_model"),
        (b'{"model":null}', "missing_model"),
        (b'{"model":7}', "missing_model"),
        (b'{"model":[]}', "missing_model"),
        (b'{"model":""}', "missing_model"),
        (b'{"messages":[{"model":"m"}]}', "missing_model"),
        (b'{"model":"m","model":"m"}', "duplicate_model"),
        (b'{"model":{"model":"x"},"model":"m"}', "duplicate_model"),
        (b'{"model":"m","a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "too_complex"),
        (b'{"model":"%b"}' % (b"m" * (MAX_NAME + 1)), "too_complex"),
        (b'{"model":"m","%b":1}' % (b"k" * (MAX_NAME + 1)), "too_complex"),
        (b'{"model":"m","%b":1}' % (b"\\u0041" * (MAX_NAME + 1)), "too_complex"),
        (b'{"model":"m"%b}' % b"".join(b',"%d":1' % i for i in range(MAX_KEYS)), "too_complex"),
    ],
)
@pytest.mark.parametrize("size", [0, 1, 1000])
def test_bad_json_is_refused(raw: bytes, code: str, size: int) -> None:
    """Each kind of bad body has its code, whole and in pieces."""
    with pytest.raises(Failure) as caught:
        in_pieces(raw, range(0, len(raw), size)) if size else read_json(raw)
    assert (caught.value.code, caught.value.status) == (code, 400)


@pytest.mark.parametrize(
    "raw",
    [
        b'{"model":"m","a":' + DEEP + b"}",
        b'{"model":"m","a":' + DEEP[:10_000],
        b'{"model":"m","a":' + DEEP.replace(b"[", b'{"a":').replace(b"]", b"}") + b"}",
        b'{"model":"m","a":[' + b"{}," * MAX_CONTAINERS + b"1]}",
        b'{"model":"m","a":[' + b'["[",{}],' * (MAX_CONTAINERS // 2) + b"1]}",
    ],
)
def test_bombs_are_refused(raw: bytes) -> None:
    """Nesting, and containers without number, before anything is built of them."""
    with pytest.raises(Failure):
        in_pieces(raw, range(0, len(raw), 16384))
    if len(raw) < 100_000:
        with pytest.raises(Failure):
            read_json(raw)


def test_a_long_text_is_not_too_complex() -> None:
    """What a prompt holds is text, whatever it looks like; some nesting is fine, and so are many numbers."""
    prompt = json.dumps('{[,\\"\n' * MAX_CONTAINERS).encode()
    deep = b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1)
    texts = b",".join([b'"{[{["'] * 30_000)
    raw = b'{"prompt":%b,"a":%b,"b":[%b],"c":[%b1],"model":"m","max_tokens":9}' % (
        prompt,
        deep,
        texts,
        b"1," * 300_000,
    )
    for body in (read_json(raw), in_pieces(raw, range(0, len(raw), 16384))):
        assert (body.model, body.max_tokens, raw[slice(*body.span)]) == ("m", 9, b'"m"')
