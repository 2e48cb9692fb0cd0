"""Serve small exports in every form in SGLang on a GPU, and compare what ran with what the export says.

    python benchmarks/serve/forms_sglang.py OUT.json [EXPORT...] [--forms w8a8-int8,bf16,...] [--options JSON]

As forms.py does for vLLM; the attention of each export is widened to heads of 128, since SGLang's rotary embedding has
a kernel for 64, 128, 256 and 512. Each form is served by an engine of its own, ``--jobs`` at once. ``--options`` are
further arguments of SGLang's Engine, such as ``{"disable_shared_experts_fusion": true}``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from engines.expected import WHOLE, Rank, Stacked
from engines.forward import exact_experts, relative_error
from engines.sglang.exports import prepare
from forms import COMPARED, TOKENS, centered, compare
from support.checkpoints import Tensors, edit_checkpoint
from support.exports import Checkpoints
from watch_sglang import RECORD, watched_scheduler
from watch_sglang import TOKENS as TOKENS_VARIABLE

import quarkconv

FORMS = {"w8a8-int8": None, "compressed-tensors": "w8a8_int8", "quark": None, "fused-int8": None, "bf16": None}
"""Target -> what to give as ``--quantization``."""
EXPORTS = (
    "minimax_m2-quark0.13-f2f",
    "glm4_moe-0.13-f2f-experts_only",
    "glm4_moe-0.13-f2f-mtp_bf16",
    "qwen3_moe-quark0.13-f2f",
    "qwen3_moe-quark0.13-f2f-per_tensor_weight",
    "mixtral-quark0.11-eager",
    "deepseek_v3-quark0.13-f2f",
)
HEAD_DIM = 128
_ATTENTION = re.compile(r"\.self_attn\.(?P<part>[qkvo])_(?:proj|norm)\.(?P<leaf>\w+)$")
_SHARED = {"w13": ("gate_proj", "up_proj"), "w2": ("down_proj",)}


class SharedSlots(Stacked):
    """An export whose shared expert is the last of the routed ones, as SGLang computes it on GPUs for some models."""

    def parameter(self, name: str, rank: Rank, *, dequantized: bool = False) -> torch.Tensor:
        """See :class:`Stacked`; a shared expert in float has its values for codes, and scales of 1."""
        routed = super().parameter(name, rank, dequantized=dequantized)
        experts, _, leaf = name.rpartition(".")
        half, _, kind = leaf.partition("_")
        if half not in _SHARED:
            return routed
        prefix = f"{experts.rpartition('.')[0]}.shared_experts"
        parts = [self._part(f"{prefix}.{part}", kind) for part in _SHARED[half]]
        return torch.cat([routed, torch.cat(parts)[None].to(torch.promote_types(routed.dtype, parts[0].dtype))])

    def _part(self, module: str, kind: str) -> torch.Tensor:
        weight = self.tensors[f"{module}.weight"]
        return self.tensors.get(f"{module}.{kind}", torch.ones(len(weight), 1))


def widen(folder: Path, head_dim: int) -> Path:
    """Repeat each row of a head of q, k and v, and each column of o, so that heads have ``head_dim``.

    Models whose heads have the size that hidden size and number give (mixtral), and those of DeepSeek, are left alone.
    """
    path = folder / "config.json"
    config = json.loads(path.read_text())
    if not config.get("head_dim") or "kv_lora_rank" in config:
        return folder
    times = head_dim // config["head_dim"]

    def repeat(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            match = _ATTENTION.search(name)
            if match is None or tensor.numel() == 1 or (match["part"] == "o" and match["leaf"] != "weight"):
                continue
            tensors[name] = tensor.repeat_interleave(times, 1 if match["part"] == "o" else 0)

    edit_checkpoint(folder, repeat)
    config |= {"head_dim": head_dim} | {key: times * config[key] for key in ("rotary_dim",) if key in config}
    path.write_text(json.dumps(config))
    return folder


def served(folder: Path, options: dict[str, Any], record: Path) -> dict[str, Any]:
    """Serve one checkpoint with SGLang's engine; all log-probabilities of the prompt."""
    from sglang.srt.entrypoints.engine import Engine

    class Watched(Engine):  # type: ignore[misc]
        run_scheduler_process_func = staticmethod(watched_scheduler)

    os.environ |= {RECORD: str(record), TOKENS_VARIABLE: str(TOKENS)}
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    prompt = [(7 * i + 3) % vocabulary for i in range(TOKENS)]
    engine = Watched(
        model_path=str(folder), dtype="bfloat16", skip_tokenizer_init=True, attention_backend="triton",
        sampling_backend="pytorch", disable_cuda_graph=True, log_level="info", disable_radix_cache=True, random_seed=0,
        mem_fraction_static=0.3, max_total_tokens=4096, context_length=128, port=31000 + 20 * (os.getpid() % 900),
        **options,
    )  # fmt: skip
    try:
        output = engine.generate(
            input_ids=prompt, sampling_params={"max_new_tokens": 1, "temperature": 0}, return_logprob=True,
            logprob_start_len=0, top_logprobs_num=vocabulary,
        )  # fmt: skip
    finally:
        engine.shutdown()
    rows = []
    for found in output["meta_info"]["input_top_logprobs"][1:]:
        by_token = {token: value for value, token, *_ in found}
        rows.append([by_token[token] for token in range(vocabulary)])
    return {"logprobs": rows}


def judge(stacked: Stacked, slots: Stacked, record: Path) -> dict[str, Any]:
    """What ran, compared with the export: which parameters are equal bit for bit, and how far outputs are."""
    found = torch.load(record)
    layers = {}
    for name, seen in found["layers"].items():
        source, held = slots if seen["shared_slots"] else stacked, seen["parameters"]
        layer: dict[str, Any] = {"method": seen["method"], "shared_slots": seen["shared_slots"], "equal_to_export": {}}
        if held["w13_weight"].dtype == torch.int8:
            layer["equal_to_export"] = {
                key: torch.equal(held[key], source.parameter(f"{name}.{key}", WHOLE)) for key in COMPARED
            }
            if "call" in seen:
                *given, out = seen["call"]
                for key, int8 in (("to_w8a8", True), ("to_w8a16", False)):
                    expected = exact_experts(source, name, *given, int8=int8) * seen["factor"]
                    layer[key] = relative_error(out, expected)
        layers[name] = layer
    return {"layers": layers, "kernel": found["kernel"], "linear": found["linear"]}


def one(arguments: Sequence[str]) -> None:
    """Serve one checkpoint in this process: FOLDER OPTIONS RECORD OUT."""
    folder, options, record, out = arguments
    Path(out).write_text(json.dumps(served(Path(folder), json.loads(options), Path(record))))


def run(folder: Path, options: dict[str, Any], scratch: Path, seconds: int) -> dict[str, Any]:
    """Serve one checkpoint in a process of its own; what it gave, or the last lines of what it printed."""
    scratch.mkdir(parents=True)
    out, record, log = (scratch / name for name in ("out.json", "record.pt", "log.txt"))
    command = [sys.executable, __file__, "--one", str(folder), json.dumps(options), str(record), str(out)]
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
    if out.exists():
        return json.loads(out.read_text()) | {"record": str(record)}
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if re.match(r"\w*(Error|Exception)\b", line)] or lines[-3:]
    return {"error": " ".join(errors)[-400:]} | ({"record": str(record)} if record.exists() else {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("exports", nargs="*", default=EXPORTS)
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--options", default="{}")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=int, default=240, help="limit for each form")
    parser.add_argument("--keep", type=Path, help="where checkpoints, records and logs stay")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("forms_sglang: needs a GPU, and torch finds none", file=sys.stderr)
        return 4
    head = {
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "sglang": version("sglang"),
        "sglang-kernel": version("sglang-kernel"),
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "options": json.loads(options.options),
    }
    exports: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(options.jobs) as pool:
        scratch = options.keep or Path(temporary)
        checkpoints = Checkpoints(scratch)
        pending = {}
        for name in options.exports:
            source = prepare(checkpoints.copy(name, scratch / "source" / name))
            centered(widen(source, HEAD_DIM))
            for form in options.forms.split(","):
                folder = quarkconv.convert_checkpoint(source, form, scratch / form / name).output
                quantization = {"quantization": FORMS[form]} if FORMS[form] else {}
                given = (folder, quantization | head["options"], scratch / "runs" / name / form, options.seconds)
                pending[name, form] = pool.submit(run, *given)
        for (name, form), future in pending.items():
            source = scratch / "source" / name
            found = future.result()
            record = found.pop("record", None)
            if record:
                found |= judge(Stacked(source), SharedSlots(source), Path(record))
            exports.setdefault(name, {"forms": {}})["forms"][form] = found
            layers = found.get("layers", {})
            print(name, form, found.get("error") or "served", next(iter(layers.values()), {}), flush=True)
            gaps = compare(exports[name]["forms"])
            exports[name]["logprob_differences"] = gaps
            shown = {
                key: value | {"forms": {f: _without(r, "logprobs") for f, r in value["forms"].items()}}
                for key, value in exports.items()
            }
            options.out.write_text(json.dumps(head | {"exports": shown}, indent=1) + "\n")
    return 0


def _without(found: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in found.items() if name != key}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2:])
    else:
        sys.exit(main())
