"""SGLang's own reader finds and reads the tables that ``quarkconv tune`` writes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import engines.sglang.loading  # noqa: F401  prepares SGLang for a machine without GPU
import pytest
import triton
from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe_triton_config as config

from quarkconv.tune.grid import Tile
from quarkconv.tune.kernels import SGLangKernel
from quarkconv.tune.shapes import whole
from quarkconv.tune.tables import Timing, dump_table

TILES = {1: Tile(16, 64, 128, 1, 4, 5), 512: Tile(32, 128, 128, 1, 4, 4)}
SHAPE = whole(256, 8, 3072, 1536)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[SGLangKernel]:
    """SGLang on a GPU of this name, as far as the names of tables go."""
    monkeypatch.setattr(config, "get_device_name", lambda: "NVIDIA H200")
    config.get_moe_configs.cache_clear()
    yield SGLangKernel()
    config.get_moe_configs.cache_clear()


def test_a_table_is_found_and_read(kernel: SGLangKernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = kernel.table_path(tmp_path, SHAPE)
    version = triton.__version__.replace(".", "_")
    name = "E=256,N=1536,device_name=NVIDIA_H200,dtype=int8_w8a8,per_channel_quant=True.json"
    assert path.relative_to(tmp_path) == Path("configs") / f"triton_{version}" / name
    path.parent.mkdir(parents=True)
    path.write_text(dump_table({tokens: Timing(tile, 2.0, 1.0) for tokens, tile in TILES.items()}))
    monkeypatch.setenv(kernel.variable, str(tmp_path))
    for tokens, nearest in ((1, 1), (300, 512), (100_000, 512)):
        assert kernel.default(SHAPE, tokens) == TILES[nearest]


def test_without_a_table_int8_gets_a_rule_of_thumb(kernel: SGLangKernel) -> None:
    assert kernel.default(SHAPE, 64) == Tile(16, 32, 64, 1, 4, 3)
    assert kernel.default(SHAPE, 4096) == Tile(64, 64, 32, 8, 4, 3)


def test_the_release_is_named(kernel: SGLangKernel) -> None:
    assert kernel.version() == f"sglang {version('sglang')}"


def test_a_tile_is_used_through_sglangs_own_switch(kernel: SGLangKernel) -> None:
    with kernel.using(TILES[1]):
        assert kernel.default(SHAPE, 4096) == TILES[1]
    assert kernel.default(SHAPE, 4096) != TILES[1]
