"""The arguments of the fused operation, checked once, and the data classes that the stages pass on."""

from dataclasses import dataclass

import torch

from .activations import Activation, make_activation
from .tables import RowBlocks

# An int32 sum of d products of codes in [-127, 127] and weights in [-128, 127] cannot overflow up to this d.
MAX_DEPTH = (2**31 - 1) // (127 * 128)
_MAX_INDEX = 2**31 - 1

_HIDDEN_DTYPES = (torch.bfloat16, torch.float16)
_BIAS_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ID_DTYPES = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """One projection of all experts.

    codes  int8 [E, N, D], contiguous
    scale  float32 [E, N, 1] (per channel) or [E, 1, 1] (per tensor)
    bias   float [E, N] or None
    """

    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None

    @property
    def per_channel(self) -> bool:
        return self.scale.shape[1] != 1 or self.codes.shape[1] == 1


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """Pairs grouped by expert, on the device; see `launch.routing`. Beyond the blocks and rows in use: unspecified.

    pairs         int32 [P]: the pair of each row
    rows          int32 [P]: the row of each pair
    block_expert  int32 [max_blocks]: the expert of each block
    block_first   int32 [max_blocks]: its first row
    block_rows    int32 [max_blocks]: its rows, 1 .. BM + TM
    totals        int32 [3]: blocks in use, rows in use, and a counter that is 0 between launches (`jit.specialized`)
    run_counts    int32 [runs, E]: how often each run of pairs has each expert; no run where pairs are few
    """

    blocks: RowBlocks
    pairs: torch.Tensor
    rows: torch.Tensor
    block_expert: torch.Tensor
    block_first: torch.Tensor
    block_rows: torch.Tensor
    totals: torch.Tensor
    run_counts: torch.Tensor

    @property
    def max_blocks(self) -> int:
        return self.block_expert.numel()

    def for_products(self) -> tuple[torch.Tensor, ...]:
        """The arguments that both kernels of the grouped products take."""
        return self.pairs, self.block_expert, self.block_first, self.block_rows, self.totals


@dataclass(frozen=True, slots=True)
class GroupedProduct:
    """One product of codes and expert weights on sorted rows; see `launch.grouped_gemm` for the arithmetic.

    codes          int8 [R, D]
    row_scale      float32 [R]
    router_weight  float32, P elements, which multiplies row_scale, or None
    activation     that of gate-up, whose results stay in the plan's row order; None for down
    pairs_per_row  row p // pairs_per_row of the codes serves pair p; 0: codes are in the plan's row order
    out            [P, columns]
    """

    codes: torch.Tensor
    row_scale: torch.Tensor
    weights: ExpertWeights
    router_weight: torch.Tensor | None
    activation: Activation | None
    pairs_per_row: int
    plan: RoutingPlan
    out: torch.Tensor

    @property
    def depth(self) -> int:
        """Length of the summed dimension: H of gate-up, I of down."""
        return self.weights.codes.shape[2]

    @property
    def columns(self) -> int:
        """Columns of the result: I of gate-up, H of down."""
        return self.weights.codes.shape[1] // (2 if self.gated else 1)

    @property
    def gated(self) -> bool:
        """Whether weights have gate and up rows."""
        return self.activation is not None and self.activation.gated

    @property
    def limits(self) -> tuple[float, float]:
        return (self.activation.limit, self.activation.alpha) if self.activation else (0.0, 0.0)

    @property
    def constants(self) -> dict[str, object]:
        """The constants that both kernels share."""
        return {
            "ACTIVATION": self.activation.variant if self.activation else "",
            "GATED": self.gated,
            "SORTED": self.activation is not None,
            "PER_CHANNEL": self.weights.per_channel,
            "RAW_SUMS": self.out.dtype == torch.int32,
            "BLOCK_M": self.plan.blocks.block_m,
            "TAIL_M": self.plan.blocks.tail_m,
            "SMALL_M": self.plan.blocks.small_m,
        }


@dataclass(frozen=True, slots=True)
class ExpertsArguments:
    """Checked arguments of one forward; see `check_arguments` for their meaning."""

    hidden_states: torch.Tensor
    gate_up: ExpertWeights
    down: ExpertWeights
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor
    activation: Activation
    gate_up_input_scale: torch.Tensor | None
    down_input_scale: torch.Tensor | None
    apply_router_weight_on_input: bool
    out: torch.Tensor | None

    @property
    def tokens(self) -> int:
        return self.hidden_states.shape[0]

    @property
    def hidden(self) -> int:
        return self.hidden_states.shape[1]

    @property
    def intermediate(self) -> int:
        return self.down.codes.shape[2]

    @property
    def experts(self) -> int:
        return self.down.codes.shape[0]

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def pairs(self) -> int:
        return self.topk_ids.numel()


def check_arguments(
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
) -> ExpertsArguments:
    """The signature of `fused_experts_int8` and its twin: checks all that can be checked without reading the device.

        hidden_states    bfloat16 or float16 [M, H], rows contiguous; M may be 0
        w13, w2          int8 [E, 2I, H] (rows 0..I-1 gate, I..2I-1 up) and [E, H, I], contiguous; without gate (relu2)
                         w13 is [E, I, H], and its scale and bias have I rows
        w13_scale        float32 [E, 2I, 1] per channel, or [E, 1, 1] per tensor
        w2_scale         float32 [E, H, 1] or [E, 1, 1]
        topk_weights     float32 [M, K]
        topk_ids         int32 or int64 [M, K]; -1, like any id outside 0..E-1, means that another rank has the expert
        activation       "silu", "gelu", "gelu_tanh", "swigluoai", "swiglustep", "situ" or "relu2"; see `activations`
        activation_limit, activation_alpha
                         clamp of swigluoai and swiglustep (7.0), and of silu and situ where given; slope of swigluoai
                         (1.702), beta of situ (required)
        w13_input_scale, w2_input_scale
                         float32 [E], positive: static per-tensor scales of x and h; without, dynamic per token
        w13_bias, w2_bias
                         float32, bfloat16 or float16 [E, 2I] and [E, H], added before the activation and before r_j
        apply_router_weight_on_input
                         r_j multiplies the token before the first product instead of y_j. Under dynamic scales it
                         multiplies the token's scale, since q(r x) and q(x) have the same codes
        out              [M, H], contiguous, like hidden_states, to write the result to; may be hidden_states itself

    Raises TypeError for a wrong dtype and ValueError for a wrong shape, device, layout or activation.
    """
    _check_tensor("hidden_states", hidden_states, _HIDDEN_DTYPES, None, hidden_states.device, "[M, H]", dim=2)
    device = hidden_states.device
    tokens, hidden = hidden_states.shape
    if hidden_states.stride(1) != 1 and hidden > 1:
        raise ValueError(f"hidden_states: expected rows contiguous in memory, found strides {hidden_states.stride()}")
    function = make_activation(activation, activation_limit, activation_alpha)
    halves, meaning = (2, "[E, 2I, H]") if function.gated else (1, "[E, I, H]")
    _check_tensor("w13", w13, (torch.int8,), None, device, meaning, dim=3, contiguous=True)
    experts, gate_up_rows, _ = w13.shape
    if experts < 1 or gate_up_rows < halves or gate_up_rows % halves or hidden < 1:
        even = " and 2I even" if function.gated else ""
        raise ValueError(f"w13: expected {meaning}, none of them 0{even}, found {tuple(w13.shape)}")
    intermediate = gate_up_rows // halves
    _check_shape("w13", w13, (experts, gate_up_rows, hidden), meaning)
    for name, depth in (("H", hidden), ("I", intermediate)):
        if depth > MAX_DEPTH:
            raise ValueError(f"{name}: expected at most {MAX_DEPTH}, beyond which int32 overflows, found {depth}")
    if gate_up_rows * hidden > _MAX_INDEX:
        raise ValueError(f"w13: expected fewer than 2^31 codes an expert, found {gate_up_rows * hidden}")
    int8 = (torch.int8,)
    _check_tensor("w2", w2, int8, (experts, hidden, intermediate), device, "[E, H, I]", contiguous=True)

    _check_scale("w13_scale", w13_scale, experts, gate_up_rows, device)
    _check_scale("w2_scale", w2_scale, experts, hidden, device)
    for name, scale in (("w13_input_scale", w13_input_scale), ("w2_input_scale", w2_input_scale)):
        if scale is not None:
            _check_tensor(name, scale, (torch.float32,), (experts,), device, "[E]", contiguous=True)
    for name, bias, columns in (("w13_bias", w13_bias, gate_up_rows), ("w2_bias", w2_bias, hidden)):
        if bias is not None:
            _check_tensor(name, bias, _BIAS_DTYPES, (experts, columns), device, "[E, out]", contiguous=True)

    _check_tensor("topk_ids", topk_ids, _ID_DTYPES, None, device, "[M, K]", dim=2, contiguous=True)
    top_k = topk_ids.shape[1]
    _check_shape("topk_ids", topk_ids, (tokens, top_k), "[M, K]")
    _check_tensor("topk_weights", topk_weights, (torch.float32,), (tokens, top_k), device, "[M, K]", contiguous=True)
    # The worst-case padding is at most 127 rows an expert; leave room for it in the int32 positions.
    if tokens * top_k + 128 * experts > _MAX_INDEX:
        raise ValueError(f"topk_ids: expected fewer than 2^31 pairs with their padding, found {tokens * top_k}")
    if out is not None:
        _check_tensor("out", out, (hidden_states.dtype,), (tokens, hidden), device, "[M, H]", contiguous=True)
    return ExpertsArguments(
        hidden_states=hidden_states,
        gate_up=ExpertWeights(w13, w13_scale, w13_bias),
        down=ExpertWeights(w2, w2_scale, w2_bias),
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        activation=function,
        gate_up_input_scale=w13_input_scale,
        down_input_scale=w2_input_scale,
        apply_router_weight_on_input=apply_router_weight_on_input,
        out=out,
    )


def _check_scale(name: str, scale: torch.Tensor, experts: int, rows: int, device: torch.device) -> None:
    _check_tensor(name, scale, (torch.float32,), None, device, "[E, out, 1] or [E, 1, 1]", dim=3, contiguous=True)
    if tuple(scale.shape) not in ((experts, rows, 1), (experts, 1, 1)):
        raise ValueError(f"{name}: expected {(experts, rows, 1)} or {(experts, 1, 1)}, found {tuple(scale.shape)}")


def _check_tensor(
    name: str,
    tensor: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...] | None,
    device: torch.device,
    meaning: str,
    *,
    dim: int | None = None,
    contiguous: bool = False,
) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: expected {' or '.join(str(d) for d in dtypes)}, found {tensor.dtype}")
    if dim is not None and tensor.dim() != dim:
        raise ValueError(f"{name}: expected {dim} dimensions {meaning}, found shape {tuple(tensor.shape)}")
    if shape is not None:
        _check_shape(name, tensor, shape, meaning)
    if tensor.device != device:
        raise ValueError(f"{name}: expected device {device} of hidden_states, found {tensor.device}")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor, found strides {tensor.stride()}")


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {shape}, {meaning}, found {tuple(tensor.shape)}")
