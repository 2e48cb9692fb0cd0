"""The header parser against the format's own parser, on files made by hand."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path

import pytest
import torch
from huggingface_hub.hf_api import _parse_safetensors_header
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize, safe_open
from safetensors.torch import save_file
from support.examples import examples
from support.raw import entry, raw_file

from quarkconv.dtypes import DTYPE_BITS
from quarkconv.errors import SourceError
from quarkconv.headers.safetensors import MAX_HEADER_BYTES, ShardHeader, TensorRef, read_header

ONE = '{"dtype":"I8","shape":[1],"data_offsets":[0,1]}'
"""The only tensor of a file with one byte of data."""


EMPTY = '{"dtype":"I8","shape":[0],"data_offsets":[0,0]}'


def one(name: str) -> bytes:
    return raw_file(f"{{{json.dumps(name)}:{ONE}}}", b"\1")


VALID = {
    "one tensor": raw_file({"a": entry("I8", [2, 3], 0, 6)}, bytes(6)),
    "no tensor": raw_file("{}"),
    "a scalar": raw_file({"a": entry("F32", [], 0, 4)}, bytes(4)),
    "metadata": raw_file({"__metadata__": {"format": "pt", "time": "12:30"}, "a": entry("U8", [1], 0, 1)}, b"1"),
    "metadata null": raw_file('{"__metadata__":null,"a":' + ONE + "}", b"1"),
    "empty metadata": raw_file({"__metadata__": {}, "a": entry("U8", [1], 0, 1)}, b"1"),
    "header padded": raw_file(f'{{"a":{ONE}}}      ', b"1"),
    "header padded with line ends": raw_file(f'{{"a":{ONE}}}\n\t\r ', b"1"),
    "data not in the order of names": raw_file({"a": entry("I8", [1], 1, 2), "b": entry("I8", [1], 0, 1)}, b"12"),
    "an empty tensor": raw_file({"a": entry("I8", [2], 0, 2), "b": entry("F32", [3, 0], 2, 2)}, b"12"),
    "an empty tensor first": raw_file({"a": entry("I8", [0], 0, 0), "b": entry("I8", [2], 0, 2)}, b"12"),
    "two to the bytes": raw_file({"a": entry("F4", [3, 2], 0, 3)}, b"123"),
    "largest size": raw_file({"a": entry("I8", [0, 2**64 - 1], 0, 0)}),
    "64 dimensions": raw_file({"a": entry("I8", [1] * 64, 0, 1)}, b"1"),
    "no name": one(""),
    "a name with NUL": one("a\0b"),
    "a name with line ends": one("a\nb\r"),
    "a name with terminal escapes": one("\x1b[31mred\x9b"),
    "a name with path separators": one("../../etc/passwd"),
    "a name with a colon": one("a:b::c"),
    "a name with -0": one("model-00001"),
    "a name that looks like an entry": one('":{"data_offsets":[0,1]}'),
    "a name of a thousand characters": one("x" * 1024),
    "a name outside of the first plane": raw_file('{"\\ud83d\\ude00":' + ONE + "}", b"1"),
    "escaped keys": raw_file('{"a":{"\\u0064type":"\\u00498","shape":[1],"data\\u005foffsets":[0,1]}}', b"1"),
    **{f"dtype {name}": raw_file({"a": entry(name, [8], 0, bits)}, bytes(bits)) for name, bits in DTYPE_BITS.items()},
}

MALFORMED = {
    # length
    "no bytes": b"",
    "seven bytes": b"\2" + bytes(6),
    "length 0": struct.pack("<Q", 0),
    "length 0 and a header": raw_file("{}", length=0),
    "length beyond the file": raw_file("{}", length=3),
    "length 2^63": raw_file("{}", length=2**63),
    "length 2^64 - 1": raw_file("{}", length=2**64 - 1),
    "length over the bound": raw_file("{}", length=MAX_HEADER_BYTES + 1),
    # JSON
    "not UTF-8": raw_file(b'{"\xff":' + ONE.encode() + b"}", b"1"),
    "an overlong encoding": raw_file(b'{"\xc0\x80":' + ONE.encode() + b"}", b"1"),
    "a surrogate in UTF-8": raw_file(b'{"\xed\xa0\x80":' + ONE.encode() + b"}", b"1"),
    "a byte order mark": raw_file(b"\xef\xbb\xbf{}"),
    "half a surrogate pair in a name": raw_file('{"\\ud800":' + ONE + "}", b"1"),
    "half a surrogate pair in metadata": raw_file('{"__metadata__":{"a":"\\udc00"},"a":' + ONE + "}", b"1"),
    "not JSON": raw_file("{'a': 1}"),
    "a list": raw_file("[]"),
    "two objects": raw_file("{}{}"),
    "NUL padding": raw_file("{}\0\0"),
    "a trailing comma": raw_file('{"a":' + ONE + ",}", b"1"),
    "a raw control character in a name": raw_file('{"a\1":' + ONE + "}", b"1"),
    "NaN": raw_file('{"a":{"dtype":"I8","shape":[NaN],"data_offsets":[0,1]}}', b"1"),
    "Infinity": raw_file('{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,Infinity]}}', b"1"),
    "a leading zero": raw_file('{"a":{"dtype":"I8","shape":[01],"data_offsets":[0,1]}}', b"1"),
    "nested 100,000 deep": raw_file('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"),
    "nested 900 deep": raw_file('{"a":' + '{"a":' * 900 + "1" + "}" * 900 + "}"),
    "metadata nested 100,000 deep": raw_file('{"__metadata__":' + "[" * 100_000 + "]" * 100_000 + "}"),
    # names
    "a name twice, one after the other": raw_file(
        f'{{"a":{ONE},"a":{{"dtype":"I8","shape":[1],"data_offsets":[1,2]}}}}', b"12"
    ),
    "dtype twice": raw_file('{"a":{"dtype":"I8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"1"),
    "shape twice": raw_file('{"a":{"dtype":"I8","shape":[1],"shape":[1],"data_offsets":[0,1]}}', b"1"),
    "metadata twice": raw_file('{"__metadata__":{},"__metadata__":{},"a":' + ONE + "}", b"1"),
    # metadata
    "metadata of a number": raw_file({"__metadata__": {"a": 1}, "a": entry("I8", [1], 0, 1)}, b"1"),
    "metadata that is a list": raw_file({"__metadata__": ["a"], "a": entry("I8", [1], 0, 1)}, b"1"),
    "metadata of null": raw_file({"__metadata__": {"a": None}, "a": entry("I8", [1], 0, 1)}, b"1"),
    "metadata that is a tensor": raw_file('{"__metadata__":' + ONE + "}", b"1"),
    "metadata that is a tensor, among others": raw_file(
        '{"a":' + ONE + ',"__metadata__":{"dtype":"I8","shape":[0],"data_offsets":[1,1]}}', b"1"
    ),
    # entries
    "an entry that is null": raw_file('{"a":null}'),
    "an entry that is a number": raw_file('{"a":1}'),
    "no dtype": raw_file('{"a":{"shape":[1],"data_offsets":[0,1]}}', b"1"),
    "no shape": raw_file('{"a":{"dtype":"I8","data_offsets":[0,1]}}', b"1"),
    "no data_offsets": raw_file('{"a":{"dtype":"I8","shape":[1]}}', b"1"),
    "an unknown dtype": raw_file({"a": entry("I4", [2], 0, 1)}, b"1"),
    "a dtype in lower case": raw_file({"a": entry("i8", [1], 0, 1)}, b"1"),
    "a dtype that is a list": raw_file('{"a":{"dtype":["I8"],"shape":[1],"data_offsets":[0,1]}}', b"1"),
    "a dtype that is a number": raw_file('{"a":{"dtype":8,"shape":[1],"data_offsets":[0,1]}}', b"1"),
    "a shape that is a number": raw_file('{"a":{"dtype":"I8","shape":1,"data_offsets":[0,1]}}', b"1"),
    "a negative shape": raw_file({"a": entry("I8", [-1, -1], 0, 1)}, b"1"),
    "a negative zero": raw_file('{"a":{"dtype":"I8","shape":[-0],"data_offsets":[0,0]}}'),
    "a negative zero offset": raw_file('{"a":{"dtype":"I8","shape":[0],"data_offsets":[0,-0]}}'),
    "a fractional shape": raw_file({"a": entry("I8", [1.5], 0, 1)}, b"1"),
    "a whole shape written as a fraction": raw_file({"a": entry("I8", [1.0], 0, 1)}, b"1"),
    "a shape in exponents": raw_file('{"a":{"dtype":"I8","shape":[1e0],"data_offsets":[0,1]}}', b"1"),
    "a shape of booleans": raw_file({"a": entry("I8", [True], 0, 1)}, b"1"),
    "a shape of strings": raw_file({"a": entry("I8", ["1"], 0, 1)}, b"1"),
    "a huge integer": raw_file('{"a":{"dtype":"I8","shape":[' + "9" * 5000 + '],"data_offsets":[0,1]}}', b"1"),
    "a huge offset": raw_file('{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,' + "9" * 5000 + "]}}", b"1"),
    "a huge offset between two": raw_file(
        json.dumps({"a": entry("I8", [1], 0, 77), "b": entry("I8", [1], 77, 2)}, separators=(",", ":")).replace(
            "77", "9" * 5000
        ),
        b"12",
    ),
    "a size over 64 bits": raw_file({"a": entry("I8", [0, 2**64], 0, 0)}),
    "a product over 64 bits, then 0": raw_file({"a": entry("I8", [2**63, 2, 0], 0, 0)}),
    "a product over 64 bits": raw_file({"a": entry("I8", [2**32, 2**32], 0, 0)}),
    "bits over 64 bits": raw_file({"a": entry("F64", [2**58], 0, 2**61)}),
    "half a byte": raw_file({"a": entry("F4", [1], 0, 1)}, b"1"),
    "half a byte that runs backwards": raw_file({"a": entry("U8", [1], 0, 1), "b": entry("F4", [1], 1, 0)}, b"1"),
    # offsets
    "one offset": raw_file('{"a":{"dtype":"I8","shape":[1],"data_offsets":[1]}}', b"1"),
    "three offsets": raw_file('{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1,1]}}', b"1"),
    "negative offsets": raw_file({"a": entry("I8", [1], -1, 0)}, b"1"),
    "offsets that run backwards": raw_file({"a": entry("I8", [1], 1, 0)}, b"1"),
    "offsets too far apart": raw_file({"a": entry("I8", [1], 0, 2)}, b"12"),
    "an overlap": raw_file({"a": entry("I8", [2], 0, 2), "b": entry("I8", [2], 1, 3)}, b"123"),
    "the same bytes twice": raw_file({"a": entry("I8", [1], 0, 1), "b": entry("I8", [1], 0, 1)}, b"1"),
    "a hole": raw_file({"a": entry("I8", [1], 0, 1), "b": entry("I8", [1], 2, 3)}, b"123"),
    "a hole at the start, in bytes that add up": raw_file({"a": entry("I8", [2], 1, 2)}, b"12"),
    "a hole at the start": raw_file({"a": entry("I8", [1], 1, 2)}, b"12"),
    "bytes after the data": raw_file({"a": entry("I8", [1], 0, 1)}, b"12"),
    "bytes after an empty header": raw_file("{}", b"1"),
    "data past the end": raw_file({"a": entry("I8", [3], 0, 3)}, b"12"),
    "data far past the end": raw_file({"a": entry("I8", [2**62], 0, 2**62)}, b"12"),
}

STRICTER = {
    "65 dimensions": raw_file({"a": entry("I8", [1] * 65, 0, 1)}, b"1"),
    "a name of more than a thousand characters": raw_file('{"' + "x" * 1025 + '":' + ONE + "}", b"1"),
    "a name of a megabyte": raw_file('{"' + "x" * 2**20 + '":' + ONE + "}", b"1"),
    "an empty tensor twice": raw_file(f'{{"a":{EMPTY},"a":{EMPTY}}}'),
    "a name twice": raw_file('{"a":' + ONE + ',"a":' + ONE + "}", b"1"),
    "a name twice, an escaped key hiding it": raw_file(
        '{"a":' + ONE + ',"a":{"dtype":"I8","shape":[1],"data\\u005foffsets":[0,1]}}', b"1"
    ),
    "a name twice, spelt in two ways": raw_file('{"a":' + ONE + ',"\\u0061":' + ONE + "}", b"1"),
    "an unknown field": raw_file('{"a":{"dtype":"I8","shape":[1],"data_offsets":[0,1],"strides":[1]}}', b"1"),
    "an entry that is a list": raw_file('{"a":["I8",[1],[0,1]]}', b"1"),
    "white space first": raw_file(f' {{"a":{ONE}}}', b"1"),
}
"""What safetensors accepts and this parser does not: what it means depends on who reads it, or no tool writes it."""


def spaced(raw: bytes) -> bytes:
    """The same file with white space in the JSON of its header, as no tool writes it."""
    length = int.from_bytes(raw[:8], "little")
    if raw[8:9] != b"{" or 8 + length > len(raw):
        return raw
    return raw_file(b"{ " + raw[9 : 8 + length], raw[8 + length :])


FORMS: dict[str, Callable[[bytes], bytes]] = {"compact": bytes, "spaced": spaced}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("header") / "model.safetensors"


def accepted_by_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, framework="np") as file:
            list(file.keys())
    except Exception:  # SafetensorError, and OSError for an empty file
        return False
    return True


def accepted(path: Path) -> bool:
    """Whether the header is accepted and the file is as long as it says."""
    try:
        return not read_header(path, "model.safetensors").truncated
    except SourceError:
        return False


def refs(header: ShardHeader) -> dict[str, TensorRef]:
    return dict(header.refs())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", VALID)
def test_valid_files_are_accepted_and_safetensors_agrees(name: str, form: str, scratch: Path) -> None:
    scratch.write_bytes(FORMS[form](VALID[name]))
    assert accepted_by_safetensors(scratch)
    header = read_header(scratch, "model.safetensors")
    assert header.truncated == 0
    with safe_open(scratch, framework="np") as file:
        assert sorted(header.names) == sorted(file.keys())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", VALID)
def test_what_is_accepted_huggingface_hub_reads_alike(name: str, form: str, scratch: Path) -> None:
    raw = FORMS[form](VALID[name])
    scratch.write_bytes(raw)
    header = read_header(scratch, "model.safetensors")
    theirs = _parse_safetensors_header(raw[8 : header.data_start], "model.safetensors", "here").tensors
    assert {name: (info.dtype, tuple(info.shape), *info.data_offsets) for name, info in theirs.items()} == {
        name: (*kind, start, end)
        for (name, kind), start, end in zip(header.tensors.items(), header.starts, header.ends, strict=True)
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MALFORMED)
def test_what_safetensors_refuses_is_refused(name: str, form: str, scratch: Path) -> None:
    scratch.write_bytes(FORMS[form](MALFORMED[name]))
    assert not accepted_by_safetensors(scratch)
    assert not accepted(scratch)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", STRICTER)
def test_more_is_refused_than_safetensors_refuses(name: str, form: str, scratch: Path) -> None:
    scratch.write_bytes(FORMS[form](STRICTER[name]))
    assert accepted_by_safetensors(scratch)
    assert not accepted(scratch)


@pytest.mark.parametrize(
    ("name", "code", "tensor"),
    [
        ("no bytes", "shard-truncated", None),
        ("length beyond the file", "shard-truncated", None),
        ("length 2^63", "header-invalid", None),
        ("not JSON", "header-invalid", None),
        ("an unknown dtype", "header-invalid", "a"),
        ("half a byte", "header-invalid", "a"),
        ("a hole", "header-invalid", "b"),
        ("an overlap", "header-invalid", "b"),
        ("a product over 64 bits, then 0", "header-invalid", "a"),
        ("bits over 64 bits", "header-invalid", "a"),
        ("metadata of a number", "header-invalid", "__metadata__"),
    ],
)
def test_the_error_names_the_defect(name: str, code: str, tensor: str | None, scratch: Path) -> None:
    scratch.write_bytes(MALFORMED[name])
    with pytest.raises(SourceError) as caught:
        read_header(scratch, "model.safetensors")
    assert (caught.value.code, caught.value.tensor) == (code, tensor)
    assert caught.value.expected or caught.value.found
    assert caught.value.exit_code == 3


def test_of_many_entries_the_bad_one_is_named(scratch: Path) -> None:
    entries = {f"t{i}": entry("I8", [1], i, i + 1) for i in range(100)}
    entries["t57"]["shape"] = [2]
    scratch.write_bytes(raw_file(entries, bytes(100)))
    with pytest.raises(SourceError) as caught:
        read_header(scratch, "x")
    assert caught.value.tensor == "t57"


def test_long_values_are_shortened_in_messages(scratch: Path) -> None:
    scratch.write_bytes(raw_file({"a": entry("X" * 2**20, [1], 0, 1)}, b"1"))
    with pytest.raises(SourceError) as caught:
        read_header(scratch, "x")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("cut", [1, 3, 4])
def test_the_loss_of_a_truncated_file_is_reported(cut: int, scratch: Path) -> None:
    scratch.write_bytes(raw_file({"a": entry("I8", [4], 0, 4)}, bytes(4 - cut)))
    assert read_header(scratch, "x").truncated == cut


@pytest.mark.parametrize("name", ["missing.safetensors", "a\0b.safetensors", "\ud800.safetensors", "."])
def test_a_file_that_cannot_be_opened(name: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError) as caught:
        read_header(f"{tmp_path}/{name}", name)
    assert caught.value.code == "shard-missing"


def test_a_file_written_by_safetensors_reads_back(tmp_path: Path) -> None:
    tensors = {
        "codes": torch.arange(6, dtype=torch.int8).reshape(2, 3),
        "scale": torch.tensor(0.5),
        "weight": torch.arange(4).bfloat16().reshape(4, 1),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    found = refs(read_header(path, "model.safetensors"))
    raw = path.read_bytes()
    assert {name: (ref.dtype, ref.shape) for name, ref in found.items()} == {
        "codes": ("I8", (2, 3)),
        "scale": ("F32", ()),
        "weight": ("BF16", (4, 1)),
    }
    for name, tensor in tensors.items():
        ref = found[name]
        assert raw[ref.start : ref.end] == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert ref.nbytes == tensor.nbytes


names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4)


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """A valid file, and what it holds: entries in any order, data in any order, JSON in any form."""
    described = draw(st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPE_BITS)), shapes), max_size=6))
    truth, entries, data = {}, {}, b""
    for name in draw(st.permutations(sorted(described))):
        dtype, shape = described[name]
        bits = DTYPE_BITS[dtype] * prod(shape)
        if bits % 8:
            shape, bits = [*shape, 8], bits * 8
        piece = draw(st.binary(min_size=bits // 8, max_size=bits // 8)) if bits < 512 else bytes(bits // 8)
        entries[name] = entry(dtype, shape, len(data), len(data) + len(piece))
        truth[name] = (dtype, tuple(shape), piece)
        data += piece
    header: dict[str, object] = {name: entries[name] for name in draw(st.permutations(sorted(entries)))}
    metadata = draw(st.none() | st.dictionaries(names, names, max_size=2))
    if metadata is not None:
        header = {"__metadata__": metadata, **header}
    separators = (",", ":") if draw(st.booleans()) else None
    text = json.dumps(header, ensure_ascii=draw(st.booleans()), separators=separators) + " " * draw(st.integers(0, 7))
    return raw_file(text, data), truth


@settings(max_examples=examples(150))
@given(case=files())
def test_any_valid_file_reads_back(
    case: tuple[bytes, dict[str, tuple[str, tuple[int, ...], bytes]]], scratch: Path
) -> None:
    raw, truth = case
    scratch.write_bytes(raw)
    header = read_header(scratch, "x")
    found = {name: (ref.dtype, ref.shape, raw[ref.start : ref.end]) for name, ref in header.refs()}
    assert found == truth
    assert header.truncated == 0
    theirs = {name: (tuple(info["shape"]), bytes(info["data"])) for name, info in deserialize(raw)}
    assert theirs == {name: (shape, data) for name, (_, shape, data) in truth.items()}


def mutations(raw: bytes, data: st.DataObject) -> Iterator[bytes]:
    position = data.draw(st.integers(0, len(raw)))
    other = data.draw(st.integers(0, len(raw)))
    yield (
        raw[:position]
        + data.draw(st.sampled_from([b"0", b"1", b"-", b'"', b",", b"}", b"\\", b"\xff", b"9" * 20]))
        + raw[position:]
    )
    yield raw[: min(position, other)] + raw[max(position, other) :]
    yield raw[:position] + data.draw(st.binary(min_size=1, max_size=1)) + raw[position + 1 :]


@settings(max_examples=examples(250))
@given(data=st.data())
def test_of_any_mutation_whatever_is_accepted_safetensors_accepts(data: st.DataObject, scratch: Path) -> None:
    raw, _ = data.draw(files())
    header = raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]]
    for mutated in mutations(header, data):
        scratch.write_bytes(raw_file(mutated, raw[8 + len(header) :]))
        if accepted(scratch):
            assert accepted_by_safetensors(scratch), mutated
    for mutated in mutations(raw, data):
        scratch.write_bytes(mutated)
        if accepted(scratch):
            assert accepted_by_safetensors(scratch), mutated
