"""INT8 mixture-of-experts forward: Triton kernels, each with an exact torch twin.

Legend of shape suffixes, used throughout the package:

    M  tokens                 E  experts on this rank
    H  hidden size            K  experts per token (top-k)
    I  intermediate size      P  (token, slot) pairs, M * K; pair p is token p // K, slot p % K

With x_t a token, q(.) symmetric int8 quantization (see `quantize`) and ids, r the router's choice and weight:

    h_p   = act(q(x_t) W13_gate[e]^T, q(x_t) W13_up[e]^T)      e = ids[p], t = p // K
    y_p   = q(h_p) W2[e]^T
    out_t = sum over the K pairs p of t, in slot order, of r_p * y_p

The products of codes accumulate in int32 and are exact; scales, bias and activation follow in float32.

This package imports nothing from the rest of quarkconv, and Triton only when a Triton kernel is launched.
"""

from .experts import fused_experts_int8, fused_experts_int8_reference
from .quantize import quantize_int8, quantize_int8_reference

__all__ = ["fused_experts_int8", "fused_experts_int8_reference", "quantize_int8", "quantize_int8_reference"]
