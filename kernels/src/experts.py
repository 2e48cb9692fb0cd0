"""The public forward of the INT8 experts."""

import torch

from .arguments import check_arguments
from .backend import uses_triton
from .reference import run_reference


def fused_experts_int8(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str = "silu",
    activation_limit: float | None = None,
    activation_alpha: float | None = None,
    w13_input_scale: torch.Tensor | None = None,
    w2_input_scale: torch.Tensor | None = None,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mixture-of-experts forward with int8 weights and int8 activations.

    For token t with experts e_j = topk_ids[t, j] and router weights r_j = topk_weights[t, j]:

        h_j   = act(deq(q(x_t)) (w13[e_j, :I] * w13_scale)^T + b, deq(q(x_t)) (w13[e_j, I:] * w13_scale)^T + b)
        y_j   = deq(q(h_j)) (w2[e_j] * w2_scale)^T + b
        out_t = sum_j r_j * y_j

    Products of codes accumulate exactly in int32; scales, biases, activation and the sum over j are float32. h_j and
    y_j are rounded to the dtype of hidden_states, as experts computed in that dtype would leave them: it is what
    inference engines do, and it halves the traffic between the launches. The rounding of h_j, at most 2^-8 of a value,
    is within the half step of the int8 quantization that follows, even for the largest value of a row. The order of
    every sum is fixed: the same inputs give the same bits, whatever the other tokens of the batch are.

    Arguments:
        hidden_states    bfloat16 or float16 [M, H], rows contiguous; M may be 0
        w13, w2          int8 [E, 2I, H] (rows 0..I-1 gate, I..2I-1 up) and [E, H, I], contiguous
        w13_scale        float32 [E, 2I, 1] per channel, or [E, 1, 1] per tensor
        w2_scale         float32 [E, H, 1] or [E, 1, 1]
        topk_weights     float32 [M, K]
        topk_ids         int32 or int64 [M, K]; -1, like any id outside 0..E-1, means that another rank has the expert
        activation       "silu", "gelu_tanh", "swigluoai" or "swiglustep"; see `activations`
        activation_limit, activation_alpha
                         clamp of swigluoai and swiglustep (7.0) and slope of swigluoai (1.702)
        w13_input_scale, w2_input_scale
                         float32 [E], positive: static per-tensor scales of x and h; without, dynamic per token
        w13_bias, w2_bias
                         float [E, 2I] and [E, H]
        apply_router_weight_on_input
                         r_j multiplies the token before the first product instead of y_j. Under dynamic scales it
                         multiplies the token's scale, since q(r x) and q(x) have the same codes
        out              [M, H], contiguous, like hidden_states, to write the result to; may be hidden_states itself

    Returns [M, H] in the dtype of hidden_states. A token that holds a NaN or an infinity gets a row of NaN; no other
    token is affected. So does a token whose h_j leaves the range of float16. A token without an expert on this rank
    gets 0.

    CUDA, ROCm and XPU tensors run the Triton kernels, without synchronization and with allocations that depend on
    shapes only (capture in a CUDA graph after one warm-up call). CPU tensors run the torch twin, or the kernels in
    Triton's interpreter under TRITON_INTERPRET=1.

    Raises TypeError for a wrong dtype and ValueError for a wrong shape, device, layout or activation.
    """
    arguments = check_arguments(
        hidden_states,
        w13,
        w2,
        w13_scale,
        w2_scale,
        topk_weights,
        topk_ids,
        activation=activation,
        activation_limit=activation_limit,
        activation_alpha=activation_alpha,
        w13_input_scale=w13_input_scale,
        w2_input_scale=w2_input_scale,
        w13_bias=w13_bias,
        w2_bias=w2_bias,
        apply_router_weight_on_input=apply_router_weight_on_input,
        out=out,
    )
    if uses_triton(hidden_states.device) and arguments.pairs > 0:
        from .pipeline import run_pipeline

        if out is None:
            out = torch.empty((arguments.tokens, arguments.hidden), dtype=hidden_states.dtype, device=w2.device)
        return run_pipeline(arguments, out)
    result = run_reference(arguments)
    return result if out is None else out.copy_(result)
