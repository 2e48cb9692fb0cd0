"""The GPUs that kernels are compiled for ahead of time, and what is known of each device.

Shared memory (LDS) that one program may use: CUDA programming guide, CDNA 3, CDNA 4 and RDNA ISA documents. Bandwidth,
SMs and CUs: the vendors' data sheets.
"""

from dataclasses import dataclass

from triton.backends.compiler import GPUTarget

from quarkconv.kernels.backend import DeviceTraits

KB = 1024


@dataclass(frozen=True)
class Device:
    """One product: its memory bandwidth in TB/s, its SMs or CUs, when the kernels ran on it and were tuned for it."""

    name: str
    bandwidth: float
    processors: int
    ran: str = ""
    tuned: str = ""


@dataclass(frozen=True)
class Target:
    """An architecture.

    matrix         a pattern of the int8 matrix instruction that the products must contain, or None
    shared         bytes of shared memory of an SM or CU, for all of its programs
    per_processor  registers of an SM or CU, in units of one register of a whole warp (wave)
    """

    gpu: GPUTarget
    traits: DeviceTraits
    matrix: str | None
    shared: int
    per_processor: int
    devices: tuple[Device, ...]


MMA = r"mma\.sync\.aligned\.m16n8k32\.row\.col\.satfinite\.s32\.s8\.s8\.s32"
WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8"
BLACKWELL = rf"{MMA}|tcgen05\.mma\.cta_group::\d\.kind::i8"  # the latter from Triton 3.9 on
WMMA = r"v_wmma_i32_16x16x16_iu8"
_NVIDIA_REGISTERS = 65536 // 32  # registers of a warp, of an SM
_CDNA_REGISTERS, _RDNA_REGISTERS = 4 * 512, 2 * 1536  # of a wave, of a CU: SIMDs times registers of a lane

TARGETS = {
    "sm_75": Target(
        GPUTarget("cuda", 75, 32), DeviceTraits("cuda", 64 * KB, dot4=True, int8_matrix=False), None, 64 * KB,
        _NVIDIA_REGISTERS, (Device("T4", 0.32, 40),),
    ),
    "sm_80": Target(
        GPUTarget("cuda", 80, 32), DeviceTraits("cuda", 163 * KB, dot4=True), MMA, 164 * KB,
        _NVIDIA_REGISTERS, (Device("A100 80GB", 2.04, 108),),
    ),
    "sm_86": Target(
        GPUTarget("cuda", 86, 32), DeviceTraits("cuda", 99 * KB, dot4=True), MMA, 100 * KB,
        _NVIDIA_REGISTERS, (Device("A10", 0.60, 72), Device("RTX 3090", 0.94, 82)),
    ),
    "sm_89": Target(
        GPUTarget("cuda", 89, 32), DeviceTraits("cuda", 99 * KB, dot4=True), MMA, 100 * KB,
        _NVIDIA_REGISTERS, (Device("L4", 0.30, 58), Device("L40S", 0.86, 142), Device("RTX 4090", 1.01, 128)),
    ),
    "sm_90": Target(
        GPUTarget("cuda", 90, 32), DeviceTraits("cuda", 227 * KB, True, True, True, 132, dot4=True, wgmma=True), WGMMA,
        228 * KB, _NVIDIA_REGISTERS,
        (Device("H100", 3.35, 132, "2026-11-26", "2026-11-26"), Device("H200", 4.8, 132, "2026-11-29", "2026-11-29")),
    ),
    "sm_100": Target(
        GPUTarget("cuda", 100, 32), DeviceTraits("cuda", 227 * KB, True, True, dot4=True), BLACKWELL, 228 * KB,
        _NVIDIA_REGISTERS, (Device("B200", 8.0, 148),),
    ),
    "sm_120": Target(
        GPUTarget("cuda", 120, 32), DeviceTraits("cuda", 99 * KB, True, True, dot4=True), MMA, 100 * KB,
        _NVIDIA_REGISTERS, (Device("RTX 5090", 1.79, 170), Device("RTX PRO 6000", 1.79, 188)),
    ),
    "gfx90a": Target(
        GPUTarget("hip", "gfx90a", 64), DeviceTraits("hip", 64 * KB, warp_size=64), r"v_mfma_i32_(16x16x16|32x32x8)i8",
        64 * KB, _CDNA_REGISTERS, (Device("MI210", 1.6, 104), Device("MI250, one die", 1.6, 104)),
    ),
    "gfx942": Target(
        GPUTarget("hip", "gfx942", 64), DeviceTraits("hip", 64 * KB, warp_size=64),
        r"v_mfma_i32_(16x16x32|32x32x16)_i8", 64 * KB, _CDNA_REGISTERS, (Device("MI300X", 5.3, 304),),
    ),
    "gfx950": Target(
        GPUTarget("hip", "gfx950", 64), DeviceTraits("hip", 160 * KB, warp_size=64),
        r"v_mfma_i32_(16x16x64|32x32x32)_i8", 160 * KB, _CDNA_REGISTERS, (Device("MI350X", 8.0, 256),),
    ),
    "gfx1100": Target(
        GPUTarget("hip", "gfx1100", 32), DeviceTraits("hip", 64 * KB), WMMA, 64 * KB,
        _RDNA_REGISTERS, (Device("RX 7900 XTX", 0.96, 96),),
    ),
    "gfx1201": Target(
        GPUTarget("hip", "gfx1201", 32), DeviceTraits("hip", 64 * KB), WMMA, 64 * KB,
        _RDNA_REGISTERS, (Device("RX 9070 XT", 0.64, 64),),
    ),
}  # fmt: skip
