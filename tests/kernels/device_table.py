"""Write benchmarks/results/kernel-devices.json: python tests/kernels/device_table.py [OUT].

Compiles every kernel for every target (`compile_ahead.py`) and sets the resources of the decode product beside what the
memory of each device needs. In flight: the tiles of weights and rows that the programs of one SM (CU) have requested
beyond those that they multiply. Needed: bandwidth times a latency of 700 ns, by Little's law, divided by the SMs.
"""

import datetime
import json
import sys
from pathlib import Path

import triton
from compile_ahead import Resources, compile_all
from targets import TARGETS, Target

from quarkconv.kernels.options import choose_launch_options, shared_bytes
from quarkconv.kernels.tables import GemvOptions, LaunchOptions

LATENCY = 700e-9
DECODE = (8, 64, 8, 3072, 1536)  # as in compile_ahead


def decode_program(target: Target, found: list[Resources]) -> tuple[Resources, int]:
    """(resources of the gate-up product for few rows, bytes that one program has in flight)."""
    if not target.traits.int8_matrix:
        gemv = choose_launch_options(*DECODE, target.traits)
        assert isinstance(gemv, GemvOptions)
        program = next(each for each in found if each.kernel == "grouped_gate_up_gemv_kernel")
        return program, 2 * gemv.gate_up.block_n * DECODE[3]
    options = choose_launch_options(*DECODE, target.traits)
    assert isinstance(options, LaunchOptions)
    rows, tile = options.blocks.block_m, options.gate_up
    program = next(e for e in found if (e.kernel, e.variant) == ("grouped_product_kernel", f"silu {rows}"))
    return program, shared_bytes(tile, rows, 2) * (tile.num_stages - 1) // tile.num_stages


def programs_at_once(target: Target, found: Resources) -> int:
    """Programs of one SM, by shared memory (1 KB each is the system's) and registers (in units of 8)."""
    by_shared = target.shared // (found.shared + 1024 if target.gpu.backend == "cuda" else max(found.shared, 1))
    by_registers = target.per_processor // (found.warps * -(-found.registers // 8) * 8)
    return min(by_shared, by_registers, 32)


def main(out: Path) -> None:
    rows = []
    for name, target in TARGETS.items():
        program, in_flight = decode_program(target, found := compile_all(name))
        programs = programs_at_once(target, program)
        for device in target.devices:
            row = {
                "device": device.name,
                "target": name,
                "compilations": len(found),
                "spills": max(each.spills for each in found),
                "matrix": next(iter(program.matrix), "").split(".row")[0],
                "registers": program.registers,
                "shared": program.shared,
                "programs": programs,
                "in_flight": programs * in_flight,
                "needed": round(device.bandwidth * 1e12 * LATENCY / device.processors),
                "ran": device.ran,
                "tuned": device.tuned,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
    document = {"date": datetime.date.today().isoformat(), "triton": triton.__version__, "rows": rows}
    out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else results / "kernel-devices.json")
