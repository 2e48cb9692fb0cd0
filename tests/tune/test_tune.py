"""The search over shapes and numbers of tokens, with an engine's kernel and a GPU that are pretended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quarkconv.tune import tune
from quarkconv.tune.grid import Tile, starts
from quarkconv.tune.shapes import whole
from quarkconv.tune.tables import MEASURED, Timing, parse_table

SHAPE = whole(8, 2, 128, 64)
TILE = Tile(16, 64, 128, 1, 4, 3)


class Kernel(SimpleNamespace):
    def version(self) -> str:
        return "engine 1.0"

    def table_path(self, folder: Path, shape: Any) -> Path:
        return folder / f"E={shape.experts},N={shape.intermediate}.json"


def test_an_interrupted_run_leaves_a_table_of_what_it_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Iterator[tuple[int, Timing]]:
        yield 1, Timing(TILE, 20.0, 10.0)
        yield 64, Timing(TILE, 30.0, 20.0)
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "require_gpu", lambda: None)
    monkeypatch.setattr(tune, "engine_kernel", lambda _: Kernel())
    monkeypatch.setattr(tune, "tune_shape", interrupted)
    monkeypatch.setattr(tune, "_head", lambda _: {"engine": "engine 1.0"})
    with pytest.raises(KeyboardInterrupt):
        tune.tune_engine("engine", [SHAPE], tmp_path, tokens=(1, 64, 512))
    assert parse_table((tmp_path / "E=8,N=64.json").read_text()) == {1: TILE, 64: TILE}
    [kept] = json.loads((tmp_path / MEASURED).read_text()).values()
    assert kept["tokens"] == {"1": {"default_us": 20.0, "tuned_us": 10.0}, "64": {"default_us": 30.0, "tuned_us": 20.0}}


def test_what_is_timed_is_compiled_before_in_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile for its number of tokens; no tile twice at a time, since both would compile it."""
    torch = pytest.importorskip("torch")
    batches: list[list[tuple[int, Tile]]] = []
    in_use: list[Tile] = []
    timed: dict[int, set[Tile]] = {1: set(), 64: set(), 4096: set()}

    class Pretended(Kernel):
        def default(self, _: Any, tokens: int) -> Tile:  # noqa: ARG002
            return TILE

        def forwards(self, _: Any, __: Any, inputs: Any) -> Any:
            return inputs

        @contextmanager
        def using(self, tile: Tile) -> Iterator[None]:
            in_use.append(tile)
            yield

    def together(function: Any, counts: Any, tiles: Any) -> Iterator[bool]:
        batches.append(list(zip(counts, tiles, strict=True)))
        return (function(tokens, tile) for tokens, tile in batches[-1])

    def time(inputs: list[int], _: int) -> float:
        tokens, tile = inputs[0], in_use[-1]
        assert (tokens, tile) in {pair for batch in batches for pair in batch}
        timed[tokens].add(tile)
        return 10.0 if tile == TILE else 5.0 + tile.block_k / 128

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("quarkconv.kernels.backend.device_traits", lambda _: SimpleNamespace(shared_memory=227 * 1024))
    monkeypatch.setattr("quarkconv.kernels.tune.make_weights", lambda *_: ())
    monkeypatch.setattr("quarkconv.kernels.tune.time_calls", time)
    monkeypatch.setattr(tune, "_routed", lambda _, tokens: tokens)
    monkeypatch.setattr(tune, "_compiles", lambda *_: True)
    pool: Any = SimpleNamespace(map=together)
    found = list(tune.tune_shape(Pretended(), "engine", SHAPE, (1, 64, 4096), pool))
    assert [tokens for tokens, _ in found] == [1, 64, 4096] * 2
    assert len(batches) == 4  # unlike tiles, then all: of the starts, and of the variations
    for batch in batches[::2]:
        assert len({tile for _, tile in batch}) == len(batch)
    for tokens, tiles in timed.items():
        assert tiles >= {TILE, *starts(SHAPE, tokens, 227 * 1024)}
