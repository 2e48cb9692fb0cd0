"""How long a forward outside of a CUDA graph occupies the host: python benchmarks/eager.py [--shape NAME] [--usual]

Medians over rounds of ten calls, each with the time that the host takes to launch them; a round ends when the GPU has
computed them. Calls alternate between two inputs. `--usual` binds the arguments of every launch by Triton, as the first
call of a kind does and as on AMD and Intel. Needs an NVIDIA GPU for anything else.
"""

import argparse
import statistics
import time

import torch

from quarkconv.kernels import fused_experts_int8
from quarkconv.kernels.arguments import check_arguments
from quarkconv.kernels.forward import run_checked
from quarkconv.kernels.tune import NAMED, make_call, make_weights

TOKENS = (1, 8, 64, 512, 2048, 8192)
ROUNDS, CALLS = 15, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=NAMED, default="Qwen3-30B-A3B")
    parser.add_argument("--usual", action="store_true", help="bind the arguments of every launch")
    options = parser.parse_args()
    shape = NAMED[options.shape]
    weights = make_weights(shape, torch.device("cuda", torch.cuda.current_device()))
    print(f"{options.shape}, {torch.cuda.get_device_name()}: microseconds of the host a forward")
    for tokens in TOKENS:
        inputs = [make_call(shape, weights, tokens) for _ in range(2)]
        calls = [(each.hidden_states, *weights, each.topk_weights, each.topk_ids) for each in inputs]
        outs = [torch.empty_like(each.hidden_states) for each in inputs]
        print(f"{tokens:6} tokens: {median_of_host(calls, outs, usual=options.usual):.0f}", flush=True)


def median_of_host(
    calls: list[tuple[torch.Tensor, ...]], outs: list[torch.Tensor], *, usual: bool, rounds: int = ROUNDS
) -> float:
    """Median microseconds that the host takes for one forward."""

    def forward(number: int) -> None:
        call, out = calls[number % len(calls)], outs[number % len(calls)]
        if usual:
            run_checked(check_arguments(*call, out=out))
        else:
            fused_experts_int8(*call, out=out)

    times = []
    for _ in range(rounds + 2):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for number in range(CALLS):
            forward(number)
        times.append((time.perf_counter() - began) / CALLS * 1e6)
    torch.cuda.synchronize()
    return statistics.median(times[2:])  # the first compile


if __name__ == "__main__":
    main()
