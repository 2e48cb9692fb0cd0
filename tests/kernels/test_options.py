"""Launch options: whatever the shape and device, they can be launched."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quarkconv.kernels import tune
from quarkconv.kernels.arguments import check_arguments
from quarkconv.kernels.backend import DeviceTraits
from quarkconv.kernels.candidates import starts, variations
from quarkconv.kernels.options import (
    MAX_BLOCK_M,
    MIN_BLOCK_M,
    choose_combine_options,
    choose_launch_options,
    choose_row_options,
    fit_options,
    fits_registers,
    gemv_options,
    heuristic_options,
    next_power_of_2,
    shared_bytes,
)
from quarkconv.kernels.pipeline import run_pipeline
from quarkconv.kernels.tables import (
    FOLDER,
    GemvOptions,
    LaunchOptions,
    RowBlocks,
    TileOptions,
    VectorTile,
    dump_table,
    find_options,
    load_table,
    parse_table,
    table_path,
)

DEVICES = [
    DeviceTraits("cuda", 227 * 1024, True, True, dot4=True, name="NVIDIA H200", wgmma=True),
    DeviceTraits("cuda", 227 * 1024, dot4=True),
    DeviceTraits("cuda", 227 * 1024, True, True, True, 132, dot4=True, name="NVIDIA H100 80GB HBM3", wgmma=True),
    DeviceTraits("cuda", 99 * 1024),
    DeviceTraits("hip", 64 * 1024, warp_size=64),
    DeviceTraits("hip", 64 * 1024),
    DeviceTraits("hip", 160 * 1024, warp_size=64),
    DeviceTraits("xpu", 128 * 1024),
    DeviceTraits("interpreter", 1 << 30),
]


def is_power_of_2(value: int) -> bool:
    return value > 0 and value & (value - 1) == 0


def check_launchable(
    options: LaunchOptions | GemvOptions, traits: DeviceTraits, top_k: int, hidden: int, intermediate: int
) -> None:
    if isinstance(options, GemvOptions):
        for tile in (options.gate_up, options.down):
            assert is_power_of_2(tile.block_n)
            assert is_power_of_2(tile.num_warps)
            assert tile.num_warps <= 32
        assert fits_registers(options, top_k, hidden, intermediate)
        return
    blocks = options.blocks
    assert MIN_BLOCK_M <= blocks.block_m <= MAX_BLOCK_M
    assert blocks.tail_m <= blocks.block_m
    assert blocks.small_m < blocks.block_m
    assert all(is_power_of_2(size) for size in (blocks.block_m, blocks.tail_m or 1, blocks.small_m or 1))
    products = ((options.gate_up, 2), (options.down, 1))
    for product, weight_tiles in products:
        assert is_power_of_2(product.block_n)
        assert is_power_of_2(product.block_k)
        assert product.block_n >= 16
        assert product.block_k >= 32
        assert product.num_stages >= 2
        assert traits.tensor_descriptors or not product.descriptors
        assert traits.warp_specialization or not product.specialized
        assert shared_bytes(product, blocks.block_m + blocks.tail_m, weight_tiles) <= traits.shared_memory


@pytest.mark.parametrize("traits", DEVICES, ids=str)
def test_chosen_options_can_always_be_launched(traits: DeviceTraits) -> None:
    for tokens, experts, top_k, width in itertools.product((1, 8, 64, 700, 4096), (1, 8, 256), (1, 8), (24, 88, 4096)):
        options = choose_launch_options(tokens, experts, top_k, width, width, traits)
        check_launchable(options, traits, top_k, width, width)
        options = choose_launch_options(tokens, experts, top_k, width, width, traits, packed=False)
        assert isinstance(options, LaunchOptions)
    for shape in tune.NAMED.values():
        for tokens in tune.TOKENS:
            options = choose_launch_options(tokens, *shape, traits)
            check_launchable(options, traits, *shape[1:])
            for start in starts(tokens, shape):
                for candidate in itertools.chain([start], *variations(start, tokens, shape)):
                    check_launchable(fit_options(candidate, shape[2], shape[3], traits), traits, *shape[1:])


def test_rows_grow_with_the_tokens() -> None:
    found = [choose_launch_options(m, 256, 8, 3072, 1536, DEVICES[1]) for m in (8, 64, 512, 2048, 4096)]
    blocks = [options.blocks.block_m for options in found if isinstance(options, LaunchOptions)]
    assert len(blocks) == len(found)
    assert blocks == sorted(blocks)
    assert blocks[0] == MIN_BLOCK_M
    assert blocks[-1] == MAX_BLOCK_M


def test_warps_are_specialized_for_many_rows_where_they_can_be() -> None:
    hopper, other = DEVICES[2], DEVICES[1]
    assert hopper.warp_specialization
    for tokens, shape, gate_up, down in (
        (4096, (64, 8, 2048, 1024), 8, 4),  # rows enough for tiles of twice the width
        (2048, (64, 8, 2048, 1024), 4, 4),
        (4096, (16, 2, 2048, 64), 0, 0),  # narrow experts; and for down less than a step of sums
        (4096, (16, 2, 2048, 192), 0, 4),
        (512, (64, 8, 2048, 1024), 4, 4),
        (256, (64, 8, 2048, 1024), 4, 4),
        (256, (64, 8, 2048, 512), 0, 4),  # few rows of narrow experts; down has its rows in order already
        (64, (64, 8, 2048, 1024), 0, 0),
    ):
        options = choose_launch_options(tokens, *shape, hopper)
        assert isinstance(options, LaunchOptions)
        for tile, warps in ((options.gate_up, gate_up), (options.down, down)):
            assert tile.specialized == bool(warps)
            assert tile.num_warps == (warps or 4)
        elsewhere = choose_launch_options(tokens, *shape, other)
        assert isinstance(elsewhere, LaunchOptions)
        assert not elsewhere.gate_up.specialized
        assert not elsewhere.down.specialized
        assert elsewhere.gate_up.num_stages <= 3
        assert elsewhere.gate_up.block_n == 64


def test_row_blocks_are_about_as_high_as_the_mean() -> None:
    def blocks(tokens: int, intermediate: int = 2880) -> RowBlocks:
        shape = (64, 4, 2048, intermediate)
        return heuristic_options(tokens, shape, specialized=True).blocks

    assert [blocks(tokens).block_m for tokens in (160, 161, 384, 385, 1440, 1441)] == [16, 32, 32, 64, 64, 128]
    assert [blocks(tokens, 256).block_m for tokens in (160, 161, 720, 721, 1440, 1441)] == [16, 32, 32, 64, 64, 128]
    # With 24 mean rows few experts have more than 32: a tail would only make the program larger.
    assert [blocks(tokens, 256).tail_m for tokens in (384, 385)] == [0, 16]


def test_tiles_of_few_rows_follow_the_columns_of_an_expert() -> None:
    def tiles(tokens: int, intermediate: int) -> tuple[TileOptions, TileOptions]:
        found = heuristic_options(tokens, (64, 4, 4096, intermediate), specialized=True)
        return found.gate_up, found.down

    downs = [tiles(16, width)[1] for width in (384, 512, 704, 1408, 2048, 2880)]
    assert [(tile.block_n, tile.block_k) for tile in downs] == [
        (256, 64), (256, 64), (128, 128), (64, 128), (64, 128), (64, 256),
    ]  # fmt: skip
    assert [tiles(tokens, 2048)[0].block_k for tokens in (16, 63, 64, 128)] == [512, 512, 256, 256]
    assert [tiles(tokens, 512)[0].descriptors for tokens in (64, 65, 160)] == [True, False, False]
    assert tiles(160, 384)[0].descriptors


def test_few_pairs_read_their_weights_for_themselves() -> None:
    def chooses_gemv(tokens: int, experts: int, top_k: int, hidden: int = 3072, intermediate: int = 1536) -> bool:
        chosen = choose_launch_options(tokens, experts, top_k, hidden, intermediate, DEVICES[1])
        return isinstance(chosen, GemvOptions)

    assert chooses_gemv(1, 8, 2)
    assert chooses_gemv(2, 256, 8)
    assert chooses_gemv(4, 256, 8)
    assert not chooses_gemv(5, 256, 8)
    # Experts so small that reading some twice takes less than sorting.
    assert chooses_gemv(12, 256, 8, 2048, 256)
    assert not chooses_gemv(12, 256, 8, 7168, 256)  # long rows
    assert chooses_gemv(2, 8, 2, 4096, 3584)
    assert not chooses_gemv(2, 8, 2, 4096, 14336)
    assert not chooses_gemv(4, 8, 2, 4096, 3584)
    assert not chooses_gemv(2, 32, 8, 7168, 2048)
    assert gemv_options(8, 3072, 1536) == GemvOptions(VectorTile(8, 4), VectorTile(1, 1))
    assert gemv_options(2, 4096, 14336) == GemvOptions(VectorTile(8, 4), VectorTile(1, 2))
    assert gemv_options(8, 7168, 2048) == GemvOptions(VectorTile(4, 4), VectorTile(1, 1))
    # Narrow experts: many programs of gate-up, few of down.
    assert gemv_options(8, 4096, 192) == GemvOptions(VectorTile(4, 2), VectorTile(4, 1))
    assert gemv_options(8, 7168, 256) == GemvOptions(VectorTile(2, 2), VectorTile(4, 1))
    assert gemv_options(10, 2048, 512) == GemvOptions(VectorTile(8, 4), VectorTile(1, 1))
    assert gemv_options(8, 2048, 384) == GemvOptions(VectorTile(4, 2), VectorTile(2, 1))
    assert gemv_options(1, 5120, 2048) == GemvOptions(VectorTile(4, 4), VectorTile(4, 1))
    assert fits_registers(GemvOptions(VectorTile(8, 4), VectorTile(1, 2)), 2, 4096, 14336)
    assert not fits_registers(GemvOptions(VectorTile(8, 2), VectorTile(1, 2)), 2, 4096, 14336)
    assert not fits_registers(GemvOptions(VectorTile(8, 4), VectorTile(1, 1)), 2, 4096, 14336)
    # More weights than a program's registers hold: the matrix units after all.
    assert gemv_options(2, 40000, 1024) is None
    assert gemv_options(8, 4096, 40000) is None
    assert not chooses_gemv(1, 8, 8, 4096, 40000)


def test_row_blocks_are_powers_of_two() -> None:
    for width in (1, 88, 128, 4096, 8192, 8193, 20000):
        for rows in (1, 4096):
            assert is_power_of_2(choose_row_options(rows, width).block)
        assert is_power_of_2(choose_combine_options(width).block)
    # At most an eighth of the lanes idle, where a block of 256 allows it.
    widths = (2048, 1536, 768, 1408, 88, 3072, 4096, 14336)
    assert [choose_row_options(4096, width).block for width in widths] == [256, 256, 256, 256, 128, 512, 1024, 2048]
    assert [choose_row_options(1, width).block for width in widths] == [1024, 512, 256, 512, 128, 1024, 1024, 2048]
    assert [next_power_of_2(v) for v in (0, 1, 2, 3, 4, 5)] == [1, 1, 2, 4, 4, 8]


OPTIONS = LaunchOptions(RowBlocks(32, 16, 16), TileOptions(64, 128, 4, 4, 3), TileOptions(128, 128, 4, 4, 3, False))

GEMV = GemvOptions(VectorTile(8, 4), VectorTile(1, 1))


def test_table_round_trip() -> None:
    table: dict[tuple[int, int, int, int], dict[int, LaunchOptions | GemvOptions]] = {
        (8, 2, 64, 32): {1: GEMV, 64: OPTIONS},
        (4, 1, 32, 32): {2: OPTIONS},
    }
    text = dump_table("Some GPU", {"date": "2026-01-01"}, table)
    assert parse_table(json.loads(text)) == table
    assert text.count("\n") < 12  # a line an entry


@pytest.mark.parametrize(
    "change",
    [
        {"blocks": {"block_m": 48}},
        {"blocks": {"block_m": 16, "tail_m": 32}},
        {"blocks": {"block_m": 16, "small_m": 16}},
        {"blocks": {"block_n": 16}},
        {"gate_up": {"block_n": 64}},
        {"down": {"block_n": 64, "block_k": 128, "group_m": 0, "num_warps": 4, "num_stages": 3}},
        {"down": {"block_n": 64, "block_k": 128, "group_m": 1, "num_warps": 4, "num_stages": 3, "specialized": True}},
        {"down": {"block_n": 256, "block_k": 128, "group_m": 1, "num_warps": 4, "num_stages": 3, "specialized": True}},
        {"down": None},
        {"blocks": None},
        {"sorted": True},
    ],
    ids=str,
)
def test_a_table_with_impossible_options_is_refused(change: dict[str, Any]) -> None:
    document = json.loads(dump_table("Some GPU", {}, {(8, 2, 64, 32): {1: OPTIONS}}))
    fields = document["shapes"][0]["tokens"]["1"]
    for name, value in change.items():
        if value is None:
            del fields[name]
        else:
            fields[name] = value
    with pytest.raises(ValueError, match="launch options: expected"):
        parse_table(document)


def test_committed_tables_are_complete_and_read_back() -> None:
    paths = list(FOLDER.glob("*.json"))
    assert table_path("NVIDIA H200") in paths
    for path in paths:
        document = json.loads(path.read_text())
        assert table_path(document["device"]) == path
        table = parse_table(document)
        assert path.read_text() == dump_table(document["device"], document["measured"], table)
        for shape in tune.SHAPES.values():
            assert set(table[shape]) >= {tokens for tokens in tune.TOKENS if tokens <= 4096}


def test_an_entry_serves_its_neighbourhood() -> None:
    experts, top_k, hidden, intermediate = shape = tune.SHAPES["Qwen3-30B-A3B"]
    entries = load_table("NVIDIA H200")[shape]
    assert find_options("NVIDIA H200", 512, *shape) == entries[512]
    assert find_options("NVIDIA H200", 700, *shape) == entries[512]
    assert find_options("NVIDIA H200", 800, *shape) == entries[1024]
    assert find_options("NVIDIA H200", 32768, *shape) == entries[16384]
    assert find_options("NVIDIA H200", 32769, *shape) is None
    assert find_options("NVIDIA H200", 512, experts, top_k, hidden, intermediate + 16) is None
    assert find_options("Some GPU", 512, *shape) is None
    assert choose_launch_options(64, *shape, DEVICES[0]) == entries[64]


def test_tune_names_the_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["--shape", "8,2,64"], ["--shape", "2,8,64,64"], ["--tokens", "0"], ["--tokens", "x"]):
        with pytest.raises(SystemExit) as stop:
            tune.main(arguments)
        assert stop.value.code == 2
    assert "expected one of MiniMax-M2" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 4
    assert "needs a GPU" in capsys.readouterr().err


@pytest.mark.gpu
def test_tune_writes_a_table_and_keeps_what_it_had(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    assert tune.main(["--shape", "8,2,128,64", "--tokens", "1,64", "--out", str(path)]) == 0
    assert tune.main(["--shape", "4,1,128,64", "--tokens", "2", "--out", str(path)]) == 0
    table = parse_table(json.loads(path.read_text()))
    assert {shape: list(entries) for shape, entries in table.items()} == {
        (8, 2, 128, 64): [1, 64],
        (4, 1, 128, 64): [2],
    }


@pytest.mark.parametrize("traits", DEVICES, ids=str)
def test_sums_fit_registers_that_operands_need_too(traits: DeviceTraits) -> None:
    for tokens in (8, 512, 4096, 16384):
        options = choose_launch_options(tokens, 64, 8, 2048, 1024, traits)
        assert isinstance(options, LaunchOptions)
        rows = options.blocks.block_m + options.blocks.tail_m
        for tile, weight_tiles in ((options.gate_up, 2), (options.down, 1)):
            sums = rows * tile.block_n * weight_tiles / (tile.num_warps * traits.warp_size)
            assert sums <= (50 if traits.rdna else 100 if traits.mma_sync or traits.platform == "hip" else 160)
            assert tile.num_warps <= 16
        assert rows <= 128 or not (traits.rdna or traits.mma_sync)


def test_a_gpu_without_int8_matrix_instructions_reads_weights_for_every_pair() -> None:
    turing = DeviceTraits("cuda", 64 * 1024, dot4=True, int8_matrix=False)
    for tokens in (1, 64, 4096):
        assert isinstance(choose_launch_options(tokens, 128, 8, 2048, 768, turing), GemvOptions)
    for sizes, packed in (((2048, 768), False), ((40000, 1024), True)):
        with pytest.raises(ValueError, match="int8 matrix instructions"):
            choose_launch_options(1, 8, 2, *sizes, turing, packed=packed)


def test_a_gemv_of_more_pairs_than_a_grid_has_is_cut_by_tokens(
    make_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = make_case(7, 32, 32, 4, 2)
    arguments = check_arguments(*case.tensors())
    whole, parts = torch.empty_like(case.hidden_states), torch.empty_like(case.hidden_states)
    gemv = GemvOptions(VectorTile(32, 4), VectorTile(32, 4))
    run_pipeline(arguments, whole, gemv)
    monkeypatch.setattr("quarkconv.kernels.pipeline._MOST_PROGRAMS", 6)
    assert torch.equal(run_pipeline(arguments, parts, gemv), whole)
