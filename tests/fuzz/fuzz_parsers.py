"""Coverage-guided fuzzing of everything that parses the bytes of a stranger. Not a test: `make fuzz` runs it.

Each target takes bytes, puts them where a checkpoint has them, and lets quarkconv read them. Whatever they are, the
answer is a result that can be printed or an error of quarkconv's own; another exception, a message without end, seconds
of silence or a gigabyte of memory are finds. What is accepted of headers is given to safetensors and huggingface_hub as
well: what they refuse we must refuse.

Usage: python tests/fuzz/fuzz_parsers.py TARGET [--seconds 60]
"""

from __future__ import annotations

import argparse
import json
import lzma
import random
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import atheris

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "fuzz"
EXAMPLE = ROOT / "examples" / "qwen3_moe-quark0.13-f2f"
MAX_MESSAGE = 5_000
MAX_SEED = 2**16

with atheris.instrument_imports(include=["quarkconv"]):
    import quarkconv
    from quarkconv.convert.planner import make_plan
    from quarkconv.description.description import describe
    from quarkconv.errors import QuarkconvError
    from quarkconv.headers.safetensors import parse_header
    from quarkconv.headers.unfinished import read_state, refuse_unfinished
    from quarkconv.inspection.inspection import make_inspection
    from quarkconv.plan.manifest import manifest_to_bytes, read_manifest
    from quarkconv.targets import TARGETS
    from quarkconv.write.staging import Staging
    from quarkconv.write.state import difference, plan_state


class Slot:
    """A directory that is sound but for the file that is fuzzed."""

    def __init__(self, name: str) -> None:
        memory = Path("/dev/shm")
        self.folder = Path(tempfile.mkdtemp(prefix="quarkconv-fuzz-", dir=memory if memory.is_dir() else None))
        self.path = self.folder / name

    def put(self, data: bytes) -> Path:
        """Write the fuzzed file; returns the directory."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(data)
        return self.folder


def check(read: Callable[[], object]) -> None:
    """Read something that may be refused."""
    try:
        read()
    except QuarkconvError as error:
        text = str(error)
        if not text.strip() or len(text) > MAX_MESSAGE:
            raise RuntimeError(f"a message of {len(text)} characters") from error


def model() -> dict[str, bytes]:
    """The files of a checkpoint of 40 tensors in two shards."""
    names = ["lm_head.weight", "model.layers.0.mlp.gate.weight"]
    for module in [
        "self_attn.o_proj",
        *(f"mlp.experts.{n}.{p}" for n in (0, 1) for p in ("gate_proj", "up_proj", "down_proj")),
    ]:
        names += [f"model.layers.0.{module}.weight", f"model.layers.0.{module}.weight_scale"]
    files, weight_map = {}, {}
    for number, part in enumerate((names[:6], names[6:]), start=1):
        entries, position = {}, 0
        file = f"model-{number:05d}-of-00002.safetensors"
        for name in part:
            scale = name.endswith("_scale")
            dtype, shape, nbytes = (
                ("F32", [4], 16) if scale else ("I8", [4, 4], 16) if "proj" in name else ("BF16", [4, 4], 32)
            )
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
            position += nbytes
            weight_map[name] = file
        header = json.dumps(entries, separators=(",", ":")).encode()
        files[file] = struct.pack("<Q", len(header)) + header + bytes(position)
    files["model.safetensors.index.json"] = json.dumps(
        {"metadata": {"total_size": 1}, "weight_map": weight_map}
    ).encode()
    files["config.json"] = (EXAMPLE / "config.json").read_bytes()
    return files


# The targets: each makes a function of bytes, and its seeds


def header() -> tuple[Callable[[bytes], object], Iterator[bytes]]:
    from huggingface_hub.hf_api import _parse_safetensors_header
    from safetensors import deserialize

    def fuzz(data: bytes) -> None:
        try:
            size = parse_header(data, "x", 8 + len(data))
            size = parse_header(data, "x", 8 + len(data) + size.truncated)
        except QuarkconvError as error:
            if len(str(error)) > MAX_MESSAGE:
                raise RuntimeError("a message without end") from error
            return
        if size.size < 2**22:
            whole = struct.pack("<Q", len(data)) + data + bytes(size.size - size.data_start)
            theirs = {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in deserialize(whole)}
            if theirs.keys() != set(size.names):
                raise RuntimeError("safetensors finds other tensors")
        found = _parse_safetensors_header(data, "x", "here").tensors
        if {name: (t.dtype, tuple(t.shape), tuple(t.data_offsets)) for name, t in found.items()} != {
            name: (*kind, (start, end))
            for (name, kind), start, end in zip(size.tensors.items(), size.starts, size.ends, strict=True)
        }:
            raise RuntimeError("huggingface_hub reads something else")

    return fuzz, (raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]] for raw in read_all("*.safetensors", "*.header"))


def described(name: str, seeds: Iterator[bytes]) -> tuple[Callable[[bytes], object], Iterator[bytes]]:
    """A checkpoint of which one file is fuzzed, inspected and planned for every target."""
    slot = Slot(name)
    for file, data in model().items():
        (slot.folder / file).write_bytes(data)

    def fuzz(data: bytes) -> None:
        root = slot.put(data)
        check(lambda: read(root))

    def read(root: Path) -> None:
        description = describe(root)
        value = make_inspection("model", description).to_json()
        if len(json.dumps(value, allow_nan=False)) > 10**6:
            raise RuntimeError("an answer without end")
        for target in TARGETS.values():
            with suppress(QuarkconvError):
                plan = make_plan(description, target, 10**9)
                if quarkconv.Plan.from_json(json.loads(json.dumps(plan.to_json()))).to_json() != plan.to_json():
                    raise RuntimeError("a plan that does not survive JSON")

    return fuzz, seeds


def index() -> tuple[Callable[[bytes], object], Iterator[bytes]]:
    own = model()["model.safetensors.index.json"]
    return described("model.safetensors.index.json", iter([own, *read_all("*.index.json")]))


def config() -> tuple[Callable[[bytes], object], Iterator[bytes]]:
    return described("config.json", read_all("config.json"))


def shard() -> tuple[Callable[[bytes], object], Iterator[bytes]]:
    """A whole file, its length and its data included."""
    name = "model-00002-of-00002.safetensors"
    return described(name, iter([model()[name]]))


def converted() -> Path:
    """The example, converted."""
    out = Path(tempfile.mkdtemp(prefix="quarkconv-fuzz-")) / "out"
    return quarkconv.convert_checkpoint(EXAMPLE, "fused-int8", out).output


def manifest() -> tuple[Callable[[bytes], object], Iterator[bytes]]:
    slot = Slot("quarkconv.json")
    raw = (converted() / "quarkconv.json").read_bytes()
    value = json.loads(raw)
    value["shards"] = [{**shard, "tensors": shard["tensors"][:4]} for shard in value["shards"][:2]]

    def fuzz(data: bytes) -> None:
        root = slot.put(data)
        check(lambda: read(root))

    def read(root: Path) -> None:
        found = read_manifest(root)
        if found is None:
            raise RuntimeError("no manifest where there is one")
        root.joinpath("quarkconv.json").write_bytes(manifest_to_bytes(found))
        if read_manifest(root) != found:
            raise RuntimeError("a manifest that does not survive being written")

    return fuzz, iter([json.dumps(value).encode(), raw])


def state() -> tuple[Callable[[bytes], object], Iterator[bytes]]:
    """What an earlier run left: what it was begun with, and the note of a shard."""
    plan = quarkconv.plan_conversion(EXAMPLE, "fused-int8")
    now = plan_state(plan, "0" * 64, [("a.safetensors", 1, 2)], str(EXAMPLE), Path("out"))
    slot = Slot(".quarkconv/plan.json")
    staging = Staging(slot.folder, "0" * 64)
    shard = plan.shards[0]
    staging.files.mkdir(parents=True)
    staging.notes.mkdir(parents=True)
    with open(staging.files / shard.file, "wb") as file:
        file.truncate(shard.nbytes)
    note = {
        "plan": "0" * 64,
        "header": "0" * 32,
        "pieces": [["0" * 32 for _ in tensor.pieces] for tensor in shard.tensors],
    }

    def fuzz(data: bytes) -> None:
        root = slot.put(data)
        check(lambda: refuse_unfinished(root))
        message = difference(read_state(slot.path), now)
        if message is not None and len(message) > MAX_MESSAGE:
            raise RuntimeError("a difference without end")
        (staging.notes / f"{shard.file}.json").write_bytes(data)
        staging.finished(shard)

    return fuzz, iter([json.dumps(now).encode(), json.dumps(note).encode()])


FUZZED = {"header": header, "shard": shard, "index": index, "config": config, "manifest": manifest, "state": state}


def read_all(*patterns: str) -> Iterator[bytes]:
    """The files of the exports that the tests have, but for long ones."""
    for pattern in patterns:
        for folder in (ROOT / "tests" / "data", ROOT / "examples"):
            for path in sorted([*folder.rglob(pattern), *folder.rglob(f"{pattern}.xz")]):
                data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
                if len(data) <= MAX_SEED or pattern in ("*.safetensors", "*.header"):
                    yield data


# Mutations that know JSON: bytes alone seldom get past the parser


VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**64, 10**30, 0.5, 1e308, float("nan"), "", "*", "re:(a|a)*$", "\ud800",
    "\x1b[31m", "I8",
    "F32", "../x", "x" * 2000, [], [[]], {}, {"": 0}, [0, 0],
]  # fmt: skip


def mutate_bytes(data: bytes, max_size: int) -> bytes:
    """Change bytes as libFuzzer does."""
    return bytes(atheris.Mutate(data, max_size))


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change bytes, or a value somewhere in the JSON that they are."""
    chance = random.Random(seed)
    if chance.random() < 0.4:
        return mutate_bytes(data, max_size)
    prefix, text = b"", data
    if data[8:9] == b"{":  # a whole file: its header, with the right length
        length = struct.unpack("<Q", data[:8])[0]
        prefix, text = data[8 + length :] or b"\0", data[8 : 8 + length]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return mutate_bytes(data, max_size)
    places: list[tuple[Any, Any]] = []
    pending = [value]
    while pending and len(places) < 5000:
        item = pending.pop()
        keys = list(item) if isinstance(item, dict) else range(len(item)) if isinstance(item, list) else ()
        places += ((item, key) for key in keys)
        pending += (item[key] for key in keys)
    for _ in range(chance.choice((1, 1, 2, 4))):
        if not places:
            break
        parent, key = chance.choice(places)
        with suppress(KeyError, IndexError):
            action = chance.randrange(5)
            if action == 0:
                parent[key] = chance.choice(VALUES)
            elif action == 1:
                parent[key] = chance.choice(places)[0]
            elif action == 2 and isinstance(parent, dict):
                parent[chance.choice([str(other) for _, other in places] + ["", "__metadata__"])] = parent[key]
            elif action == 3:
                del parent[key]
            elif isinstance(parent[key], int):
                parent[key] += chance.choice((-1, 1, 2**16, -(2**40)))
    try:
        encoded = json.dumps(value, separators=(",", ":"), ensure_ascii=chance.random() < 0.5).encode(
            "utf-8", "surrogatepass"
        )
    except (ValueError, RecursionError):  # a value that holds itself
        return mutate_bytes(data, max_size)
    if prefix:
        encoded = struct.pack("<Q", len(encoded)) + encoded + prefix
    return encoded[:max_size]


def main() -> None:
    """Fuzz one target for some time; libFuzzer says how many inputs it tried, and keeps finds in build/fuzz/finds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=FUZZED)
    parser.add_argument("--seconds", type=int, default=60)
    options = parser.parse_args()
    fuzz, seeds = FUZZED[options.target]()
    corpus, finds = BUILD / options.target, BUILD / "finds"
    corpus.mkdir(parents=True, exist_ok=True)
    finds.mkdir(exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number}").write_bytes(seed)
    arguments = [
        sys.argv[0], str(corpus), f"-max_total_time={options.seconds}", "-timeout=5", "-rss_limit_mb=1500",
        "-max_len=200000", f"-artifact_prefix={finds}/{options.target}-", "-print_final_stats=1", "-verbosity=1",
    ]  # fmt: skip
    atheris.Setup(arguments, fuzz, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
