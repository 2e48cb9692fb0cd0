"""A worker of throughput.py: one LLM of vLLM, which measures what the lines of stdin name.

    python worker.py BACKEND MODEL FD OPTIONS

FD is the descriptor that results are written to, one JSON value a line; OPTIONS is a JSON object of `work`'s options.
"""

from __future__ import annotations

import gzip
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from filled import LOAD_FORMAT

PROMPT, PROMPTS = 8192, 4
SHORT_PROMPT = 128
NEW = 65
"""New tokens of each sequence of decode, unless --new-tokens says otherwise."""
SEQUENCES = (1, 8, 64, 256)
PREFILL = "prefill"
FIGURES = (PREFILL, *map(str, SEQUENCES))
"""What is measured: prefill in tokens per second, decode in milliseconds a step for each number of sequences."""
PROFILE = "profile"
_LARGEST = 12  # kernels of a profile that are named
COMPARED = 256
"""Tokens of the prompt whose log-probabilities are compared."""

BACKENDS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "triton": ({}, {}),
    "triton-tuned": ({}, {"VLLM_TUNED_CONFIG_FOLDER": ""}),
    "humming": ({"moe_backend": "humming"}, {}),
    "humming-int8": ({"moe_backend": "humming"}, {"VLLM_HUMMING_INPUT_QUANT_CONFIG": '{"dtype": "int8"}'}),
    "quarkconv": ({}, {"QUARKCONV_VLLM": "1"}),
}
"""Backend -> arguments of LLM, and environment. Triton is vLLM's default; tuned: with the tables of --tables. Humming's
default has 16-bit activations: vLLM 0.33 passes it no scheme for them without the variable (read in its source)."""


def work(name: str, model: str, results: int, options: dict[str, Any]) -> None:
    """A worker: the first line of stdin builds the LLM and computes log-probabilities, each later one measures."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    channel = os.fdopen(results, "w")
    sys.stdin.readline()
    started = time.monotonic()
    count, traces = options["tensor_parallel"], options["traces"]
    ranks = {"tensor_parallel_size": count, "disable_custom_all_reduce": True} if count > 1 else {}
    captured = [*SEQUENCES, PROMPT] if options["capture_prefill"] else list(SEQUENCES)
    profiled = {"profiler_config": profiler_config(traces)} if traces else {}
    llm = LLM(
        model=model, load_format=LOAD_FORMAT, skip_tokenizer_init=True, dtype="bfloat16", seed=0,
        max_model_len=PROMPT + 64, max_num_batched_tokens=PROMPT, max_num_seqs=max(SEQUENCES),
        kv_cache_memory_bytes=options["cache_bytes"], gpu_memory_utilization=0.05, enable_prefix_caching=False,
        compilation_config={"cudagraph_capture_sizes": captured}, disable_log_stats=True, **ranks,
        **profiled, **BACKENDS[name][0],
    )  # fmt: skip
    vocabulary = 100_000

    def prompt(length: int, seed: int) -> dict[str, list[int]]:
        return {"prompt_token_ids": [(7919 * i + 104729 * seed) % vocabulary + 2 for i in range(length)]}

    def generate(prompts: Sequence[Any], **parameters: Any) -> tuple[float, Any]:
        sampling = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, **parameters)
        began = time.perf_counter()
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - began, outputs

    def step(count: int) -> float:
        """Median seconds between two steps that each gave every sequence a token."""
        sampling = SamplingParams(
            temperature=0, ignore_eos=True, detokenize=False, max_tokens=options["new_tokens"],
            output_kind=RequestOutputKind.DELTA,
        )  # fmt: skip
        for seed in range(count):
            llm.llm_engine.add_request(str(seed), prompt(SHORT_PROMPT, seed), sampling)
        given = []
        while llm.llm_engine.has_unfinished_requests():
            outputs = llm.llm_engine.step()
            given.append((time.perf_counter(), len(outputs)))
        pairs = [(before, after) for before, after in pairwise(given) if before[1] == after[1] == count]
        return statistics.median(after[0] - before[0] for before, after in pairs)

    def prefill() -> float:
        return generate([prompt(PROMPT, seed) for seed in range(PROMPTS)], max_tokens=1)[0]

    def measure(figure: str) -> Any:
        if figure == PREFILL:
            return PROMPT * PROMPTS / prefill()
        if figure != PROFILE:
            return 1e3 * step(int(figure))
        llm.start_profile()
        prefill()
        llm.stop_profile()
        return summarize(Path(traces))

    def send(result: Any) -> None:
        channel.write(json.dumps(result) + "\n")
        channel.flush()

    tokens = prompt(COMPARED, 1)
    [output] = generate([tokens], max_tokens=1, prompt_logprobs=1)[1]
    rows = zip(output.prompt_logprobs[1:], tokens["prompt_token_ids"][1:], strict=True)
    logprobs = [row[token].logprob for row, token in rows]
    prefill()
    for count in SEQUENCES:
        step(count)  # compiles the rest
    send({"ready_s": time.monotonic() - started, "logprobs": logprobs})
    for line in sys.stdin:
        send(measure(line.strip()))


def profiler_config(folder: str) -> dict[str, Any]:
    """Of vLLM's: kernels alone are recorded, which slows the host least."""
    return {
        "profiler": "torch",
        "torch_profiler_dir": folder,
        "torch_profiler_activities": ["CUDA"],
        "torch_profiler_with_stack": False,
        "torch_profiler_dump_cuda_time_total": False,
    }


def summarize(folder: Path) -> dict[str, Any]:
    """What the newest trace in a folder says about the GPU; times in milliseconds, of all prompts.

    span: from the first kernel to the end of the last; busy: part of it in which a kernel ran; largest: by time.
    """
    path = max(folder.rglob("*.json*"), key=lambda each: each.stat().st_mtime)
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    kernels = [event for event in json.loads(text)["traceEvents"] if event.get("cat") == "kernel"]
    kernels.sort(key=lambda kernel: kernel["ts"])
    busy = end = 0.0
    by_name: dict[str, float] = {}
    for kernel in kernels:
        last = kernel["ts"] + kernel["dur"]
        busy += max(last - max(kernel["ts"], end), 0.0)
        end = max(end, last)
        by_name[kernel["name"][:100]] = by_name.get(kernel["name"][:100], 0.0) + kernel["dur"] / 1e3
    span = end - kernels[0]["ts"]
    largest = sorted(by_name.items(), key=lambda item: -item[1])[:_LARGEST]
    return {
        "span_ms": round(span / 1e3, 3),
        "busy": round(busy / span, 4),
        "kernels": len(kernels),
        "largest_ms": {name: round(ms, 3) for name, ms in largest},
    }


if __name__ == "__main__":
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]), json.loads(sys.argv[4]))
