"""The scanners against a JSON parser, which reads alike whatever they accept; and they accept what tools write."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from quarkconv.dtypes import TensorType
from quarkconv.files.strict_json import load_header_json
from quarkconv.headers.scan import Run, scan_header, scan_index

ENTRIES: dict[str, Any] = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "I8", "shape": [2, 3], "data_offsets": [0, 6]},
    "a.weight_scale": {"dtype": "F32", "shape": [2], "data_offsets": [6, 14]},
    "é/b": {"dtype": "BF16", "shape": [], "data_offsets": [14, 16]},
}
HEADER = json.dumps(ENTRIES, separators=(",", ":"), ensure_ascii=False)
INDEX: dict[str, Any] = {
    "metadata": {"total_size": 16},
    "weight_map": {"a.weight": "1.safetensors", "a.weight_scale": "2.safetensors", "b": "1.safetensors"},
}
PIECES = st.sampled_from(
    ['"', '":{"dtype":"', ',"data_offsets":[', ']},"', '","', '": "', '", "', '":"', "}", "]", ":", ",", "[0,6]},", "0",
     "6", "\\", "\n", "\t", "\x00", "\x7f", " ", "-", "e0", "a", ""]
)  # fmt: skip


@st.composite
def edits(draw: st.DrawFn, text: str) -> str:
    """A text in which up to three ranges are replaced."""
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(text)))
        end = draw(st.integers(start, min(len(text), start + 24)))
        text = text[:start] + draw(PIECES) + text[end:]
    return text


def check_header(text: str) -> None:
    scanned = scan_header(text)
    if scanned is None:
        return
    entries: dict[str, Any] = load_header_json(text)
    entries.pop("__metadata__", None)
    starts = [0, *scanned.ends[:-1]]
    assert [
        (name, {"dtype": found.dtype, "shape": list(found.shape), "data_offsets": [start, end]})
        for (name, found), start, end in zip(scanned.tensors.items(), starts, scanned.ends, strict=True)
    ] == list(entries.items())


def weight_map(runs: list[Run]) -> dict[str, str]:
    return {name: run.file for run in runs for name in run.names}


def check_index(text: str) -> None:
    scanned = scan_index(text.encode())
    if scanned is None:
        return
    try:
        index = json.loads(text.encode())
    except ValueError:  # around the entries, which alone are checked
        with pytest.raises(ValueError):  # noqa: PT011
            json.loads(scanned.rest)
        return
    assert weight_map(scanned.runs) == index["weight_map"]
    assert json.loads(scanned.rest) == index | {"weight_map": {}}


def test_a_header_as_safetensors_writes_it_is_scanned() -> None:
    scanned = scan_header(HEADER + "  ")
    assert scanned is not None
    assert scanned.tensors == {
        "a.weight": TensorType("I8", (2, 3)), "a.weight_scale": TensorType("F32", (2,)), "é/b": TensorType("BF16", ())
    }  # fmt: skip
    assert scanned.ends == [6, 14, 16]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(INDEX),
        json.dumps(INDEX, indent=2) + "\n",
        json.dumps(INDEX, indent=2, sort_keys=True),
        json.dumps(INDEX, separators=(",", ":")),
        json.dumps({"weight_map": INDEX["weight_map"]}),
    ],
)
def test_an_index_as_tools_write_it_is_scanned(text: str) -> None:
    assert scan_index(text.encode()) is not None
    check_index(text)


def test_an_index_of_many_parts_is_scanned() -> None:
    names = {f"model.layers.{number}.weight": f"{number % 7}.safetensors" for number in range(9000)}
    text = json.dumps({"weight_map": names})
    scanned = scan_index(text.encode())
    assert scanned is not None
    assert weight_map(scanned.runs) == names
    assert scan_index(text.replace('", "', '","', 1).encode()) is None
    assert scan_index(text[::-1].replace('" :"', '":"', 1)[::-1].encode()) is None


@given(edits(HEADER))
@example(HEADER + '"')
@example(HEADER.replace(']},"a.weight_scale"', "]},"))
@example(HEADER.replace('"a.weight_scale":', '":'))
@example(HEADER.replace("a.weight_scale", "a.weight"))
@example(HEADER.replace("a.weight_scale", "__metadata__"))
@example(HEADER.replace("[6,14]", "[06,14]"))
@example(HEADER.replace('[0,6]},"a.weight_scale"', '[0,6]},"x"[0,6]},"a.weight_scale"'))
def test_the_json_parser_reads_scanned_headers_alike(text: str) -> None:
    check_header(text)


@given(edits(json.dumps(INDEX)))
@example(json.dumps(INDEX).replace('"a.weight": ', '"a.weight", '))
@example(json.dumps(INDEX).replace('", "', '": "'))
@example(json.dumps(INDEX) + "}")
@example(json.dumps({"other": INDEX}))
@example(json.dumps({"metadata": INDEX["weight_map"]}))
@example(json.dumps({'a"weight_map': INDEX["weight_map"]}))
@example(json.dumps(INDEX).replace('"metadata"', '"weight_map": {}, "metadata"'))
def test_the_json_parser_reads_scanned_indexes_alike(text: str) -> None:
    check_index(text)
