"""Compile every kernel for GPU targets, without a GPU: python compile_ahead.py TARGET... TARGET/PART+PART...

TARGET compiles one variant of each kernel at least. Its parts are `few`, one variant of each kernel, and `prefill`, the
large tiles; `rich` are the other variants.

A program of its own: it needs Triton without TRITON_INTERPRET, which the test process may have set. It prints a line a
compilation: registers, spilled bytes (NVIDIA) or registers (AMD), shared memory. It fails if a kernel does not compile,
takes more shared memory than the target has, spills, lacks its matrix instruction, or is not listed.
"""

import importlib
import pkgutil
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from targets import TARGETS, Target
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.experimental.gluon.language import NVMMASharedLayout

import quarkconv.kernels.jit
from quarkconv.kernels.activations import ACTIVATIONS, make_activation
from quarkconv.kernels.backend import DeviceTraits
from quarkconv.kernels.launch.grouped_gemm import tile_constants
from quarkconv.kernels.launch.grouped_gemv import chunks_of
from quarkconv.kernels.launch.quantize import MIN_SCALE, row_constants
from quarkconv.kernels.launch.specialized import specialized_constants
from quarkconv.kernels.options import choose_combine_options, choose_launch_options
from quarkconv.kernels.tables import HALF, GemvOptions, LaunchOptions, RowBlocks, TileOptions, VectorTile

SIZES = ("D", "D4", "N", "H", "row_stride")


def all_kernels(traits: DeviceTraits) -> dict[str, Any]:
    """Every kernel of the package for such a device: the jitted functions called *_kernel."""
    found = {}
    for module_info in pkgutil.iter_modules(quarkconv.kernels.jit.__path__, "quarkconv.kernels.jit."):
        if traits.warp_specialization or ".specialized" not in module_info.name:
            module = importlib.import_module(module_info.name)
            found.update({name: value for name, value in vars(module).items() if name.endswith("_kernel")})
    return found


def product_constants(blocks: RowBlocks, *, per_channel: bool) -> dict[str, Any]:
    """The constants that both kernels of a product share; see `GroupedProduct.constants`."""
    cut = {"BLOCK_M": blocks.block_m, "TAIL_M": blocks.tail_m, "SMALL_M": blocks.small_m}
    return cut | {"PER_CHANNEL": per_channel, "RAW_SUMS": False}


def portable_constants(tile: TileOptions, options: LaunchOptions, *, even: bool, per_channel: bool) -> dict[str, Any]:
    depth = tile.block_k if even else tile.block_k + 16
    shared = product_constants(options.blocks, per_channel=per_channel)
    return shared | tile_constants(tile, depth) | {"INTERPRETED": False}


def descriptor(tile: TileOptions, rows: int) -> dict[str, str]:
    """The type of a tensor descriptor for tiles of `rows` rows, or none."""
    return {"weight_desc": f"tensordesc<i8[{rows}, {tile.block_k}]>"} if tile.descriptors else {}


def gemv_constants(depth: int, tile: VectorTile, *, per_channel: bool) -> dict[str, Any]:
    block, chunks = chunks_of(depth)
    return {
        "PER_CHANNEL": per_channel,
        "INTERPRETED": False,
        "EVEN_D": depth % (4 * block) == 0,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block,
        "CHUNKS": chunks,
        "num_warps": tile.num_warps,
    }


Variants = list[tuple[str, dict[str, str], dict[str, Any]]]
"""(kernel, pointer and float types, constants); every other argument is an int32. An optional argument without a type
is None. `rich` variants have every optional argument, masks and float16, the others those of the common case."""

PLAN = dict.fromkeys(
    ("pairs_ptr", "rows_ptr", "block_expert_ptr", "block_first_ptr", "block_rows_ptr", "totals_ptr"), "*i32"
)
PRODUCT = {"codes_ptr": "*i8", "row_scale_ptr": "*fp32", "weight_ptr": "*i8", "weight_scale_ptr": "*fp32"}
LIMITS = {"limit": "fp32", "alpha": "fp32"}


def float_and_ids(rich: bool) -> tuple[str, str]:
    return ("*fp16", "*i64") if rich else ("*bf16", "*i32")


def activations(rich: bool) -> list[dict[str, Any]]:
    """Constants of every activation. They differ in the epilogue alone: all but one of them in the smaller variant."""
    silu = make_activation("silu")
    needs_alpha = ("situ",)
    others = [make_activation(name, alpha=4.0 if name in needs_alpha else None) for name in ACTIVATIONS]
    others += [make_activation("silu", limit=7.0), make_activation("situ", limit=7.0, alpha=4.0)]
    chosen = [each for each in others if each != silu] if rich else [silu]
    return [{"ACTIVATION": each.variant, "GATED": each.gated, "SORTED": True} for each in chosen]


DOWN = {"ACTIVATION": "", "GATED": False, "SORTED": False}


def gemv_variants(options: GemvOptions, hidden: int, intermediate: int, *, rich: bool) -> Variants:
    dtype, ids = float_and_ids(rich)
    types = PRODUCT | {"codes_ptr": "*i32", "weight_ptr": "*i32", "out_ptr": dtype, "topk_ids_ptr": ids} | LIMITS
    types |= {"bias_ptr": "*fp32", "router_weight_ptr": "*fp32"} if rich else {}
    gate_up = gemv_constants(hidden, options.gate_up, per_channel=not rich) | {"PAIRS_PER_ROW": 8}
    found: Variants = [
        (
            "grouped_gate_up_gemv_kernel",
            types,
            gate_up | {name: value for name, value in each.items() if name != "SORTED"},
        )
        for each in activations(rich)
    ]
    down = gemv_constants(intermediate, options.down, per_channel=not rich) | {"TOP_K": 8, "SLOTS": 8}
    return [*found, ("combined_down_gemv_kernel", types, down)]


def product_variants(options: LaunchOptions, *, rich: bool) -> Variants:
    tiles = (options.gate_up.without_specialization(), options.down.without_specialization())
    options = LaunchOptions(options.blocks, *tiles)
    types = PRODUCT | PLAN | LIMITS | {"out_ptr": float_and_ids(rich)[0]} | ({"bias_ptr": "*fp32"} if rich else {})
    kind = {"even": not rich, "per_channel": not rich}
    down_types = types | descriptor(options.down, options.down.block_n)
    if options.down.descriptors:
        down_types["codes_desc"] = f"tensordesc<i8[{options.blocks.block_m}, {options.down.block_k}]>"
    gate_up_types = types | descriptor(options.gate_up, options.gate_up.block_n)
    gate_up_types |= {"router_weight_ptr": "*fp32"} if rich else {}
    gate_up = portable_constants(options.gate_up, options, **kind) | {"PAIRS_PER_ROW": 8}
    down = portable_constants(options.down, options, **kind) | {"PAIRS_PER_ROW": 1} | DOWN
    found: Variants = [("grouped_product_kernel", gate_up_types, gate_up | each) for each in activations(rich)]
    return [*found, ("grouped_product_kernel", down_types, down)]


def specialized_descriptor(rows: int, block_k: int) -> str:
    layout = NVMMASharedLayout(swizzle_byte_width=block_k, element_bitwidth=8, rank=2)
    return f"tensordesc<i8[{rows},{block_k}],{layout!r}>"


def specialized_variants(options: LaunchOptions, parts: int, *, rich: bool) -> Variants:
    """Both products with the row blocks of these options, warp-specialized: ping-pong (1 part) or cooperative (2)."""
    blocks, tile = options.blocks, TileOptions(128, 128, 8, num_warps=4 * parts, num_stages=4, specialized=True)
    types = PRODUCT | PLAN | LIMITS | {"out_ptr": float_and_ids(rich)[0]} | ({"bias_ptr": "*fp32"} if rich else {})
    types |= {
        "codes_desc": specialized_descriptor(blocks.block_m, tile.block_k),
        "weight_desc": specialized_descriptor(HALF * parts, tile.block_k),
    }
    if blocks.tail_m:
        types["tail_desc"] = specialized_descriptor(blocks.tail_m, tile.block_k)
    shared = product_constants(blocks, per_channel=not rich)
    constants = shared | specialized_constants(tile, blocks, tile.num_stages)
    gate_up_types = types | ({"router_weight_ptr": "*fp32"} if rich else {})
    found: Variants = [("specialized_product_kernel", gate_up_types, constants | each) for each in activations(rich)]
    return [*found, ("specialized_product_kernel", types, constants | DOWN)]


def row_variants(*, rich: bool) -> Variants:
    """Quantization of rows and sum over experts."""
    dtype, ids = float_and_ids(rich)
    combine = choose_combine_options(3072)
    optional = {"topk_ids_ptr": ids, "expert_scale_ptr": "*fp32", "router_weight_ptr": "*fp32"}
    quantized = {"x_ptr": dtype, "codes_ptr": "*i8", "scale_ptr": "*fp32"}
    return [
        (
            "quantize_rows_kernel",
            quantized | {"topk_ids_ptr": ids, "rows_ptr": "*i32"},
            row_constants(4096, 3072) | {"PAIRS_PER_ROW": 1, "COPIES": 8, "TRIGGER_FIRST": False},
        ),
        (
            "quantize_rows_kernel",
            quantized | (optional if rich else {"pairs_ptr": "*i32", "totals_ptr": "*i32"}),
            row_constants(4096, 100_000 if rich else 3072)
            | {"PAIRS_PER_ROW": 8 if rich else 1, "COPIES": 0, "TRIGGER_FIRST": not rich},
        ),
        (
            "combine_kernel",
            {"expert_out_ptr": dtype, "topk_ids_ptr": ids, "out_ptr": dtype}
            | ({"topk_weights_ptr": "*fp32"} if rich else {}),
            {"TOP_K": 8, "INTERPRETED": False, "BLOCK_H": combine.block, "num_warps": combine.num_warps},
        ),
    ]


def other_variants(blocks: RowBlocks) -> Variants:
    """Routing, quantization of few rows, and of tensors."""
    dtype, ids = float_and_ids(True)
    runs = {"topk_ids_ptr": ids, "counts_ptr": "*i32"}
    cut = {"BLOCK_M": blocks.block_m, "TAIL_M": blocks.tail_m, "BLOCK_E": 512}
    quantized = {"x_ptr": dtype, "codes_ptr": "*i8", "scale_ptr": "*fp32"}
    return [
        ("route_at_once_kernel", {"topk_ids_ptr": ids} | PLAN, cut | {"BLOCK_P": 1024, "num_warps": 4}),
        (
            "quantize_and_route_kernel",
            {"topk_ids_ptr": ids} | PLAN | quantized,
            cut | {"BLOCK_P": 1024} | row_constants(64, 3072),
        ),
        ("count_run_kernel", runs, {"BLOCK_E": 512, "BLOCK_P": 512, "num_warps": 4}),
        ("place_runs_kernel", runs | PLAN, cut | {"BLOCK_C": 16, "BLOCK_P": 512, "num_warps": 8}),
        ("absmax_kernel", {"x_ptr": dtype, "partial_ptr": "*fp32"}, {"BLOCK": 4096}),
        (
            "tensor_scale_kernel",
            {"partial_ptr": "*fp32", "scale_ptr": "*fp32"},
            {"MIN_SCALE": MIN_SCALE, "BLOCK": 1024},
        ),
        ("quantize_flat_kernel", quantized, {"BLOCK": 4096}),
    ]


USUAL = ("few", "prefill")


def variants_for(traits: DeviceTraits, parts: tuple[str, ...] = USUAL) -> list[tuple[bool, Variants]]:
    """(rich, variants) of these parts: `few` has each kernel once."""
    gemv = choose_launch_options(1, 64, 8, 3072, 1536, traits)
    assert isinstance(gemv, GemvOptions)
    few = [(False, gemv_variants(gemv, 3072, 1536, rich=False) + row_variants(rich=False))]
    if not traits.int8_matrix:
        return [*few, (True, other_variants(RowBlocks(16)))]
    decode = choose_launch_options(8, 64, 8, 3072, 1536, traits)
    prefill = choose_launch_options(4096, 64, 8, 2048, 1408, traits)
    assert isinstance(decode, LaunchOptions)
    assert isinstance(prefill, LaunchOptions)
    few += [(False, product_variants(decode, rich=False)), (True, other_variants(decode.blocks))]
    rich = [
        (True, product_variants(decode, rich=True) + row_variants(rich=True)),
        (True, gemv_variants(gemv, 2056, 1416, rich=True)),
    ]
    if traits.warp_specialization:
        few.append((False, specialized_variants(prefill, 1, rich=False)))
        rich.append((True, specialized_variants(decode, 1, rich=True)))
        rich.append((True, specialized_variants(prefill, 2, rich=True)[-3:]))
    divided = {"few": few, "prefill": [(False, product_variants(prefill, rich=False))], "rich": rich}
    return [variants for part in parts for variants in divided[part]]


def complete(kernel: Any, types: dict[str, str], constants: dict[str, Any], traits: DeviceTraits) -> dict[str, Any]:
    """The constants of a launch on the target: arguments without a type are None, and launches may overlap."""
    missing = {n: None for n in kernel.arg_names if n.endswith(("_ptr", "_desc")) and n not in types}
    of_device = {"DEPENDENT": traits.dependent_launch, "DOT4": traits.dot4}
    return constants | missing | {name: value for name, value in of_device.items() if name in kernel.arg_names}


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], target: GPUTarget, *, even_sizes: bool
) -> Any:
    """Compile as a launch would, with pointers and, for `even_sizes`, sizes that are known to be multiples of 16."""
    launch = {name: constants[name] for name in ("num_warps", "num_stages", "maxnreg") if name in constants}
    constexprs = {name: value for name, value in constants.items() if name not in launch}
    signature = {name: "constexpr" if name in constexprs else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (even_sizes and name in SIZES)
    }
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, constexprs, aligned)
    return triton.compile(source, target=target, options=launch)


@dataclass(frozen=True)
class Resources:
    """What one compilation takes: registers of a thread, spills, bytes of shared memory, matrix instructions."""

    kernel: str
    variant: str
    warps: int
    registers: int
    spills: int
    shared: int
    matrix: tuple[str, ...]


def resources(kernel: str, variant: str, binary: Any) -> Resources:
    """Read from the binary (NVIDIA: stack, as cuobjdump reports it) or the assembly (AMD: spilled registers)."""
    if "cubin" in binary.asm:
        text, pattern = binary.asm["ptx"], r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)\S*"
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
        registers, spills = (int(number) for number in re.findall(r"REG:(\d+) STACK:(\d+)", report)[-1])
    else:
        text, pattern = binary.asm["amdgcn"], r"v_(?:mfma|wmma)\S*"
        found = {name: int(value) for name, value in re.findall(r"\.(\w+_count):\s+(\d+)", text)}
        # Scalar registers, of masks at odd sizes, spill to lanes of vector registers and not to memory.
        registers, spills = found["vgpr_count"], found["vgpr_spill_count"]
        assert spills or "scratch_store" not in text, kernel
    matrix = tuple(sorted(set(re.findall(pattern, text))))
    return Resources(kernel, variant, binary.metadata.num_warps, registers, spills, binary.metadata.shared, matrix)


# Bytes of stack with every optional argument in float16: cooperative tiles have 168 registers a thread, of which biases
# and router weights take those that are left; the sum over experts holds all slots at once.
STACK_OF_RICH = {"specialized_product_kernel": 32, "combine_kernel": 24}


def problem(found: Resources, target: Target) -> str | None:
    if found.shared > target.traits.shared_memory:
        return f"{found.shared} bytes of shared memory, the target has {target.traits.shared_memory}"
    if found.spills > STACK_OF_RICH.get(found.kernel, 0) * ("rich" in found.variant):
        return f"{found.spills} spills with {found.registers} registers"
    if "product" in found.kernel and not any(re.match(target.matrix or "", name) for name in found.matrix):
        return f"no {target.matrix} among {found.matrix}"
    return None


def variant_name(constants: dict[str, Any], *, rich: bool) -> str:
    block = f"{constants['BLOCK_M']}" if "SORTED" in constants else ""
    return " ".join(filter(None, [constants.get("ACTIVATION", ""), block, "rich" if rich else ""]))


def compile_all(name: str, parts: tuple[str, ...] = USUAL) -> list[Resources]:
    """Compile these parts for a target: one variant of each kernel at least."""
    target = TARGETS[name]
    traits, kernels = target.traits, all_kernels(target.traits)
    all_found, problems = [], []
    for rich, variants in variants_for(traits, parts):
        for kernel, types, constants in variants:
            types = {name: kind for name, kind in types.items() if name in kernels[kernel].arg_names}
            constants = complete(kernels[kernel], types, constants, traits)
            binary = compile_kernel(kernels[kernel], types, constants, target.gpu, even_sizes=not rich)
            found = resources(kernel, variant_name(constants, rich=rich), binary)
            all_found.append(found)
            print(name, kernel, found.variant, f"{found.registers=} {found.spills=} {found.shared=}", *found.matrix[:1])
            problems += [f"{name} {kernel} {found.variant}: {text}"] if (text := problem(found, target)) else []
    missing = set(kernels) - {found.kernel for found in all_found} if "few" in parts else set()
    missing -= set() if traits.int8_matrix else {"grouped_product_kernel"}
    if missing:
        problems.append(f"kernels without a compilation here: {sorted(missing)}")
    if problems:
        raise ValueError("\n".join(problems))
    return all_found


def main(*words: str) -> int:
    failed = []
    for word in words:
        name, _, named = word.partition("/")
        parts = tuple(named.split("+")) if named else USUAL
        try:
            print(
                f"{word}: {len(compile_all(name, parts))} compilations",
                flush=True,
            )
        except Exception as error:  # whatever a compiler raises
            failed.append(word)
            print(f"{word}: FAILED\n{error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
