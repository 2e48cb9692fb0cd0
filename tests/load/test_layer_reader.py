"""One layer read to an arena: every layout, every rank, each byte once, beside or past the page cache."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import make_checkpoint
from support.exports import Checkpoints, Converted
from support.stacked import stacked_experts

import quarkconv
from quarkconv.description.description import describe
from quarkconv.experts.ranks import WHOLE, Rank
from quarkconv.headers.safetensors import TensorRef
from quarkconv.load import layer_reads
from quarkconv.load.arenas import Arena, ArenaPool
from quarkconv.load.layer_reader import LayerReader
from quarkconv.load.layer_reads import LayerPart, covered, written_tensors
from quarkconv.plan.manifest import read_manifest

NAME = "qwen3_moe-quark0.13-f2f"
NAMES = [NAME, "mixtral-quark0.11-eager", "step3p5-like-3key_fused", "qwen3_moe-quark0.11-eager-int8_static",
         "qwen3_moe-quark0.13-f2f-per_tensor_weight"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("after", [False, True])
def test_layers_are_read_as_safetensors_reads_them(
    name: str, after: bool, checkpoints: Checkpoints, converted: Converted
) -> None:
    folder = converted(name) if after else checkpoints(name)
    description = describe(folder)
    with ThreadPoolExecutor(3) as pool, LayerReader(description, pool) as reader:
        for layer in description.int8_layers:
            with ArenaPool(1, LayerPart(layer).nbytes) as arenas:
                arena = arenas.take(1)
                assert arena is not None
                found, _ = reader.read(LayerPart(layer), arena)
                for field, expected in stacked_experts(folder, layer).items():
                    assert (getattr(found, field) is None) == (expected is None), field
                    assert expected is None or torch.equal(getattr(found, field), expected), field


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [WHOLE, Rank("tp", 1, 2)], ids=["whole", "tp"])
def test_a_layer_is_read_from_each_file_front_to_back(name: str, rank: Rank, checkpoints: Checkpoints) -> None:
    """In memory gate and up of all experts come before down; in files the projections of an expert are neighbours."""
    description = describe(checkpoints(name))
    for layer in description.int8_layers:
        part = LayerPart(layer, rank)
        reads = list(layer_reads.layer_reads(part, description.checkpoint.refs(), {}))
        offsets = [(item.file, item.start) for item in reads]
        assert offsets == sorted(offsets)
        if layer.layout == "per_expert":
            assert [item.at for item in reads] != sorted(item.at for item in reads)


@pytest.mark.parametrize("layout", ["per_expert", "stacked", "fused"])
@pytest.mark.parametrize("rank", [Rank("tp", 1, 2), Rank("ep", 2, 3)], ids=["tp", "ep"])
def test_tensors_larger_than_a_chunk_are_read_in_several_chunks(
    layout: str, rank: Rank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_reads, "CHUNK_BYTES", 100)  # a matrix has 480 bytes, a row of down 20
    model = make_checkpoint(tmp_path / "model", layout=layout, experts=5)
    layer = describe(model).moe_layers[0]
    parts = list(layer_reads.layer_reads(LayerPart(layer, rank), describe(model).checkpoint.refs(), {}))
    assert max(part.nbytes for part in parts) <= 100
    found = quarkconv.load_fused_experts(model, 0, rank=rank.rank, world_size=rank.world_size, parallel=rank.parallel)
    whole = stacked_experts(model, layer)
    experts, inner = slice(*_bounds(rank.experts(5))), slice(*_bounds(rank.intermediate(20)))
    w13, w2 = whole["w13"], whole["w2"]
    assert w13 is not None
    assert w2 is not None
    gate, up = w13[experts].chunk(2, dim=1)
    assert torch.equal(found.w13, torch.cat([gate[:, inner], up[:, inner]], dim=1))
    assert torch.equal(found.w2, w2[experts][:, :, inner])


def _bounds(numbers: range) -> tuple[int, int]:
    return numbers.start, numbers.stop


@pytest.mark.parametrize("name", ["qwen3_moe-quark0.13-f2f", "step3p5-like-3key_fused"])
@pytest.mark.parametrize("target", ["fused-int8", "compressed-tensors"])
def test_whole_tensors_are_compared_with_the_manifest_on_the_way(
    name: str, target: str, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    model = quarkconv.convert_checkpoint(checkpoints(name), target, tmp_path / "out").output
    description = describe(model)
    layer = description.int8_layers[0]
    found = covered(LayerPart(layer), description.checkpoint.refs(), written_tensors(read_manifest(model)))
    expected = {layer.projection(role, expert).names.weight
                for role in ("gate", "up", "down") for expert in range(layer.experts)}  # fmt: skip
    if layer.layout == "stacked":  # gate and up lie in alternating halves of memory: their pieces are not read whole
        expected = {layer.projection("down", 0).names.weight}
    assert found == expected


@pytest.mark.parametrize("status", [0, 2])
def test_pages_are_locked_once_and_unlocked_if_they_were_locked(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def lock(address: int, nbytes: int, flags: int) -> int:
        calls.append(("lock", address, nbytes, flags))
        return status

    calls: list[tuple[object, ...]] = []
    runtime = SimpleNamespace(
        cudaHostRegister=lock, cudaHostUnregister=lambda address: calls.append(("unlock", address))
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with ArenaPool(2, 5000) as pool:
        arena = pool.take(1)
        assert arena is not None
        for _ in range(2):
            arena.lock()
    address = arena.tensor.data_ptr()
    assert calls == [("lock", address, 5000, 0)] + ([] if status else [("unlock", address)])


def test_what_is_not_in_the_page_cache_is_read_from_the_disk_once(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", experts=8, hidden=1024, intermediate=1024)
    model = quarkconv.convert_checkpoint(source, "fused-int8", tmp_path / "model").output
    description = describe(model)
    part = LayerPart(description.int8_layers[0])

    def bytes_from_the_disk() -> int:
        with open("/proc/self/io") as counters:
            return int(next(line for line in counters if line.startswith("read_bytes")).split()[1])

    for path in model.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    with (
        ThreadPoolExecutor(3) as pool,
        LayerReader(description, pool) as reader,
        ArenaPool(1, part.nbytes) as arenas,
    ):
        arena = arenas.take(1)
        assert arena is not None
        before = bytes_from_the_disk()
        reader.read(part, arena)
        read = bytes_from_the_disk() - before
    if read == 0:
        pytest.skip("this file system keeps its files in memory, or does not count")
    assert read < 1.05 * part.nbytes  # and the scales, with what is read ahead of them


class Blocks(Arena):
    """Memory that takes a few bytes at a time, as buffers of a device do, from one buffer that is used again."""

    block = 1000

    def __init__(self, nbytes: int) -> None:
        super().__init__(nbytes)
        self.sizes: list[int] = []
        self.finished = 0

    def fill(self, at: int, nbytes: int, read: Callable[[memoryview], int]) -> int:
        buffer = bytearray(nbytes)
        count = read(memoryview(buffer))
        self.memory[at : at + count] = buffer[:count]
        self.sizes.append(nbytes)
        return count

    def finish(self) -> None:
        self.finished += 1


def test_memory_is_filled_in_blocks_of_its_own(converted: Converted) -> None:
    """With checksums on the way, and for whole tensors of any dtype as for codes."""
    folder = converted(NAME)
    description = describe(folder)
    written = written_tensors(read_manifest(folder))
    layer = description.int8_layers[0]
    stored = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    with ThreadPoolExecutor(3) as pool, LayerReader(description, pool, written) as reader:
        memory = Blocks(LayerPart(layer).nbytes)
        found, wrong = reader.read(LayerPart(layer), memory)
        made: list[Blocks] = []

        def new(nbytes: int) -> Blocks:
            made.append(Blocks(nbytes))
            return made[-1]

        whole = reader.tensors(stored, new)
    assert not wrong
    assert memory.finished == 1
    assert max(memory.sizes) == 1000
    for field, expected in stacked_experts(folder, layer).items():
        assert expected is None or torch.equal(getattr(found, field), expected), field
    assert [item.finished for item in made] == [1]
    assert whole.keys() == stored.keys()
    for name, tensor in stored.items():
        assert whole[name].dtype == tensor.dtype
        assert torch.equal(whole[name], tensor), name


def test_whole_tensors_are_read_in_the_order_of_the_files_neighbours_at_once() -> None:
    def ref(start: int, end: int, file: str = "a") -> TensorRef:
        return TensorRef("I8", (end - start,), file, start, end)

    refs = {"third": ref(192, 202), "fourth": ref(202, 207), "first": ref(0, 128), "second": ref(128, 192),
            "other": ref(0, 7, "b")}  # fmt: skip
    reads, places, nbytes = layer_reads.tensor_reads(refs)
    # "fourth" would begin at 202 in memory, which is not a multiple of 64.
    assert [(item.file, item.start, item.nbytes, item.at) for item in reads] == [
        ("a", 0, 202, 0), ("a", 202, 5, 256), ("b", 0, 7, 320)]  # fmt: skip
    assert places == {"first": 0, "second": 128, "third": 192, "fourth": 256, "other": 320}
    assert nbytes == 327


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_device_is_filled_through_page_locked_buffers(converted: Converted) -> None:
    from quarkconv.load.staging import Staging

    folder = converted(NAME)
    description = describe(folder)
    layer = description.int8_layers[0]
    staging = Staging(torch.device("cuda", 0))
    with ThreadPoolExecutor(8) as pool, LayerReader(description, pool) as reader:
        for _ in range(3):
            found, _ = reader.read(LayerPart(layer), staging.memory(LayerPart(layer).nbytes))
            names = [name for name, ref in reader.refs.items() if ref.nbytes]
            whole = reader.tensors(names, staging.memory)
            for field, expected in stacked_experts(folder, layer).items():
                assert expected is None or torch.equal(getattr(found, field).cpu(), expected), field
            host = reader.tensors(names)
            assert all(torch.equal(whole[name].cpu(), host[name]) for name in names)
