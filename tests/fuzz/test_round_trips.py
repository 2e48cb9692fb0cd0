"""Random checkpoints: inspected, converted, verified and converted back; and the same after something went wrong.

A few in the suite, a thousand with ``make fuzz`` (HYPOTHESIS_EXAMPLES).
"""

from __future__ import annotations

import contextlib
import io
import json
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st
from support.checkpoints import Tensors, assert_same_tensors, load, make_checkpoint, write_checkpoint
from support.examples import examples
from support.expected import fused_int8
from support.hostile import listing

import quarkconv
from quarkconv.cli.main import main
from quarkconv.targets import TARGETS

FUZZ = settings(max_examples=examples(12), suppress_health_check=list(HealthCheck))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EXTRA = (torch.float64, torch.uint8, torch.int64, torch.bool, torch.float8_e4m3fn)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A directory of its own for each example, in memory where there is such a place."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="quarkconv-", dir=memory if memory.is_dir() else None) as folder:
        yield Path(folder)


@st.composite
def checkpoints(draw: st.DrawFn) -> dict[str, Any]:
    """Layers of any layout and naming, one scheme for all of them, and tensors that are of no concern."""
    static = draw(st.booleans())
    return {
        "layers": draw(
            st.lists(
                st.tuples(st.sampled_from(["per_expert", "stacked"]), st.sampled_from(["gate_proj", "w1"])),
                min_size=1,
                max_size=3,
            )
        ),
        "options": {
            "experts": draw(st.integers(1, 5)),
            "hidden": draw(st.integers(2, 40)),  # of one row, a scale of shape [1] is per channel and per tensor
            "intermediate": draw(st.integers(2, 40)),
            "granularity": "per_tensor" if static else draw(st.sampled_from(["per_channel", "per_tensor"])),
            "scale_dtype": draw(st.sampled_from(DTYPES)),
            "zero_points": draw(st.booleans()),
            "input_scales": static,
            "column_scales": draw(st.booleans()),
        },
        "extra": draw(st.lists(st.tuples(st.sampled_from(EXTRA), st.lists(st.integers(0, 3), max_size=4)), max_size=3)),
        "shards": draw(st.integers(1, 6)),
        "index": draw(st.booleans()),
        "shard_size": draw(st.integers(1, 20_000)),
        "jobs": draw(st.integers(1, 4)),
    }


def build(folder: Path, recipe: dict[str, Any]) -> Path:
    """Write a checkpoint, one layer after the other."""
    tensors: Tensors = {}
    config: dict[str, Any] = {}
    for number, (layout, family) in enumerate(recipe["layers"]):
        part = make_checkpoint(folder / f"{number}", layout=layout, family=family, seed=number, **recipe["options"])
        config = json.loads((part / "config.json").read_text())
        for name, tensor in load(part).items():
            tensors[name.replace("model.layers.0.", f"model.layers.{number}.")] = tensor
    for number, (dtype, shape) in enumerate(recipe["extra"]):
        tensors[f"model.extra.{number}.values"] = torch.ones(shape).to(dtype)
    config["num_hidden_layers"] = len(recipe["layers"])
    source = folder / "source"
    write_checkpoint(source, tensors, config, min(recipe["shards"], len(tensors)))
    if not recipe["index"]:
        (source / "model.safetensors.index.json").unlink()
    return source


ALL_ROUND_TO_ZERO: dict[str, Any] = {
    "layers": [("per_expert", "gate_proj")], "extra": [], "shards": 1, "index": False, "shard_size": 1, "jobs": 1,
    "options": {
        "experts": 1, "hidden": 5, "intermediate": 2, "granularity": "per_tensor", "scale_dtype": torch.float32,
        "zero_points": False, "input_scales": True, "column_scales": False,
    },
}  # fmt: skip
"""The only token has both of its hidden values below half of the static scale."""


@FUZZ
@given(recipe=checkpoints(), to=st.sampled_from(sorted(TARGETS)))
@example(ALL_ROUND_TO_ZERO, "compressed-tensors")
def test_any_checkpoint_survives_a_round_trip(recipe: dict[str, Any], to: str) -> None:
    with scratch() as folder:
        source = build(folder, recipe)
        before = listing(source)
        inspection = quarkconv.inspect_checkpoint(source, deep=True)
        assert inspection.ok, inspection.findings
        json.dumps(inspection.to_json(), allow_nan=False)
        support = inspection.targets[to]
        event(f"{to}: {'supported' if support.supported else 'not supported'}")
        options = {"max_shard_size": recipe["shard_size"], "jobs": recipe["jobs"]}
        if not support.supported:
            with pytest.raises(quarkconv.UnsupportedError):
                quarkconv.convert_checkpoint(source, to, folder / "out", **options)
            assert not (folder / "out").exists()
            return
        output = quarkconv.convert_checkpoint(source, to, folder / "out", **options).output
        assert listing(source) == before
        written = sum(file.stat().st_size for file in output.glob("*.safetensors"))
        assert support.nbytes is not None
        assert support.nbytes < written < support.nbytes + 2**20
        if to == "bf16":
            return  # floats: compared with torch in tests/targets
        verification = quarkconv.verify_checkpoint(output, source=source, device="cpu", tokens=1, layers={0})
        # Random static scales are not calibrated: what they make of activations need not be near the float model, and
        # of few channels all may round to 0.
        allowed = ("dequantized", "zero for every token") if recipe["options"]["input_scales"] else ()
        problems = [item for item in verification.problems if not any(words in item.message for words in allowed)]
        assert not problems
        back = quarkconv.convert_checkpoint(output, "quark", folder / "back").output
        assert quarkconv.inspect_checkpoint(back).ok
        assert_same_tensors(fused_int8(back), fused_int8(source))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        found += places(item, (*path, key))
    return found


VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, -1, 0, 1, 3, 2**40, 2**64, 0.5, "", "I8", "*", "re:(.|.)*x", "../x", [], {}, [0, 0]]
)


@FUZZ
@given(recipe=checkpoints(), data=st.data())
def test_any_damage_to_a_checkpoint_is_reported(recipe: dict[str, Any], data: st.DataObject) -> None:
    """Exit codes of the contract, no traceback, nothing written unless all of it, and the source as it was."""
    with scratch() as folder:
        source = build(folder, recipe)
        for _ in range(data.draw(st.integers(1, 3))):
            corrupt(source, data)
        before = listing(source)
        code, _ = command("inspect", source, "--deep")
        assert code in (0, 1, 3)
        to = data.draw(st.sampled_from(sorted(TARGETS)))
        out = folder / "out"
        code, _ = command("convert", source, "--to", to, "--out", out, "--jobs", "1")
        event(f"convert exits {code}")
        assert code in (0, 3, 4)
        assert listing(source) == before
        if code != 0:
            assert not out.exists()
        elif to != "bf16":
            code, printed = command("verify", out, "--source", source, "--tokens", "1", "--device", "cpu")
            assert code in (0, 1, 4)
            assert '"kind": "bytes"' not in printed


def corrupt(folder: Path, data: st.DataObject) -> None:
    """Change one thing in a checkpoint."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    if not files:
        return
    path = data.draw(st.sampled_from(files))
    how = data.draw(st.sampled_from(["flip", "flip", "cut", "add", "delete", "copy", "value", "value", "value"]))
    raw = bytearray(path.read_bytes())
    if how == "delete":
        path.unlink()
    elif how == "copy":
        (folder / data.draw(st.sampled_from(["model.safetensors", "a.safetensors", "b.txt"]))).write_bytes(raw)
    elif how == "cut":
        path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    elif how == "add":
        path.write_bytes(raw + b"0")
    elif how == "flip" and raw:
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(raw)
    elif how == "value":
        change_value(path, bytes(raw), data)


def change_value(path: Path, raw: bytes, data: st.DataObject) -> None:
    """Change a value of the JSON in a file, that of a header included."""
    end = 8 + int.from_bytes(raw[:8], "little") if path.suffix == ".safetensors" else 0
    try:
        value = json.loads(raw[8:end] if end else raw)
    except ValueError:
        return
    where = places(value)
    if not where:
        return
    *parents, last = data.draw(st.sampled_from(where))
    item = value
    for key in parents:
        item = item[key]
    if data.draw(st.booleans()):
        item[last] = data.draw(VALUES)
    elif isinstance(item, dict):
        item[data.draw(st.sampled_from([*map(str, item), "a", "__metadata__"]))] = item.pop(last)
    text = json.dumps(value).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:] if end else text)


def command(*arguments: str | Path) -> tuple[int, str]:
    """Run the program: exit code, and its JSON."""
    stdout, stderr = io.StringIO(), io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with (
            contextlib.redirect_stdout(stdout),
            contextlib.redirect_stderr(stderr),
            pytest.raises(SystemExit) as caught,
        ):
            main([*map(str, arguments), "--json"])
    finally:
        signal.signal(signal.SIGTERM, handler)
    json.loads(stdout.getvalue(), parse_constant=pytest.fail)
    assert "Traceback" not in stderr.getvalue()
    return int(caught.value.code or 0), stdout.getvalue()
