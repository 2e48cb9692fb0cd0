"""Measure ``evaluate`` beside reading both models once, and beside its matrix products: time, memory.

    python benchmarks/evaluate.py [--layers 7] [--shape qwen3] [--rows 4x512,512x2048] [--device cuda] [--out FILE]

Makes a qwen3_moe of random weights with the sizes of Qwen3-30B-A3B's layers, in BF16 and quantized to ptpc_int8 (15 GB
in all with 7 layers), or of MiniMax-Text-01's (26 GB with one layer), and evaluates it on rows of windows x tokens.
Before each measurement the files are dropped from the page cache, as far as the system does that, and reading both once
is measured.

The first run of each row, on at most ``--first`` windows, compiles kernels, which takes seconds once on a machine
(``first_seconds``); the next ones, ``--repeat``, are measured, and the median counts. Before those, in rows of more
windows, but at most ``--profile``, torch's profiler sums the kernels of a whole run: seconds of
``products`` and of all ``others``, beside the run's own. ``timeline`` are the seconds before the first layer, of each
layer with the wait for its reading, and of the scores; ``spans`` are the begin and the end of each step of reading,
filling, running and scoring. Memory is counted beyond what the process held before.

With several ``--device``, such as ``cuda:0,cuda`` for one GPU and for all, those rows run on each of them, and
``same_figures`` says whether all figures equal those on the first, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import peak_memory
from safetensors.torch import save_file
from torch import Tensor

from quarkconv.progress import SILENT, Progress, Silent


class Shape(NamedTuple):
    """Sizes of a model."""

    hidden: int
    inner: int
    experts: int
    heads: int
    kv_heads: int
    size: int
    vocabulary: int
    top_k: int


SHAPES = {
    "qwen3": Shape(2048, 768, 128, 32, 4, 128, 151936, 8),
    "minimax": Shape(6144, 9216, 32, 64, 8, 128, 200064, 2),
    "tiny": Shape(64, 32, 4, 4, 2, 16, 512, 2),
}


def config(shape: Shape, layers: int) -> dict[str, Any]:
    """config.json of the unquantized model."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "dtype": "bfloat16",
        "hidden_size": shape.hidden, "moe_intermediate_size": shape.inner, "intermediate_size": shape.inner,
        "num_experts": shape.experts, "num_experts_per_tok": shape.top_k, "norm_topk_prob": True,
        "num_hidden_layers": layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.size, "vocab_size": shape.vocabulary, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "hidden_act": "silu", "rms_norm_eps": 1e-6, "max_position_embeddings": 8192, "tie_word_embeddings": False,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    }  # fmt: skip


def quantization() -> dict[str, Any]:
    """What Quark writes for ptpc_int8."""
    common = {"dtype": "int8", "symmetric": True, "qscheme": "per_channel"}
    weight, inputs = {**common, "is_dynamic": False, "ch_axis": 0}, {**common, "is_dynamic": True, "ch_axis": 1}
    one = {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None}
    return {"quant_method": "quark", "global_quant_config": one, "exclude": ["lm_head", "*.mlp.gate"],
            "export": {"pack_method": "order", "weight_format": "real_quantized"}, "version": "0.13"}  # fmt: skip


def layer_tensors(shape: Shape, layer: int, device: str) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, BF16 tensor and whether it is quantized, of one decoder layer."""
    prefix = f"model.layers.{layer}"
    wide, narrow = shape.heads * shape.size, shape.kv_heads * shape.size
    linears = {"self_attn.q_proj": (wide, shape.hidden), "self_attn.k_proj": (narrow, shape.hidden),
               "self_attn.v_proj": (narrow, shape.hidden), "self_attn.o_proj": (shape.hidden, wide)}  # fmt: skip
    for expert in range(shape.experts):
        linears |= {f"mlp.experts.{expert}.{name}_proj": (shape.inner, shape.hidden) for name in ("gate", "up")}
        linears[f"mlp.experts.{expert}.down_proj"] = (shape.hidden, shape.inner)
    for name, (rows, columns) in linears.items():
        weight = torch.randn(rows, columns, device=device) / columns**0.5
        yield f"{prefix}.{name}.weight", weight.bfloat16(), True
    gate = torch.randn(shape.experts, shape.hidden, device=device) / shape.hidden**0.5
    yield f"{prefix}.mlp.gate.weight", gate.bfloat16(), False
    for name, length in (("input_layernorm", shape.hidden), ("post_attention_layernorm", shape.hidden),
                         ("self_attn.q_norm", shape.size), ("self_attn.k_norm", shape.size)):  # fmt: skip
        yield f"{prefix}.{name}.weight", torch.ones(length, dtype=torch.bfloat16, device=device), False


def make_models(shape: Shape, layers: int, folder: Path, device: str) -> tuple[Path, Path]:
    """The quantized model and the one before: a shard for each layer, and one for the rest."""
    quantized, before = folder / "int8", folder / "bf16"
    for path in (quantized, before):
        path.mkdir()
    torch.manual_seed(0)
    index: dict[Path, dict[str, str]] = {quantized: {}, before: {}}

    def write(path: Path, shard: str, tensors: dict[str, Tensor]) -> None:
        save_file({name: tensor.cpu() for name, tensor in tensors.items()}, path / shard, metadata={"format": "pt"})
        index[path] |= dict.fromkeys(tensors, shard)

    pool = ThreadPoolExecutor(4)
    writes = []
    for layer in range(layers):
        codes: dict[str, Tensor] = {}
        floats: dict[str, Tensor] = {}
        for name, tensor, is_quantized in layer_tensors(shape, layer, device):
            floats[name] = tensor
            if is_quantized:
                scale = tensor.float().abs().amax(1) / 127
                codes[name] = (tensor.float() / scale[:, None]).round().to(torch.int8)
                codes[f"{name}_scale"] = scale
            else:
                codes[name] = tensor
        for path, tensors in ((quantized, codes), (before, floats)):
            writes.append(pool.submit(write, path, f"layer-{layer}.safetensors", tensors))
    rest = {name: torch.randn(shape.vocabulary, shape.hidden, device=device).mul_(0.02).bfloat16()
            for name in ("model.embed_tokens.weight", "lm_head.weight")}  # fmt: skip
    rest["model.norm.weight"] = torch.ones(shape.hidden, dtype=torch.bfloat16, device=device)
    with pool:
        writes += [pool.submit(write, path, "rest.safetensors", rest) for path in (quantized, before)]
    for item in writes:
        item.result()
    for path in (quantized, before):
        found = config(shape, layers) | ({"quantization_config": quantization()} if path == quantized else {})
        (path / "config.json").write_text(json.dumps(found))
        weights = {"metadata": {}, "weight_map": index[path]}
        (path / "model.safetensors.index.json").write_text(json.dumps(weights))
    return quantized, before


def drop(folders: list[Path]) -> None:
    """Drop the files from the page cache."""
    for file in (file for folder in folders for file in folder.iterdir()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_once(folders: list[Path]) -> dict[str, float]:
    """Read every file with as many threads as evaluate has, into memory that is used again."""
    from quarkconv.load.layer_reader import READERS

    part, block = 64 * 2**20, 2 * 2**20
    files = [file for folder in folders for file in folder.iterdir()]

    def read(task: tuple[Path, int]) -> int:
        file, start = task
        descriptor, buffer, done = os.open(file, os.O_RDONLY), bytearray(block), 0
        while done < part and (count := os.preadv(descriptor, [buffer], start + done)):
            done += count
        os.close(descriptor)
        return done

    started = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        tasks = [(file, start) for file in files for start in range(0, file.stat().st_size, part)]
        size = sum(pool.map(read, tasks))
    return {"seconds": time.perf_counter() - started, "bytes": size, "threads": READERS}


@contextmanager
def peak_memories(found: dict[str, Any], device: str) -> Iterator[None]:
    """Note by how much memory of the host and of the device grows, in bytes."""
    held = 0
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()

    with peak_memory() as peaks:
        yield
    found["host_bytes"] = peaks[-1]
    found["device_bytes"] = torch.cuda.max_memory_allocated() - held if device.startswith("cuda") else None


@contextmanager
def spans() -> Iterator[list[tuple[float, float, str]]]:
    """Collect begin, end, in seconds, and name of each step: describing, reading, filling, running, scoring."""
    from quarkconv.evaluate import evaluation
    from quarkconv.evaluate.run import Run
    from quarkconv.evaluate.skeleton import Skeleton
    from quarkconv.evaluate.streams import LayerRunner
    from quarkconv.evaluate.weights import CheckpointWeights

    found: list[tuple[float, float, str]] = []
    began = time.perf_counter()

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter() - began
            try:
                return function(*arguments, **named)
            finally:
                found.append((start, time.perf_counter() - began, name))

        return run

    steps: tuple[tuple[Any, str, str], ...] = (
        (evaluation, "describe", "describe"), (Skeleton, "__init__", "make model"), (Run, "_embed", "embed"),
        (CheckpointWeights, "layer", "read"), (LayerRunner, "fill", "fill"),
        (LayerRunner, "fill_unquantized", "fill unquantized"), (Run, "_layer", "run"), (Run, "scores", "score"),
    )  # fmt: skip
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in steps]
    for owner, name, step in steps:
        setattr(owner, name, timed(step, getattr(owner, name)))
    try:
        yield found
    finally:
        for owner, name, function in before:
            setattr(owner, name, function)


class Timeline(Silent):
    """Notes when each step of an evaluation begins, and when each of its layers ends."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._steps: dict[str, list[float]] = {}
        self._last: list[float] = self._steps.setdefault("before", [self._began])

    def step(self, name: str, *_: object) -> None:
        now = time.perf_counter()
        self._last.append(now)
        self._last = self._steps.setdefault(name, [now])

    def advance(self, *_: object) -> None:
        self._last.append(time.perf_counter())

    def seconds(self) -> dict[str, Any]:
        """Seconds before the layers, of each, and from then to the end."""
        layers = self._steps["Running layers"]
        each = [after - before for before, after in pairwise(layers)][: len(layers) - 2]
        return {"before": layers[0] - self._began, "layers": each, "scores": time.perf_counter() - layers[-1]}


def measured(
    evaluate: Callable[..., Any], windows: int, device: str, folders: list[Path]
) -> tuple[dict[str, Any], Any]:
    """Evaluate once.

    Args:
        evaluate: takes a number of windows and ``progress``.
        windows: how many.
        device: whose memory is counted.
        folders: models to read once before, both times from the disk; empty to leave files in the page cache.

    Returns:
        Times and memory, and the evaluation.
    """
    run: dict[str, Any] = {}
    if folders:
        drop(folders)
        run["reading_once"] = read_once(folders)
        drop(folders)
    with peak_memories(run, device), spans() as steps:
        began, timeline = time.perf_counter(), Timeline()
        found = evaluate(windows, progress=timeline)
        run["seconds"] = time.perf_counter() - began
    run["timeline"] = timeline.seconds()
    run["spans"] = [[name, round(start, 3), round(end, 3)] for start, end, name in sorted(steps)]
    if folders:
        run["over_reading"] = run["seconds"] / run["reading_once"]["seconds"]
    return run, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3", choices=SHAPES)
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--rows", default="4x512,512x2048", help="windows x tokens of a window, each measured")
    parser.add_argument("--first", type=int, default=16, help="windows of the first run, at most")
    parser.add_argument("--profile", type=int, default=512, help="windows of a row whose kernels are summed, at most")
    parser.add_argument("--repeat", type=int, default=1, help="times that each row is measured; the median counts")
    parser.add_argument("--batch", type=int, help="windows that run together")
    parser.add_argument("--resume", action="store_true", help="keep hidden states on disk, as the command does")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--memory", type=float, help="GB of the device's memory that may be taken")
    parser.add_argument("--cached", action="store_true", help="leave files in the page cache: computing alone is timed")
    parser.add_argument("--models", type=Path, help="folder that keeps the models for another run")
    parser.add_argument("--make", action="store_true", help="make the models, and end")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    import transformers
    from kernel_time import kernel_time

    import quarkconv

    shape, devices = SHAPES[options.shape], options.device.split(",")
    folder = options.models or Path(tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    try:
        started = time.perf_counter()
        quantized, before = folder / "int8", folder / "bf16"
        if not before.is_dir():
            make_models(shape, options.layers, folder, devices[0])
            print(f"made in {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        if options.make:
            return
        if options.memory is not None:
            fraction = options.memory * 1e9 / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(fraction)
            torch.cuda.empty_cache()
        layer = {path.name: (path / "layer-0.safetensors").stat().st_size for path in (quantized, before)}
        about = {
            "benchmark": "evaluate", "shape": shape._asdict(), "layers": options.layers, "layer_bytes": layer,
            "memory": options.memory,
            "device": torch.cuda.get_device_name() if devices[0].startswith("cuda") else devices[0],
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }  # fmt: skip
        rows: list[dict[str, Any]] = []
        for windows, length in (tuple(map(int, row.split("x"))) for row in options.rows.split(",")):
            ids = folder / f"ids-{windows}x{length}.safetensors"
            save_file({"token_ids": torch.randint(0, shape.vocabulary, (windows, length))}, ids)

            figures: list[Any] = []
            few = min(windows, options.first)
            is_long = few < windows
            for device in devices if is_long else devices[:1]:
                row: dict[str, Any] = {"device": device, "windows": windows, "window": length,
                                       "tokens": windows * length}  # fmt: skip

                def evaluate(count: int, ids: Path = ids, device: str = device, progress: Progress = SILENT) -> Any:
                    return quarkconv.evaluate_checkpoint(
                        quantized, before, token_ids=ids, windows=count, batch=options.batch, device=device,
                        resume=options.resume, progress=progress,
                    )  # fmt: skip

                began = time.perf_counter()
                evaluate(few)
                row["first_seconds"] = time.perf_counter() - began
                if device == devices[0] and device.startswith("cuda") and is_long and windows <= options.profile:
                    began = time.perf_counter()
                    row["kernels"] = kernel_time(lambda: evaluate(windows), largest=40)  # noqa: B023
                    row["kernels"]["seconds"] = time.perf_counter() - began
                row["repetitions"] = []
                for _ in range(options.repeat):
                    run, found = measured(evaluate, windows, device, [] if options.cached else [quantized, before])
                    print(json.dumps(run), file=sys.stderr, flush=True)
                    row["repetitions"].append(run)
                row |= sorted(row["repetitions"], key=lambda run: run["seconds"])[options.repeat // 2]
                if "kernels" in row:
                    row["over_products"] = row["seconds"] / row["kernels"]["products"]
                row["kl"], row["own"] = found.int8.mean, [layer.own for layer in found.layers]
                figures.append(found.to_json() | {"device": None})
                row["same_figures"] = figures[-1] == figures[0]
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
                if options.out:
                    options.out.write_text(json.dumps(about | {"rows": rows}, indent=1) + "\n")
    finally:
        if options.models is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
