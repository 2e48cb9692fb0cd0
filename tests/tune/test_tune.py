"""The search over shapes and numbers of tokens, with an engine's kernel and a GPU that are pretended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from quarkconv.tune import tune
from quarkconv.tune.grid import Tile, starts
from quarkconv.tune.search import Timings
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
    def interrupted(*_: object) -> Iterator[tuple[int, Timings]]:
        yield 1, (Timing(TILE, 20.0, 10.0),)
        yield 64, (Timing(TILE, 30.0, 20.0),)
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "require_gpu", lambda: None)
    monkeypatch.setattr(tune, "engine_kernel", lambda _: Kernel())
    monkeypatch.setattr(tune, "tune_shapes", interrupted)
    monkeypatch.setattr(tune, "_head", lambda _: {"engine": "engine 1.0"})
    with pytest.raises(KeyboardInterrupt):
        tune.tune_engine("engine", [SHAPE], tmp_path, tokens=(1, 64, 512))
    assert parse_table((tmp_path / "E=8,N=64.json").read_text()) == {1: TILE, 64: TILE}
    [[kept]] = json.loads((tmp_path / MEASURED).read_text()).values()
    assert kept["tokens"] == {"1": {"default_us": 20.0, "tuned_us": 10.0}, "64": {"default_us": 30.0, "tuned_us": 20.0}}


def test_shapes_of_one_table_are_tuned_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's name of a table has no hidden size: the second shape would overwrite the table of the first."""
    wide, other = replace(SHAPE, hidden=256), whole(8, 2, 128, 32)
    groups = []

    def found(_: object, __: object, shapes: list[Any], ___: object, ____: object) -> Iterator[tuple[int, Timings]]:
        groups.append(list(shapes))
        yield 1, tuple(Timing(TILE, 20.0, 10.0 + number) for number in range(len(shapes)))

    monkeypatch.setattr(tune, "require_gpu", lambda: None)
    monkeypatch.setattr(tune, "engine_kernel", lambda _: Kernel())
    monkeypatch.setattr(tune, "tune_shapes", found)
    monkeypatch.setattr(tune, "_head", lambda _: {"engine": "engine 1.0"})
    written = tune.tune_engine("engine", [SHAPE, other, wide, SHAPE], tmp_path, tokens=(1,))
    assert groups == [[SHAPE, wide], [other]]
    assert [(table.path.name, table.shape) for table in written] == [
        ("E=8,N=64.json", SHAPE), ("E=8,N=64.json", wide), ("E=8,N=32.json", other)
    ]  # fmt: skip
    kept = json.loads((tmp_path / MEASURED).read_text())["E=8,N=64.json"]
    assert [(entry["hidden"], entry["tokens"]["1"]["tuned_us"]) for entry in kept] == [(128, 10.0), (256, 11.0)]


def test_processes_import_the_engine_while_this_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An import of vLLM takes longer than the first tiles."""
    events: list[Any] = []
    pool = SimpleNamespace(submit=lambda function, engine: events.append((function, engine)))

    def imported(_: str) -> Kernel:
        events.append("this process")
        return Kernel()

    monkeypatch.setattr(tune, "require_gpu", lambda: None)
    monkeypatch.setattr(tune, "ProcessPoolExecutor", lambda *_: nullcontext(pool))
    monkeypatch.setattr(tune, "engine_kernel", imported)
    assert tune.tune_engine("engine", [], tmp_path, jobs=3) == []
    assert events == [(tune._import, "engine")] * 3 + ["this process"]


def test_what_is_timed_is_compiled_before_in_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile for its number of tokens and each shape; no tile twice at a time, since both would compile it."""
    wide = replace(SHAPE, hidden=256)
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
    found = list(tune.tune_shapes(Pretended(), "engine", [SHAPE, wide], (1, 64, 4096), pool))
    assert [tokens for tokens, _ in found] == [1, 64, 4096] * 2
    assert len(batches) == 6  # unlike tiles, then all for each shape: of the starts, and of the variations
    for batch in batches[::3]:
        assert len({tile for _, tile in batch}) == len(batch)
    for tokens, tiles in timed.items():
        assert tiles >= {TILE, *starts(SHAPE, tokens, 227 * 1024), *starts(wide, tokens, 227 * 1024)}
    assert [batch for batch in batches if batches.count(batch) == 2] == [batches[n] for n in (1, 2, 4, 5)]


@pytest.mark.parametrize("contiguous", [False, True])
def test_tiles_are_compiled_for_the_shape_that_is_timed(monkeypatch: pytest.MonkeyPatch, contiguous: bool) -> None:
    """With as many experts, since engines launch another kernel for fewer; in the memory of one where possible."""
    torch = pytest.importorskip("torch")
    seen: list[tuple[Any, Any]] = []

    class Pretended(Kernel):
        needs_contiguous_weights = contiguous

        def forwards(self, shape: Any, weights: Any, inputs: Any) -> Any:
            seen.append((shape, weights))
            return [lambda: None for _ in inputs]

        @contextmanager
        def using(self, _: Tile) -> Iterator[None]:
            yield

    def weights_of(sizes: tuple[int, ...], _: Any) -> Any:
        experts, _, hidden, intermediate = sizes
        shapes = ((2 * intermediate, hidden), (hidden, intermediate), (2 * intermediate, 1), (hidden, 1))
        return tuple(torch.zeros((experts, *shape)) for shape in shapes)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("quarkconv.kernels.tune.make_weights", weights_of)
    monkeypatch.setattr(tune, "engine_kernel", lambda _: Pretended())
    monkeypatch.setattr(tune, "_routed", lambda _, tokens: tokens)
    tune._small.cache_clear()
    assert tune._compiles("engine", SHAPE, 64, TILE)
    tune._small.cache_clear()
    [(shape, weights)] = seen
    assert shape == SHAPE
    assert [tuple(tensor.shape) for tensor in weights] == [(8, 128, 128), (8, 128, 64), (8, 128, 1), (8, 128, 1)]
    for tensor in weights:
        assert tensor.is_contiguous() == contiguous
        assert tensor.untyped_storage().nbytes() * (1 if contiguous else 8) == tensor.nbytes
