"""Which tensors share a file, where they start in it, and whether safetensors reads the header the same."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from quarkconv.plan.pieces import Copy, OutputShard, OutputTensor
from quarkconv.plan.shards import encode_header, pack_shards

PAGE = 4096
ITEM_SIZES = {"I8": 1, "BF16": 2, "F32": 4, "I64": 8}


def tensor(name: str, dtype: str, *shape: int) -> OutputTensor:
    elements = 1
    for size in shape:
        elements *= size
    nbytes = elements * ITEM_SIZES[dtype]
    return OutputTensor(name, dtype, shape, (Copy(name, "source.safetensors", 0, nbytes),))


def starts(shard: OutputShard) -> dict[str, int]:
    """Where each tensor starts, counted from the beginning of the file."""
    position, found = shard.header, {}
    for item in shard.tensors:
        found[item.name] = position
        position += item.nbytes
    return found


def test_shards_are_filled_up_to_the_limit_in_the_order_given() -> None:
    items = [tensor(name, "I8", size) for name, size in (("a", 60), ("b", 40), ("c", 1), ("d", 99), ("e", 2))]
    shards = pack_shards(items, 100)
    assert [sorted(item.name for item in shard.tensors) for shard in shards] == [["a", "b"], ["c", "d"], ["e"]]
    assert [shard.file for shard in shards] == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]


def test_a_tensor_larger_than_the_limit_has_a_file_of_its_own() -> None:
    items = [tensor("a", "I8", 10), tensor("big", "I8", 101), tensor("b", "I8", 10), tensor("exact", "I8", 100)]
    groups = [[item.name for item in shard.tensors] for shard in pack_shards(items, 100)]
    assert groups == [["a"], ["big"], ["b"], ["exact"]]


def test_file_names_count_beyond_five_digits_of_shards_in_order() -> None:
    shards = pack_shards([tensor(f"t{n}", "I8", 8) for n in range(12)], 8)
    assert [shard.file for shard in shards] == sorted(shard.file for shard in shards)
    assert shards[-1].file == "model-00012-of-00012.safetensors"


SHAPES = st.lists(st.integers(0, 70) | st.sampled_from([128, 4096]), max_size=2).map(tuple)


KINDS = st.lists(st.tuples(st.sampled_from(sorted(ITEM_SIZES)), SHAPES), min_size=1, max_size=30)


@given(KINDS, st.integers(1, 200_000))
def test_packing_loses_nothing_and_aligns_everything(kinds: list[tuple[str, tuple[int, ...]]], limit: int) -> None:
    items = [tensor(f"tensor.{number}", dtype, *shape) for number, (dtype, shape) in enumerate(kinds)]
    shards = pack_shards(items, limit)
    assert Counter(item for shard in shards for item in shard.tensors) == Counter(items)
    for shard in shards:
        assert shard.header % PAGE == 0
        assert shard.nbytes == shard.header + sum(item.nbytes for item in shard.tensors)
        assert len(shard.tensors) == 1 or shard.nbytes - shard.header <= limit
        for item in shard.tensors:
            start = starts(shard)[item.name]
            assert start % ITEM_SIZES[item.dtype] == 0
            if item.nbytes % PAGE == 0:
                assert start % PAGE == 0


@pytest.mark.parametrize("name", ["plain", "größe", "層.0", 'quote"back\\slash', "line\nbreak"])
def test_the_header_is_what_safetensors_reads(tmp_path: Path, name: str) -> None:
    items = [
        tensor(name, "BF16", 3, 5),
        tensor("scalar", "F32"),
        tensor("empty", "I64", 0, 4),
        tensor("codes", "I8", 2, 3, 4096),
    ]
    (shard,) = pack_shards(items, 10**6)
    header = encode_header(shard.tensors)
    assert len(header) == shard.header
    path = tmp_path / shard.file
    path.write_bytes(header + bytes(shard.nbytes - shard.header))
    with safe_open(path, "pt") as handle:
        assert handle.metadata() == {"format": "pt"}
        found = {
            key: (handle.get_slice(key).get_dtype(), tuple(handle.get_slice(key).get_shape()))
            for key in handle.keys()  # noqa: SIM118
        }
        assert handle.get_tensor("codes").data_ptr() % ITEM_SIZES["I8"] == 0
    assert found == {item.name: (item.dtype, item.shape) for item in items}


def test_the_header_is_padded_with_spaces_and_compact() -> None:
    header = encode_header([tensor("a", "I8", 4)])
    (length,) = struct.unpack("<Q", header[:8])
    assert len(header) == 8 + length == PAGE
    text = header[8:].decode()
    assert text.rstrip(" ") == json.dumps(json.loads(text), separators=(",", ":"))
