"""Log-probabilities of a text's tokens in vLLM, for `benchmarks/evaluate_vllm.py` to compare with `quarkconv evaluate`.

    python prompt_logprobs.py OUT NAME=CHECKPOINT... [--windows 8] [--window 256] [--llm '{"tensor_parallel_size": 2}']

Needs vLLM and a GPU, and quarkconv for QUARKCONV_VLLM=1 only. The windows are those of `quarkconv evaluate
examples/tiny_moe/... --text examples/tiny_moe/heldout.txt`. Writes OUT/NAME.safetensors for each checkpoint:
``token_ids`` int64 [W, L], and ``log_probabilities`` float32 [W, L - 1, V], position i for the token after i; in its
metadata the versions.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny_moe"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("checkpoints", nargs="+", metavar="NAME=CHECKPOINT")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--llm", type=json.loads, default={}, metavar="JSON", help="more arguments of vLLM's LLM")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer.from_file(str(EXAMPLE / "quark-ptpc_int8" / "tokenizer.json"))
    ids = tokenizer.encode((EXAMPLE / "heldout.txt").read_text("utf-8")).ids
    windows = torch.tensor(ids[: options.windows * options.window]).reshape(options.windows, options.window)
    for item in options.checkpoints:
        name, _, path = item.partition("=")
        started = time.perf_counter()
        found, about = log_probabilities(path, windows, options.llm)
        file = options.out / f"{name}.safetensors"
        save_file({"token_ids": windows, "log_probabilities": found}, file, metadata=about)
        nll = -found.gather(2, windows[:, 1:, None]).double().mean().item()
        print(f"{name}: {nll:.5f} nats a token, {time.perf_counter() - started:.0f} s, {json.dumps(about)}", flush=True)


def log_probabilities(path: str, windows: torch.Tensor, more: dict[str, Any]) -> tuple[torch.Tensor, dict[str, str]]:
    """Prompt log-probabilities [W, L - 1, V] of windows int64 [W, L], and what served them.

    more  arguments of vLLM's LLM beside those that each run has
    """
    import vllm

    vocabulary = int(json.loads((Path(path) / "config.json").read_text())["vocab_size"])
    engine = vllm.LLM(
        model=path, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=windows.shape[1] + 8, seed=0,
        enforce_eager=True, gpu_memory_utilization=0.02, kv_cache_memory_bytes=1 << 27, max_logprobs=vocabulary,
        enable_prefix_caching=False, disable_log_stats=True, **more,
    )  # fmt: skip
    sampling = vllm.SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=vocabulary, detokenize=False)
    found = torch.full((len(windows), windows.shape[1] - 1, vocabulary), float("nan"))
    for number, window in enumerate(windows.tolist()):
        (answer,) = engine.generate([{"prompt_token_ids": window}], sampling, use_tqdm=False)
        for position, row in enumerate(answer.prompt_logprobs[1:]):
            found[number, position, list(row)] = torch.tensor([entry.logprob for entry in row.values()])
    if bool(found.isnan().any()):
        raise SystemExit(f"vLLM left out log-probabilities of {path}")
    del engine
    gc.collect()
    torch.cuda.empty_cache()
    about = {"vllm": vllm.__version__, "torch": torch.__version__, "device": torch.cuda.get_device_name()}
    return found, about


if __name__ == "__main__":
    main()
