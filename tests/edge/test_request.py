"""Bodies: what is found in them and what is changed, against Python's json as the judge."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tidegate_edge.envelope import Failure
from tidegate_edge.multipart import read_multipart
from tidegate_edge.request import MAX_DEPTH, MAX_VALUES, Body, read_json


def tried(read: Any, *given: bytes) -> Body | Failure:
    """What a reader makes of bytes: a body, or its refusal."""
    try:
        body: Body = read(*given)
    except Failure as failure:
        return failure
    return body


TEXTS = st.text(max_size=8) | st.sampled_from(
    ["model", "stream", 'x"model', "\\", '"model":', "mödel", "\u2028"]
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


@given(
    st.dictionaries(TEXTS, VALUES, max_size=6), TEXTS.filter(bool), st.booleans(), st.sampled_from([None, 1])
)
def test_only_the_model_changes(
    rest: dict[str, Any], model: str, ascii_only: bool, indent: int | None
) -> None:
    """Whatever else a body holds, the model is found, and splicing changes that value alone."""
    data = {**rest, "model": model}
    raw = json.dumps(data, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
    body = tried(read_json, raw)
    if isinstance(body, Failure):
        assert body.code == "invalid_json"  # a lone surrogate, which is no UTF-8
        return
    assert body.model == model
    assert body.stream is (data.get("stream") is True)
    begin, end = body.span
    assert json.loads(raw[begin:end]) == model
    changed = body.rewritten("the/upstream", {})
    assert json.loads(changed) == {**data, "model": "the/upstream"}
    assert (changed[:begin], changed[len(changed) - len(raw) + end :]) == (raw[:begin], raw[end:])


@given(st.dictionaries(TEXTS, VALUES, max_size=4), st.dictionaries(TEXTS, VALUES, max_size=4))
def test_defaults_are_merged_under_the_caller(rest: dict[str, Any], defaults: dict[str, Any]) -> None:
    """The merge is Python's `{**defaults, **body}`, and the caller's bytes stay as they are."""
    data = {"model": "m", **{key: value for key, value in rest.items() if key != "model"}}
    raw = json.dumps(data).encode()
    defaults = json.loads(json.dumps(defaults))
    merged = read_json(raw).rewritten("", defaults)
    assert json.loads(merged) == {**defaults, **data}
    assert merged.endswith(raw[1:])


KEYS = [b'"model"', b'"mod\\u0065l"', b'"\\u006d\\u006F\\u0064\\u0065\\u006C"', b'"other"', b'"x\\"model"']


@given(
    st.lists(
        st.tuples(st.sampled_from(KEYS), st.sampled_from([b'"a"', b'"b"', b'{"model":"c"}', b"[1]"])),
        max_size=6,
    )
)
def test_a_model_said_twice_is_refused_however_it_is_written(pairs: list[tuple[bytes, bytes]]) -> None:
    """Equal keys, escaped or not, are an error; the one that is accepted is what every reader sees."""
    raw = b"{" + b" ,".join(key + b" : " + value for key, value in pairs) + b"}"
    models = [value for key, value in json.loads(raw, object_pairs_hook=list) if key == "model"]
    body = tried(read_json, raw)
    if isinstance(body, Failure):
        assert body.status == 400
        assert len(models) != 1 or not isinstance(models[0], str)
    else:
        assert models == [body.model]
        assert raw[slice(*body.span)] in (b'"a"', b'"b"')


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:\\umodel1 \n', max_size=60).map(str.encode))
def test_no_bytes_make_it_fail_otherwise_than_with_400(raw: bytes) -> None:
    """Garbage is refused with 400 and a bounded message, and never accepted when json refuses it."""
    body = tried(read_json, raw)
    if isinstance(body, Failure):
        assert body.status == 400
        assert len(body.message) <= 500
    else:
        assert json.loads(raw)["model"] == body.model


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
        (b'{"model":"m"} {}', "invalid_json"),
        (b'\xef\xbb\xbf{"model":"m"}', "invalid_json"),
        (b"{}", "missing_model"),
        (b'{"model":null}', "missing_model"),
        (b'{"model":7}', "missing_model"),
        (b'{"model":""}', "missing_model"),
        (b'{"messages":[{"model":"m"}]}', "missing_model"),
        (b'{"model":"m","model":"m"}', "duplicate_model"),
        (b'{"model":{"model":"x"},"model":"m"}', "duplicate_model"),
        (b'{"model":"m","a":' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}", "too_complex"),
        (b'{"model":"m","a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", "invalid_json"),
        (b'{"model":"m","a":[' + b"{}," * MAX_VALUES + b"1]}", "too_complex"),
        (b'{"model":"m","a":[' + b'"",' * MAX_VALUES + b"1]}", "too_complex"),
    ],
)
def test_bad_json_is_refused(raw: bytes, code: str) -> None:
    """Each kind of bad body has its code."""
    with pytest.raises(Failure) as caught:
        read_json(raw)
    assert (caught.value.code, caught.value.status) == (code, 400)


def test_a_long_text_is_not_too_complex() -> None:
    """What a prompt holds is text, whatever it looks like; nesting up to the limit is fine."""
    prompt = json.dumps('{[,\\"\n' * MAX_VALUES).encode()
    deep = b"[" * (MAX_DEPTH - 1) + b"]" * (MAX_DEPTH - 1)
    body = read_json(b'{"prompt":' + prompt + b',"a":' + deep + b',"model":"m","max_tokens":9}')
    assert (body.model, body.max_tokens) == ("m", 9)


HEAD = b'--B\r\nContent-Disposition: form-data; name="model"\r\n\r\nm\r\n'
KIND = b"multipart/form-data; boundary=B"


def test_a_form_is_spliced_in_place() -> None:
    """The part's content is replaced; every other byte stays."""
    raw = b'--B\r\ncontent-disposition: form-data; name="stream"\r\n\r\ntrue\r\n' + HEAD + b"--B--\r\n"
    body = read_multipart(raw, KIND)
    assert (body.model, body.stream) == ("m", True)
    assert body.rewritten("up/m", {"a": 1}) == raw.replace(b"\r\nm\r\n", b"\r\nup/m\r\n")


@pytest.mark.parametrize(
    ("raw", "kind", "code"),
    [
        (HEAD + b"--B--", b"multipart/form-data", "invalid_multipart"),
        (HEAD + b"--B--", b"multipart/form-data; boundary=B; boundary=C", "invalid_multipart"),
        (HEAD + b"--B--", b"multipart/form-data; boundary=", "invalid_multipart"),
        (b"preamble\r\n" + HEAD + b"--B--", KIND, "invalid_multipart"),
        (HEAD, KIND, "invalid_multipart"),
        (HEAD + b"--BB\r\n", KIND, "invalid_multipart"),
        (HEAD + b"--B--\r\nepilogue", KIND, "invalid_multipart"),
        (HEAD.replace(b"\r\n", b"\n") + b"--B--", KIND, "invalid_multipart"),
        (HEAD.replace(b"name=", b"name*="), KIND, "invalid_multipart"),
        (HEAD.replace(b'"model"', b'"a"; name="model"') + b"--B--", KIND, "invalid_multipart"),
        (HEAD + HEAD + b"--B--", KIND, "duplicate_model"),
        (HEAD.replace(b'"model"', b'"other"') + b"--B--", KIND, "missing_model"),
        (HEAD.replace(b'"model"', b'"model"; filename="x"') + b"--B--", KIND, "missing_model"),
        (HEAD.replace(b"m\r\n", b"m" * 300 + b"\r\n") + b"--B--", KIND, "missing_model"),
    ],
)
def test_bad_forms_are_refused(raw: bytes, kind: bytes, code: str) -> None:
    """Whatever two readers could take apart differently is refused."""
    with pytest.raises(Failure) as caught:
        read_multipart(raw, kind)
    assert caught.value.code == code


@given(st.binary(max_size=200), st.binary(max_size=60))
def test_no_form_makes_it_fail_otherwise_than_with_400(raw: bytes, kind: bytes) -> None:
    """Garbage forms are refused with 400."""
    for content in (raw, b"--B\r\n" + raw, HEAD + raw + b"--B--"):
        for content_type in (kind, KIND):
            body = tried(read_multipart, content, content_type)
            assert body.status == 400 if isinstance(body, Failure) else body.model
