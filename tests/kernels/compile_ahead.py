"""Compile every kernel for one GPU target, without a GPU: python compile_ahead.py {sm_80,...,gfx950}.

A program of its own: it needs Triton without TRITON_INTERPRET, which the test process may have set. It prints one line
a compilation, and fails if a kernel does not compile, takes more shared memory than the target has, or is not listed.
"""

import importlib
import pkgutil
import sys
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import quarkconv.kernels
from quarkconv.kernels.activations import ACTIVATIONS
from quarkconv.kernels.backend import DeviceTraits
from quarkconv.kernels.options import choose_combine_options, choose_launch_options, choose_row_options
from quarkconv.kernels.quantize import MIN_SCALE
from quarkconv.kernels.tables import LaunchOptions, TileOptions

# Shared memory (LDS) that one program may use, in bytes: CUDA programming guide, CDNA 3 and CDNA 4 ISA documents.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), DeviceTraits("cuda", 163 * 1024)),
    "sm_90": (GPUTarget("cuda", 90, 32), DeviceTraits("cuda", 227 * 1024, True, True)),
    "sm_100": (GPUTarget("cuda", 100, 32), DeviceTraits("cuda", 227 * 1024, True, True)),
    "gfx942": (GPUTarget("hip", "gfx942", 64), DeviceTraits("hip", 64 * 1024)),
    "gfx950": (GPUTarget("hip", "gfx950", 64), DeviceTraits("hip", 160 * 1024)),
}

SIZES = ("D", "N", "H", "row_stride")


def all_kernels() -> dict[str, Any]:
    """Every kernel of the package: the jitted functions called *_kernel."""
    found = {}
    for module_info in pkgutil.iter_modules(quarkconv.kernels.__path__, "quarkconv.kernels."):
        if module_info.name.endswith("_jit"):
            module = importlib.import_module(module_info.name)
            found.update({name: value for name, value in vars(module).items() if name.endswith("_kernel")})
    return found


def product_constants(tile: TileOptions, options: LaunchOptions, *, even: bool, per_channel: bool) -> dict[str, Any]:
    return {
        "PER_CHANNEL": per_channel,
        "RAW_SUMS": False,
        "INTERPRETED": False,
        "EVEN_D": even,
        "BLOCK_M": options.blocks.block_m,
        "TAIL_M": options.blocks.tail_m,
        "SMALL_M": options.blocks.small_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_k,
        "GROUP_M": tile.group_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def descriptor(tile: TileOptions, rows: int) -> dict[str, str]:
    """The type of a tensor descriptor for tiles of `rows` rows, or none."""
    return {"weight_desc": f"tensordesc<i8[{rows}, {tile.block_k}]>"} if tile.descriptors else {}


def variants(options: LaunchOptions, *, rich: bool) -> list[tuple[str, dict[str, str], dict[str, Any]]]:
    """(kernel, pointer and float types, constants); every other argument is an int32.

    `rich` chooses the variants with every optional argument, masks and float16, else those of the common case. An
    optional argument without a type is None.
    """
    dtype, ids = ("*fp16", "*i64") if rich else ("*bf16", "*i32")
    row, combine = choose_row_options(3072), choose_combine_options(3072)
    plan = dict.fromkeys(("pairs_ptr", "block_expert_ptr", "block_first_ptr", "block_rows_ptr", "totals_ptr"), "*i32")
    product_types = {
        "codes_ptr": "*i8",
        "row_scale_ptr": "*fp32",
        "weight_ptr": "*i8",
        "weight_scale_ptr": "*fp32",
        "out_ptr": dtype,
        **(plan if options.sorted else {"topk_ids_ptr": ids}),
        **({"bias_ptr": "*fp32"} if rich else {}),
    }
    kind = {"even": not rich, "per_channel": not rich}
    down_types = product_types | descriptor(options.down, options.down.block_n)
    if options.down.descriptors:
        down_types["codes_desc"] = f"tensordesc<i8[{options.blocks.block_m}, {options.down.block_k}]>"
    gate_up_types = product_types | descriptor(options.gate_up, options.gate_up.block_n)
    gate_up_types |= {"limit": "fp32", "alpha": "fp32"} | ({"router_weight_ptr": "*fp32"} if rich else {})
    gate_up = product_constants(options.gate_up, options, **kind) | {"PAIRS_PER_ROW": 8}
    # The activations differ in the epilogue alone: all of them in the smaller of the two variants.
    found = [
        ("grouped_gate_up_kernel", gate_up_types, gate_up | {"ACTIVATION": name})
        for name in (ACTIVATIONS[1:] if rich else ACTIVATIONS[:1])
    ]
    found.append(("grouped_down_kernel", down_types, product_constants(options.down, options, **kind)))
    optional = {"topk_ids_ptr": ids, "expert_scale_ptr": "*fp32", "router_weight_ptr": "*fp32"}
    found += [
        (
            "quantize_rows_kernel",
            {"x_ptr": dtype, "codes_ptr": "*i8", "scale_ptr": "*fp32"}
            | (optional if rich else {"pairs_ptr": "*i32", "totals_ptr": "*i32"}),
            {
                "PAIRS_PER_ROW": 8 if rich else 1,
                "MIN_SCALE": MIN_SCALE,
                "INTERPRETED": False,
                "TRIGGER_FIRST": not rich,
                "ROWS": row.rows,
                "BLOCK_N": row.block,
                "CHUNKS": 0 if rich else 3072 // row.block,
                "num_warps": row.num_warps,
            },
        ),
        (
            "combine_kernel",
            {"expert_out_ptr": dtype, "topk_ids_ptr": ids, "out_ptr": dtype}
            | ({"topk_weights_ptr": "*fp32"} if rich else {}),
            {"TOP_K": 8, "INTERPRETED": False, "BLOCK_H": combine.block, "num_warps": combine.num_warps},
        ),
    ]
    if not rich:
        return found
    runs = dict.fromkeys(("counts_ptr", "starts_ptr"), "*i32")
    cut = {"BLOCK_M": options.blocks.block_m, "TAIL_M": options.blocks.tail_m, "BLOCK_E": 512}
    found += [
        ("route_at_once_kernel", {"topk_ids_ptr": ids} | plan, cut | {"BLOCK_P": 1024, "num_warps": 4}),
        ("count_run_kernel", {"topk_ids_ptr": ids} | runs, {"BLOCK_E": 512, "BLOCK_P": 1024, "num_warps": 4}),
        ("arrange_kernel", runs | plan, cut | {"BLOCK_C": 16, "num_warps": 4}),
        ("place_run_kernel", {"topk_ids_ptr": ids} | runs | plan, {"BLOCK_P": 1024, "num_warps": 1}),
        ("absmax_kernel", {"x_ptr": dtype, "partial_ptr": "*fp32"}, {"BLOCK": 4096}),
        (
            "tensor_scale_kernel",
            {"partial_ptr": "*fp32", "scale_ptr": "*fp32"},
            {"MIN_SCALE": MIN_SCALE, "BLOCK": 1024},
        ),
        ("quantize_flat_kernel", {"x_ptr": dtype, "codes_ptr": "*i8", "scale_ptr": "*fp32"}, {"BLOCK": 4096}),
    ]
    return found


def complete(kernel: Any, types: dict[str, str], constants: dict[str, Any], traits: DeviceTraits) -> dict[str, Any]:
    """The constants of a launch on the target: arguments without a type are None, and launches may overlap."""
    missing = {n: None for n in kernel.arg_names if n.endswith(("_ptr", "_desc")) and n not in types}
    dependent = {"DEPENDENT": traits.dependent_launch} if "DEPENDENT" in kernel.arg_names else {}
    return constants | missing | dependent


def compile_kernel(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], target: GPUTarget, *, even_sizes: bool
) -> Any:
    """Compile as a launch would, with pointers and, for `even_sizes`, sizes that are known to be multiples of 16."""
    launch = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    constexprs = {name: value for name, value in constants.items() if name not in launch}
    signature = {name: "constexpr" if name in constexprs else types.get(name, "i32") for name in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (even_sizes and name in SIZES)
    }
    source = ASTSource(kernel, signature, constexprs, aligned)
    return triton.compile(source, target=target, options=launch)


def main(name: str) -> None:
    target, traits = TARGETS[name]
    kernels = all_kernels()
    compiled = set()
    decode = choose_launch_options(1, 64, 8, 3072, 1536, traits)
    prefill = choose_launch_options(4096, 64, 8, 2048, 1408, traits)
    for options, rich in ((decode, True), (prefill, False)):
        for kernel, types, constants in variants(options, rich=rich):
            constants = complete(kernels[kernel], types, constants, traits)
            binary = compile_kernel(kernels[kernel], types, constants, target, even_sizes=not rich)
            if binary.metadata.shared > traits.shared_memory:
                sys.exit(
                    f"{kernel}: {binary.metadata.shared} bytes of shared memory, {name} has {traits.shared_memory}"
                )
            compiled.add(kernel)
            print(f"{name} {kernel} shared={binary.metadata.shared}")
    if compiled != set(kernels):
        sys.exit(f"kernels without a compilation here: {sorted(set(kernels) ^ compiled)}")


if __name__ == "__main__":
    main(sys.argv[1])
