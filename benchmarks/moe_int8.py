"""The INT8 MoE forward on one GPU: ours, vLLM's, and torch's in bfloat16, beside the floors of the hardware.

    python benchmarks/moe_int8.py [--shapes NAMES] [--tokens 1,2,4,8,16,64,256,1024,4096,16384] [--out FILE.json]
                                  [--jobs N]

Shapes: four models, slices of large ones as tensor- and expert-parallel ranks have them, and sizes that no table lists.

Every implementation runs under a CUDA graph that cycles through up to eight inputs and routings, so that weights come
from memory and not from L2; a time is the median of the replays over its calls, after
replays for a twentieth of a second: right after weights were created, a token of Mixtral took 95 us on an H200 for some
20 ms of replays, and 84 from then on. Before ours is timed, its result is checked against the torch twin on a few
tokens, and against vLLM's where vLLM runs. vLLM, where it can be imported, runs twice: with the configuration that it
picks by itself ("default"), and with the best of a few ("tuned"): those that won somewhere in a sweep of vLLM 0.25.1
over the four shapes at this many tokens. Humming, where it can be imported, runs as in vLLM's backend (`humming_moe`).
With --jobs, so many processes compile everything before anything is timed.

Floors: the bytes of the touched weights, and of the input and output, at the read bandwidth measured in the same run;
the products' operations at the rate of a plain dense int8 product, likewise; and the traffic of this design, which adds
to the bytes what passes between its launches, each value once written and once read: codes of x, h, its codes, and y.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

from quarkconv.kernels import fused_experts_int8_reference
from quarkconv.kernels.activations import activate_reference, make_activation
from quarkconv.kernels.arguments import ExpertsArguments, ExpertWeights
from quarkconv.kernels.pipeline import default_options, run_pipeline, takes_sorted_rows
from quarkconv.kernels.tables import GemvOptions, Options, Shape, find_options, table_path
from quarkconv.kernels.tune import EXPERTS_IN_ALL, NAMED, SHAPES, Weights, make_call, make_weights, time_calls

TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096, 16384)
BIASED = {"gpt-oss-120b": {"activation": "swigluoai"}}
"""Shapes with biases and another activation. Humming and torch are not timed on these, nor on expert-parallel ranks."""
WARM_UP = 0.05  # seconds
MOST_DIFFERENCE = 0.03
"""Between ours and another implementation of W8A8, relative: what quantizing the activations costs by itself (0.019 to
0.030 in the results). Both round to other codes where their 16-bit values differ, and Humming's scales are bfloat16."""
time_graph = functools.partial(time_calls, warm_up=WARM_UP)
# Neither the shapes nor these numbers of tokens are in the table of launch options, except through what it says of
# neighbouring numbers for the last one.
OTHERS: list[tuple[str, Shape, tuple[int, ...]]] = [
    ("DeepSeek-V3", (256, 8, 7168, 2048), (1, 33, 1000)),
    ("Qwen1.5-MoE", (60, 4, 2048, 1408), (3, 200, 2000)),
    ("Qwen3-30B-A3B", SHAPES["Qwen3-30B-A3B"], (3, 33, 200, 1000, 2000)),
]
# BLOCK_SIZE_M, _N, _K, GROUP_SIZE_M, num_warps, num_stages
VLLM_CONFIGS = {
    64: [(16, 64, 128, 1, 4, 3), (16, 64, 128, 1, 4, 5), *((16, 64, 256, 1, 4, stages) for stages in (3, 4, 5))],
    512: [(32, 128, 128, 1, 4, 4), (64, 128, 128, 1, 4, 4), (16, 64, 128, 1, 4, 4)],
    4096: [(64, 128, 128, 16, 4, 4), (64, 128, 128, 16, 4, 3), (64, 256, 128, 1, 8, 4), (128, 128, 128, 16, 8, 4)],
}


@triton.jit
def _read_kernel(source, result, size, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int32)
    for step in range(STEPS):
        offsets = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(source + offsets, mask=offsets < size, other=0)
    tl.atomic_add(result, tl.sum(total))


@triton.jit
def _dense_kernel(a, b, c, N, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    across = N // BLOCK
    group = tl.program_id(0) // (GROUP * across)
    row = group * GROUP + tl.program_id(0) % GROUP
    col = (tl.program_id(0) % (GROUP * across)) // GROUP
    rows, cols, depth = row * BLOCK + tl.arange(0, BLOCK), col * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    a_ptrs, b_ptrs = a + rows[:, None] * N + depth[None, :], b + cols[None, :] * N + depth[:, None]
    sums = tl.zeros([BLOCK, BLOCK], tl.int32)
    for _ in range(0, N, BLOCK):
        sums = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), acc=sums, out_dtype=tl.int32)
        a_ptrs += BLOCK
        b_ptrs += BLOCK
    tl.store(c + rows[:, None] * N + cols[None, :], (sums.to(tl.float32) * 1e-4).to(tl.bfloat16))


def measure_ceilings() -> dict[str, float]:
    """Bytes read and int8 operations a second, replayed as long as the forwards: at the power limit both are lower."""
    source = torch.randint(-(2**31), 2**31 - 1, (1 << 30,), dtype=torch.int32, device="cuda")
    result = torch.zeros(1, dtype=torch.int32, device="cuda")

    def read(block: int, steps: int) -> None:
        grid = (triton.cdiv(source.numel(), block * steps),)
        _read_kernel[grid](source, result, source.numel(), BLOCK=block, STEPS=steps, num_warps=4 if block < 4096 else 8)

    sizes = ((1024, 8), (2048, 8), (2048, 4), (4096, 4))
    reads = [time_graph([lambda block=block, steps=steps: read(block, steps)]) for block, steps in sizes]
    n = 8192
    a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device="cuda") for _ in range(2))
    c = torch.empty((n, n), dtype=torch.bfloat16, device="cuda")
    dense = time_graph([lambda: _dense_kernel[((n // 128) ** 2,)](a, b, c, n, BLOCK=128, GROUP=8, num_warps=4)])
    return {"read_bytes_per_s": 4 * (1 << 30) / min(reads) * 1e6, "int8_ops_per_s": 2 * n**3 / dense * 1e6}


def product(weights: ExpertWeights, expert: int, x: torch.Tensor) -> torch.Tensor:
    """One expert's product in float64."""
    y = (weights.codes[expert].double() * weights.scale[expert]) @ x
    return y if weights.bias is None else y + weights.bias[expert]


def check(arguments: ExpertsArguments, out: torch.Tensor) -> float:
    """Relative error of three tokens against float64 experts with activations that are not quantized.

    Before, the same tokens are compared with the torch twin: the same codes, scales and roundings. What differs are
    elements whose float32 value falls on the other side of a rounding to bfloat16, each by one step, 2^-8 of a value;
    leaving out a rounding costs 2^-9 of the whole.
    """
    tokens = sorted({0, arguments.tokens // 2, arguments.tokens - 1})
    up, down = arguments.gate_up, arguments.down
    x, weights, ids = (t[tokens] for t in (arguments.hidden_states, arguments.topk_weights, arguments.topk_ids))
    activation = arguments.activation
    more = {"w13_bias": up.bias, "w2_bias": down.bias, "activation": activation.name}
    twin = fused_experts_int8_reference(x, up.codes, down.codes, up.scale, down.scale, weights, ids, **more).double()
    difference, whole = (part.norm().item() for part in (out[tokens].double() - twin, twin))
    if not difference <= whole * 2.0**-9:  # both are 0 where other ranks have all experts of these tokens
        raise SystemExit(f"wrong result: {difference:.2g} from the torch twin, whose norm is {whole:.2g}")
    error = norm = 0.0
    for token in tokens:
        wide = arguments.hidden_states[token].double()
        expected = torch.zeros_like(wide)
        pairs = zip(arguments.topk_ids[token].tolist(), arguments.topk_weights[token].tolist(), strict=True)
        for expert, weight in pairs:
            if expert < 0:
                continue
            hidden = activate_reference(*product(up, expert, wide).chunk(2), activation)
            expected += weight * product(down, expert, hidden)
        error += (out[token].double() - expected).norm().item() ** 2
        norm += expected.norm().item() ** 2
    return math.sqrt(error / norm) if norm else 0.0


def time_ours(calls: list[ExpertsArguments], repeats: int) -> tuple[float, float]:
    """(microseconds, relative error)."""
    outs = [torch.full_like(call.hidden_states, math.nan) for call in calls]

    def run(call: ExpertsArguments, out: torch.Tensor) -> Callable[[], object]:
        return lambda: run_pipeline(call, out)

    runs = [run(call, out) for call, out in zip(calls, outs, strict=True)]
    runs[0]()
    error = check(calls[0], outs[0])
    return time_graph(runs, repeats), error


def time_torch(calls: list[ExpertsArguments], weights: tuple[torch.Tensor, torch.Tensor], repeats: int) -> float:
    """bfloat16 experts through torch's grouped product; the sorting by expert is part of it."""
    w13, w2 = weights
    experts = w13.shape[0]

    def run(call: ExpertsArguments) -> torch.Tensor:
        ids = call.topk_ids.flatten()
        order = ids.argsort(stable=True)
        ends = torch.zeros(experts, dtype=torch.int32, device=ids.device)
        ends = ends.scatter_add_(0, ids.long(), torch.ones_like(ids)).cumsum(0, dtype=torch.int32)
        rows = call.hidden_states[order // call.top_k]
        gate, up = torch._grouped_mm(rows, w13.transpose(1, 2), offs=ends).chunk(2, -1)
        y = torch._grouped_mm(torch.nn.functional.silu(gate) * up, w2.transpose(1, 2), offs=ends)
        y = y * call.topk_weights.flatten()[order].unsqueeze(-1).to(y.dtype)
        return torch.zeros_like(call.hidden_states).index_add_(0, order // call.top_k, y)

    return time_graph([lambda call=call: run(call) for call in calls], max(repeats // 2, 1))


def load_vllm() -> Any:
    """(fused_experts, override_config, quantization config) of vLLM, its version, or None."""
    try:
        import vllm
        from vllm.model_executor.layers.fused_moe import fused_experts, override_config
        from vllm.model_executor.layers.fused_moe.config import int8_w8a8_moe_quant_config
    except ImportError as error:
        print(f"vLLM cannot be imported: {error}", file=sys.stderr)
        return None
    return fused_experts, override_config, int8_w8a8_moe_quant_config, vllm.__version__


def vllm_runs(vllm: Any, calls: list[ExpertsArguments]) -> list[Callable[[], torch.Tensor]]:
    """vLLM's forward of each call; its swigluoai takes rows of gate and up in turn."""
    fused_experts, _, make_config, *_ = vllm
    gate_up, down = calls[0].gate_up, calls[0].down
    more: dict[str, Any] = {}
    if calls[0].activation.name == "swigluoai":
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation

        more["activation"], gate_up = MoEActivation.SWIGLUOAI, interleaved(gate_up)
    in_all = EXPERTS_IN_ALL.get((down.codes.shape[0], calls[0].top_k, calls[0].hidden, calls[0].intermediate))
    if in_all is not None:
        numbers = torch.arange(in_all, dtype=torch.int32, device=down.codes.device)
        more |= {"global_num_experts": in_all, "expert_map": numbers.where(numbers < down.codes.shape[0], -1)}
    config = make_config(
        w1_scale=gate_up.scale, w2_scale=down.scale, a1_scale=None, a2_scale=None, per_act_token_quant=True,
        w1_bias=gate_up.bias, w2_bias=down.bias,
    )  # fmt: skip

    def run(call: ExpertsArguments) -> Callable[[], torch.Tensor]:
        ids = call.topk_ids.where(call.topk_ids >= 0, down.codes.shape[0])  # any expert of another rank
        arguments = (call.hidden_states, gate_up.codes, down.codes, call.topk_weights, ids)
        return lambda: fused_experts(*arguments, quant_config=config, **more)

    return [run(call) for call in calls]


def interleaved(part: ExpertWeights) -> ExpertWeights:
    """The same experts with a row of gate and one of up in turn."""

    def mixed(rows: torch.Tensor) -> torch.Tensor:
        return torch.stack(rows.chunk(2, 1), 2).flatten(1, 2).contiguous()

    bias = None if part.bias is None else mixed(part.bias)
    return dataclasses.replace(part, codes=mixed(part.codes), scale=mixed(part.scale), bias=bias)


def vllm_tiles(tokens: int) -> Iterator[tuple[str, dict[str, int]]]:
    """Names and tiles of the few that are timed at a number of tokens."""
    listed = min(VLLM_CONFIGS, key=lambda size: max(size / tokens, tokens / size) if tokens > 64 else size)
    for block_m, block_n, block_k, group, warps, stages in VLLM_CONFIGS[listed]:
        tiles = {"BLOCK_SIZE_M": block_m, "BLOCK_SIZE_N": block_n, "BLOCK_SIZE_K": block_k, "GROUP_SIZE_M": group}
        name = f"{block_m}x{block_n}x{block_k} group {group} warps {warps} stages {stages}"
        yield name, tiles | {"SPLIT_K": 1, "num_warps": warps, "num_stages": stages}


def relative_difference(found: torch.Tensor, ours: torch.Tensor) -> float:
    """||found - ours|| / ||ours||; 0 where both are 0, as on a rank that has no expert of any token."""
    difference, norm = (part.norm().item() for part in (found.double() - ours.double(), ours.double()))
    return difference / norm if norm else difference


def time_vllm(vllm: Any, calls: list[ExpertsArguments], tokens: int, repeats: int) -> dict[str, Any]:
    override_config, runs = vllm[1], vllm_runs(vllm, calls)
    ours = run_pipeline(calls[0], torch.empty_like(calls[0].hidden_states))
    difference = relative_difference(runs[0](), ours)
    if not difference < MOST_DIFFERENCE:
        print(f"vLLM and ours differ by {difference:.4f}: not timed", file=sys.stderr)
        return {"vllm_difference": difference}
    default = time_graph(runs, repeats)
    best, which = default, "default"
    for name, tiles in vllm_tiles(tokens):
        with override_config(tiles):
            taken = time_graph(runs, repeats)
        if taken < best:
            best, which = taken, name
    return {"vllm_default_us": default, "vllm_tuned_us": best, "vllm_tuned": which, "vllm_difference": difference}


def load_humming() -> Any:
    """The module `humming_moe`, or None."""
    try:
        import humming_moe
    except ImportError as error:
        print(f"Humming cannot be imported: {error}", file=sys.stderr)
        return None
    return humming_moe


def time_humming(humming: Any, repacked: Any, calls: list[ExpertsArguments], repeats: int) -> dict[str, Any]:
    locks = humming.make_locks(calls[0].hidden_states.device)
    runs = [humming.make_run(call, *repacked, locks) for call in calls]
    ours = run_pipeline(calls[0], torch.empty_like(calls[0].hidden_states))
    difference = relative_difference(runs[0](), ours)
    if not difference < MOST_DIFFERENCE:
        print(f"Humming and ours differ by {difference:.4f}: not timed", file=sys.stderr)
        return {"humming_difference": difference}
    return {"humming_us": time_graph(runs, repeats), "humming_difference": difference}


def compile_all(name: str, shape: Shape, counts: tuple[int, ...]) -> None:
    """Run each implementation once for each number of tokens, so that the caches on disk hold what it compiles."""
    torch.manual_seed(0)
    vllm, humming = load_vllm(), load_humming()
    weights = make_weights(shape, torch.device("cuda"))
    repacked = repack(humming, name, shape, weights)
    for count in counts:
        call = make_inputs(name, shape, weights, count)[0]
        run_pipeline(call, torch.empty_like(call.hidden_states))
        if vllm is not None:
            [run] = vllm_runs(vllm, [call])
            run()
            for _, tiles in vllm_tiles(count):
                with vllm[1](tiles):
                    run()
        if repacked is not None:
            humming.make_run(call, *repacked[1], humming.make_locks(call.hidden_states.device))()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # other processes compile on the same GPU


def compile_first(work: list[tuple[str, Shape, tuple[int, ...]]], jobs: int) -> None:
    """Compile each shape for its numbers of tokens, in so many processes; what fails here compiles when it is timed."""
    began = time.monotonic()
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for (name, *_), future in [(item, pool.submit(compile_all, *item)) for item in work]:
            if (error := future.exception()) is not None:
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)


def make_inputs(name: str, shape: Shape, weights: Weights, tokens: int) -> list[ExpertsArguments]:
    """Up to eight inputs and routings."""
    calls = [make_call(shape, weights, tokens) for _ in range(max(1, min(8, 4096 // tokens)))]
    return [with_biases(call, **BIASED[name]) for call in calls] if name in BIASED else calls


def repack(humming: Any, name: str, shape: Shape, weights: Weights) -> Any:
    """(the module `humming_moe`, both projections in its layout), or None where it is not timed."""
    if humming is None or name in BIASED or shape in EXPERTS_IN_ALL:
        return None
    call = make_call(shape, weights, 1)
    return humming, (humming.repack(call.gate_up, 2), humming.repack(call.down, 1))


def traffic(arguments: ExpertsArguments, pairs: float, touched_bytes: float) -> float:
    """Bytes of one forward as the design stores its intermediate values, each written once and read once."""
    options, hidden, intermediate = default_options(arguments), arguments.hidden, arguments.intermediate
    sorted_copies = takes_sorted_rows(arguments, options)
    codes = hidden * (pairs if sorted_copies else arguments.tokens)
    h = pairs * intermediate * 3  # 16-bit values and their codes
    y = 0 if isinstance(options, GemvOptions) else pairs * hidden * 2
    return touched_bytes + 4 * arguments.tokens * hidden + 2 * (codes + h + y)


def measure(
    name: str,
    shape: Shape,
    weights: Weights,
    tokens: int,
    ceilings: dict[str, float],
    vllm: Any,
    humming: Any,
    bf16: Any,
    repeats: int,
) -> dict[str, Any]:
    """One row."""
    experts, top_k, hidden, intermediate = shape
    calls = make_inputs(name, shape, weights, tokens)
    chosen = [call.topk_ids[call.topk_ids >= 0] for call in calls]
    touched = statistics.mean(ids.unique().numel() for ids in chosen)
    pairs = statistics.mean(ids.numel() for ids in chosen)
    size = 3 * hidden * intermediate
    ours, error = time_ours(calls, repeats)
    row = {
        "shape": name,
        "experts": experts,
        "top_k": top_k,
        "hidden": hidden,
        "intermediate": intermediate,
        "tokens": tokens,
        "ours_us": ours,
        "error": error,
        "bytes_floor_us": (touched * size + 4 * tokens * hidden) / ceilings["read_bytes_per_s"] * 1e6,
        "operations_floor_us": 2 * pairs * size / ceilings["int8_ops_per_s"] * 1e6,
        "traffic_floor_us": traffic(calls[0], pairs, touched * size) / ceilings["read_bytes_per_s"] * 1e6,
        "touched_experts": touched,
        "from_table": find_options(torch.cuda.get_device_name(), tokens, experts, top_k, hidden, intermediate)
        is not None,
        "options": summary(default_options(calls[0])),
    }
    if vllm is not None:
        row |= time_vllm(vllm, calls, tokens, repeats)
    if humming is not None:
        row |= time_humming(*humming, calls, repeats)
    if bf16 is not None:
        row["torch_bf16_us"] = time_torch(calls, bf16, repeats)
    return row


def with_biases(call: ExpertsArguments, activation: str) -> ExpertsArguments:
    """The same call with random biases and another activation."""

    def biased(part: ExpertWeights) -> ExpertWeights:
        return dataclasses.replace(part, bias=torch.randn(part.codes.shape[:2], device=part.codes.device) / 8)

    function = make_activation(activation)
    return dataclasses.replace(call, gate_up=biased(call.gate_up), down=biased(call.down), activation=function)


def summary(options: Options) -> str:
    """Launch options in short: rows of a block + of a tail / of a short block; columns x depth, the rest of a tile."""
    if isinstance(options, GemvOptions):
        tiles = [f"{tile.block_n} columns, {tile.num_warps} warps" for tile in (options.gate_up, options.down)]
        return f"without sorting; gate-up {tiles[0]}; down {tiles[1]}"
    blocks = f"{options.blocks.block_m} + {options.blocks.tail_m} / {options.blocks.small_m} rows"
    tiles = [
        f"{tile.block_n} x {tile.block_k}, group {tile.group_m}, {tile.num_warps} warps, {tile.num_stages} stages"
        + (", specialized" if tile.specialized else "") + ("" if tile.descriptors else ", pointers")
        for tile in (options.gate_up, options.down)
    ]  # fmt: skip
    return f"{blocks}; gate-up {tiles[0]}; down {tiles[1]}"


def dump(document: dict[str, Any]) -> str:
    """The JSON of what was measured, a line a row; six digits of each number."""
    rounded = (
        {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
        for row in document["rows"]
    )
    rows = ",\n".join(json.dumps(row) for row in rounded)
    return json.dumps(document | {"rows": []}, indent=1).replace('"rows": []', f'"rows": [\n{rows}]') + "\n"


def describe(row: dict[str, Any]) -> str:
    def number(key: str) -> str:
        return f"{row[key]:9.1f}" if key in row else "        -"

    floor = max(row["bytes_floor_us"], row["operations_floor_us"])
    ratios = [
        f"{row[key] / row['ours_us']:5.2f}" if key in row else "    -"
        for key in ("vllm_default_us", "vllm_tuned_us", "humming_us")
    ]
    return (
        f"{row['shape']:15} {row['tokens']:5} {number('ours_us')} "
        f"{number('vllm_default_us')} {number('vllm_tuned_us')} "
        f"{number('humming_us')} {number('torch_bf16_us')} {number('bytes_floor_us')} {number('operations_floor_us')} "
        f"{number('traffic_floor_us')} "
        f"{' '.join(ratios)} {row['ours_us'] / floor:5.2f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(NAMED))
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--others", action=argparse.BooleanOptionalAction, default=True, help="sizes not in the table")
    parser.add_argument("--repeats", type=int, default=20, help="replays of each graph, of which the median counts")
    parser.add_argument("--budget", type=float, default=240, help="seconds after which only ours is timed")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile everything first")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/moe-int8-<device>.json")
    parser.add_argument("--commit", default=None, help="what to record; default: git's HEAD")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("moe_int8: needs a GPU, and torch finds none", file=sys.stderr)
        return 4
    tokens = tuple(int(text) for text in options.tokens.split(","))
    work = [(name, NAMED[name], tokens) for name in options.shapes.split(",")] + (OTHERS if options.others else [])
    if options.jobs:
        compile_first(work, options.jobs)
    began = time.monotonic()
    device = torch.cuda.get_device_name()
    path = options.out or Path(__file__).parent / "results" / f"moe-int8-{table_path(device).name}"
    torch.manual_seed(0)
    vllm, humming = load_vllm(), load_humming()
    ceilings = measure_ceilings()
    commit = options.commit
    if commit is None:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip()
    document: dict[str, Any] = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "commit": commit,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": None if vllm is None else vllm[3],
        "command": " ".join(["python benchmarks/moe_int8.py", *sys.argv[1:]]),
        "ceilings": ceilings,
        "rows": [],
    }
    print(f"{document['device']}, torch {torch.__version__}, triton {triton.__version__}, vLLM {document['vllm']}")
    print(f"reads {ceilings['read_bytes_per_s'] / 1e12:.2f} TB/s, int8 {ceilings['int8_ops_per_s'] / 1e12:.0f} TOP/s")
    columns = ("ours", "default", "tuned", "humming", "torch", "bytes", "products", "traffic")
    print(
        f"{'microseconds':15} {'M':>5} " + " ".join(f"{name:>9}" for name in columns) + "  vs d  vs t  vs h over floor"
    )
    for name, shape, counts in work:
        weights = make_weights(shape, torch.device("cuda"))
        group = "other" if counts != tokens else "model" if name in SHAPES else "slice"
        wide, repacked = None, repack(humming, name, shape, weights)
        if group == "model" and time.monotonic() - began < options.budget:
            wide = weights[0].bfloat16(), weights[1].bfloat16()
        for count in counts:
            late = time.monotonic() - began > options.budget
            beside = (None, None, None) if late else (vllm, repacked, wide)
            row = measure(name, shape, weights, count, ceilings, *beside, options.repeats)
            document["rows"].append(row | {"group": group})
            print(describe(row), flush=True)
            path.write_text(dump(document), encoding="utf-8")
        del weights, wide, repacked
        torch.cuda.empty_cache()
    for group in ("model", "slice", "other"):
        rows = [row for row in document["rows"] if row["group"] == group]
        if not rows:
            continue
        over = [row["ours_us"] / max(row["bytes_floor_us"], row["operations_floor_us"]) for row in rows]
        print(f"{group}: {len(rows)} cells, {statistics.geometric_mean(over):.3f} times the larger floor")
        for key in ("vllm_default_us", "vllm_tuned_us", "humming_us"):
            ratios = [row[key] / row["ours_us"] for row in rows if key in row]
            if ratios:
                mean = statistics.geometric_mean(ratios)
                print(f"  {mean:.3f} times as fast as {key[:-3]} over {len(ratios)}, worst {min(ratios):.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
