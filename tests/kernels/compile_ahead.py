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
from quarkconv.kernels.options import (
    LaunchOptions,
    TileOptions,
    choose_combine_options,
    choose_launch_options,
    choose_row_options,
)
from quarkconv.kernels.quantize import MIN_SCALE

# Shared memory (LDS) that one program may use, in bytes: CUDA programming guide, CDNA 3 and CDNA 4 ISA documents.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), DeviceTraits("cuda", 163 * 1024)),
    "sm_90": (GPUTarget("cuda", 90, 32), DeviceTraits("cuda", 227 * 1024)),
    "sm_100": (GPUTarget("cuda", 100, 32), DeviceTraits("cuda", 227 * 1024)),
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


def product_constants(tile: TileOptions, block_m: int, *, even: bool, per_channel: bool) -> dict[str, Any]:
    return {
        "PER_CHANNEL": per_channel,
        "RAW_SUMS": False,
        "INTERPRETED": False,
        "EVEN_D": even,
        "BLOCK_M": block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": tile.block_k,
        "GROUP_M": tile.group_m,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def variants(options: LaunchOptions, *, rich: bool) -> list[tuple[str, dict[str, str], dict[str, Any]]]:
    """(kernel, pointer and float types, constants); every other argument is an int32.

    `rich` chooses the variants with every optional argument, masks and float16, else those of the common case.
    """
    dtype = "*fp16" if rich else "*bf16"
    row, combine = choose_row_options(3072), choose_combine_options(3072)
    product_types = {
        "codes_ptr": "*i8",
        "row_scale_ptr": "*fp32",
        "weight_ptr": "*i8",
        "weight_scale_ptr": "*fp32",
        "out_ptr": dtype,
        "pairs_ptr": "*i32",
        "block_expert_ptr": "*i32",
        "num_blocks_ptr": "*i32",
    }
    if rich:
        product_types["bias_ptr"] = "*fp32"
    common: dict[str, Any] = {} if rich else {"bias_ptr": None}
    kind = {"even": not rich, "per_channel": not rich}
    gate_up = product_constants(options.gate_up, options.block_m, **kind) | common
    gate_up |= {"PAIRS_PER_ROW": 8} | ({} if rich else {"router_weight_ptr": None})
    gate_up_types = (
        product_types | {"limit": "fp32", "alpha": "fp32"} | ({"router_weight_ptr": "*fp32"} if rich else {})
    )
    found = [
        ("grouped_gate_up_kernel", gate_up_types, gate_up | {"ACTIVATION": name})
        for name in (ACTIVATIONS[1:] if rich else ACTIVATIONS[:1])
    ]
    found.append(
        ("grouped_down_kernel", product_types, product_constants(options.down, options.block_m, **kind) | common)
    )
    ids = "*i64" if rich else "*i32"
    optional = {"topk_ids_ptr": ids, "expert_scale_ptr": "*fp32", "router_weight_ptr": "*fp32"}
    found += [
        (
            "quantize_rows_kernel",
            {"x_ptr": dtype, "codes_ptr": "*i8", "scale_ptr": "*fp32"} | (optional if rich else {}),
            {
                "PAIRS_PER_ROW": 8 if rich else 1,
                "MIN_SCALE": MIN_SCALE,
                "BLOCK_N": row.block,
                "ONE_BLOCK": not rich,
                "num_warps": row.num_warps,
            }
            | ({} if rich else dict.fromkeys(optional)),
        ),
        (
            "combine_kernel",
            {"expert_out_ptr": dtype, "topk_ids_ptr": ids, "out_ptr": dtype}
            | ({"topk_weights_ptr": "*fp32"} if rich else {}),
            {"TOP_K": 8, "INTERPRETED": False, "BLOCK_H": combine.block, "num_warps": combine.num_warps}
            | ({} if rich else {"topk_weights_ptr": None}),
        ),
    ]
    if not rich:
        return found
    found += [
        ("count_pairs_kernel", {"topk_ids_ptr": ids, "counts_ptr": "*i32"}, {"BLOCK_P": 4096, "num_warps": 8}),
        (
            "place_pairs_kernel",
            {"topk_ids_ptr": ids}
            | dict.fromkeys(("counts_ptr", "pairs_ptr", "block_expert_ptr", "num_blocks_ptr"), "*i32"),
            {"BLOCK_M": options.block_m, "BLOCK_E": 512, "BLOCK_P": 4096, "num_warps": 8},
        ),
        ("absmax_kernel", {"x_ptr": dtype, "partial_ptr": "*fp32"}, {"BLOCK": 4096}),
        (
            "tensor_scale_kernel",
            {"partial_ptr": "*fp32", "scale_ptr": "*fp32"},
            {"MIN_SCALE": MIN_SCALE, "BLOCK": 1024},
        ),
        ("quantize_flat_kernel", {"x_ptr": dtype, "codes_ptr": "*i8", "scale_ptr": "*fp32"}, {"BLOCK": 4096}),
    ]
    return found


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
    decode = choose_launch_options(16, 64, 8, 3072, 1536, traits)
    prefill = choose_launch_options(4096, 64, 8, 2048, 1408, traits)
    for options, rich in ((decode, True), (prefill, False)):
        for kernel, types, constants in variants(options, rich=rich):
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
