"""vLLM's own reader finds and reads the tables that ``quarkconv tune`` writes."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import engines.vllm.loading  # noqa: F401  prepares vLLM for a machine without GPU
import pytest
import torch
from vllm.model_executor.layers.fused_moe import fused_moe
from vllm.model_executor.layers.fused_moe.config import int8_w8a8_moe_quant_config

from quarkconv.tune.grid import Tile
from quarkconv.tune.kernels import VLLMKernel
from quarkconv.tune.shapes import RankShape, whole
from quarkconv.tune.tables import SHIPPED, Timing, dump_table, parse_table

TILES = {1: Tile(16, 64, 128, 1, 4, 5), 512: Tile(32, 128, 128, 1, 4, 4), 4096: Tile(64, 128, 128, 16, 4, 4)}
SHAPE = whole(256, 8, 3072, 1536)


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM on a GPU of this name, as far as the names of tables go."""
    monkeypatch.setattr(fused_moe, "get_device_name_as_file_name", lambda: "NVIDIA_H200")
    fused_moe.get_moe_configs.cache_clear()


@pytest.mark.usefixtures("h200")
def test_a_table_is_found_and_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = VLLMKernel()
    path = kernel.table_path(tmp_path, SHAPE)
    path.write_text(dump_table({tokens: Timing(tile, 2.0, 1.0) for tokens, tile in TILES.items()}))
    monkeypatch.setenv(kernel.variable, str(tmp_path))
    for tokens, nearest in ((1, 1), (200, 1), (300, 512), (3000, 4096), (100_000, 4096)):
        assert kernel.default(SHAPE, tokens) == TILES[nearest]
    fused_moe.get_moe_configs.cache_clear()


@pytest.mark.usefixtures("h200")
def test_int8_tables_have_no_dtype_in_their_names(tmp_path: Path) -> None:
    """If this fails, vLLM distinguishes INT8 from BF16, and shipped tables need other names."""
    scale = torch.ones(1)
    config = int8_w8a8_moe_quant_config(
        w1_scale=scale, w2_scale=scale, a1_scale=None, a2_scale=None, per_act_token_quant=True
    )
    assert config.use_int8_w8a8
    assert config.config_name(torch.int8) is None
    assert VLLMKernel().table_path(tmp_path, SHAPE).name == "E=256,N=1536,device_name=NVIDIA_H200.json"


@pytest.mark.usefixtures("h200")
def test_without_a_table_of_ours_int8_gets_one_for_bf16_or_a_rule_of_thumb() -> None:
    kernel = VLLMKernel()
    shipped = Path(fused_moe.__file__).parent / "configs" / "E=128,N=768,device_name=NVIDIA_H200.json"
    tiles = parse_table(shipped.read_text())
    assert kernel.default(whole(128, 8, 2048, 768), 64) == tiles[64]
    assert kernel.default(SHAPE, 64) == Tile(32, 64, 128, 1, 4, 3)


def test_its_kernel_computes_the_layer_that_is_timed() -> None:
    """In Triton's interpreter, which cuts float32 to BF16: by at most 2 ** -8."""
    program = Path(__file__).with_name("interpreted.py")
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = ([float(word) for word in line.split()] for line in done.stdout.splitlines()[-2:])
    assert first == second  # of two tiles
    assert 0 < max(first) < 2**-8


def test_the_release_is_named() -> None:
    assert VLLMKernel().version() == f"vllm {version('vllm')}"


def test_a_tile_is_used_through_vllms_own_switch() -> None:
    kernel, tile = VLLMKernel(), TILES[1]
    with kernel.using(tile):
        assert kernel.default(SHAPE, 4096) == tile
    assert kernel.default(SHAPE, 4096) != tile


@pytest.mark.usefixtures("h200")
@pytest.mark.parametrize("path", sorted((SHIPPED / "vllm").glob("E=*H200.json")), ids=lambda path: path.stem)
def test_shipped_tables_are_found(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(path.parent))
    experts, intermediate = (int(part.partition("=")[2]) for part in path.stem.split(",")[:2])
    shape, kernel = RankShape(experts, 8, 4096, intermediate, experts), VLLMKernel()
    assert kernel.table_path(path.parent, shape) == path
    assert {tokens: kernel.default(shape, tokens) for tokens in parse_table(path.read_text())} == parse_table(
        path.read_text()
    )
    fused_moe.get_moe_configs.cache_clear()
