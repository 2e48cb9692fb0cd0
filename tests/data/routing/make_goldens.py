"""Make the goldens of this folder: what each family's own code routes to and computes.

    goldens.json, goldens.safetensors    what the MoE block hands to its experts; the block runs whole, with its experts
                                         replaced by a recorder, so that all between router and experts counts
    experts.json, experts.safetensors    what the experts class makes of given tokens, experts and weights

Run beside its output with torch 2.13.0, transformers 5.24.0 and the unpacked sources of vLLM 0.33.0 and SGLang 0.5.23:

    python make_goldens.py /tmp/src/vllm /tmp/src/sglang

The two engines are not imported: the functions named below are taken out of their files and run.
Routing is float32 (ids int64); experts compute in float64 with weights and tokens that bfloat16 holds. All is random
from fixed seeds.
"""

import ast
import importlib
import json
import math
import os
import sys
import tempfile
import types
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: a kernel is run below, without a GPU

import torch
import torch.nn.functional as F
import transformers
from golden_specs import ENGINES, EXPERTS, HIDDEN, ROUTING
from safetensors.torch import save_file
from torch import nn

TOKENS = 12
HERE = Path(__file__).parent

# transformers.logging goes to stderr; this keeps advice about fast kernels out of it.
transformers.logging.set_verbosity_error()


class Recorder(nn.Module):
    """Stands for the experts; keeps the routing that it is called with."""

    def forward(self, hidden_states, topk_ids=None, topk_weights=None):
        self.hidden_states, self.topk_ids, self.topk_weights = hidden_states, topk_ids, topk_weights
        return torch.zeros_like(hidden_states)


def taken_out(path, name, scope):
    """A function or class of a file, without its decorators, run in a scope of its own."""
    tree = ast.parse(Path(path).read_text())
    node = next(node for node in tree.body if getattr(node, "name", None) == name)
    node.decorator_list = []
    module = ast.Module([ast.parse("from __future__ import annotations").body[0], node], [])
    exec(compile(module, str(path), "exec"), scope)
    return scope[name]


def boring_keys():
    """What every config of transformers says."""
    return set(json.loads(transformers.PreTrainedConfig().to_json_string(use_diff=False)))


def built(spec, seed):
    """(config, block in float32, config.json) of a case."""
    torch.manual_seed(seed)
    home = f"transformers.models.{spec['module']}"
    config = getattr(importlib.import_module(f"{home}.configuration_{spec['module']}"), spec["config"])
    config = config(**spec["settings"])
    block_type = getattr(importlib.import_module(f"{home}.modeling_{spec['module']}"), spec["block"])
    block = block_type(*([config] if "layer" not in spec else [config, spec["layer"]])).float().eval()
    written = json.loads(config.to_json_string(use_diff=False))
    keep = {"model_type", "architectures"}
    dull = boring_keys()
    written = {key: value for key, value in written.items() if key in keep or key not in dull}
    written = {key: value for key, value in written.items() if value is not None}
    return config, block, spec.get("published", lambda same: same)(written)


def route_block(name, spec, seed):
    """Tensors and config.json of a case of transformers."""
    config, block, written = built(spec, seed)
    router = block.get_submodule(spec["router"])
    block.experts = Recorder()
    weight = torch.randn(router.weight.shape) * 0.4
    hidden_states = torch.randn(TOKENS, HIDDEN)
    tensors = {"hidden_states": hidden_states, "weight": weight}
    router.weight.data.copy_(weight)
    for key, child in block.named_children():
        if key.startswith("shared"):
            for parameter in child.parameters():
                parameter.data.zero_()
    own = [*block.named_buffers(), *block.named_parameters()]
    for key, bias in own:
        if key.endswith(("e_score_correction_bias", "expert_bias")):
            bias.data.copy_(torch.randn(bias.shape) * 0.3)
            tensors["bias"] = bias.clone()
    if name == "longcat_flash":  # scores of 12 experts are near 1 / 12
        tensors["bias"] *= 0.2
        router_bias = dict(own)["router.e_score_correction_bias"]
        router_bias.data.copy_(tensors["bias"])
    if name == "gpt_oss":
        router.bias.data.copy_(torch.randn(router.bias.shape))
        tensors["logit_bias"] = router.bias.detach().clone()
    if name == "gemma4":
        block.scale.data.copy_(1 + 0.3 * torch.randn(HIDDEN))
        block.per_expert_scale.data.copy_(1 + 0.3 * torch.randn(len(weight)))
        tensors |= {"input_scale": block.scale.detach().clone(), "expert_scale": block.per_expert_scale.detach().clone()}
        router.weight.data.copy_(weight := weight * 10)  # the input is divided by sqrt(H)
        tensors["weight"] = weight
    with torch.no_grad():
        if name == "gemma4":
            _, topk_weights, topk_ids = block(hidden_states)
        else:
            block(hidden_states.unsqueeze(0))
            topk_weights, topk_ids = block.experts.topk_weights, block.experts.topk_ids
    if name == "llama4":  # the experts get every token, times its weight, which is 0 for those that are not chosen
        scores = block.router(hidden_states)[0].detach()
        inputs = block.experts.hidden_states.view(len(weight), TOKENS, HIDDEN)
        assert torch.equal(inputs, scores.T.unsqueeze(-1) * hidden_states)
        topk_weights, topk_ids = scores.topk(config.num_experts_per_tok, dim=-1)
    if "output_scale" in spec:  # that block scales the experts' output, which is the same by linearity
        topk_weights = topk_weights * spec["settings"][spec["output_scale"]]
    tensors |= {"topk_weights": topk_weights, "topk_ids": topk_ids.long()}
    source = f"transformers, {spec['module']}, {spec['block']}"
    return tensors, {"source": source, "experts": len(weight) - written.get("zero_expert_num", 0), "config": written}


def route_engine(name, seed, roots):
    """Tensors and config.json of a case whose routing only an engine has."""
    (engine, file, function), settings, experts, biased, config = ENGINES[name]
    torch.manual_seed(seed)
    weight, hidden_states = torch.randn(experts, HIDDEN) * 0.4, torch.randn(TOKENS, HIDDEN)
    if name == "grok-2":
        weight *= 8  # logits near the cap
    tensors = {"hidden_states": hidden_states, "weight": weight}
    if biased:
        tensors["bias"] = torch.randn(experts) * 0.3
    if name == "grok-2":
        topk_weights, topk_ids = softcapped(Path(roots[engine]) / file, hidden_states, weight, settings["topk"])
    else:
        scope = {"torch": torch, "envs": types.SimpleNamespace(
            VLLM_USE_FUSED_MOE_GROUPED_TOPK=False, VLLM_BATCH_INVARIANT=False)}  # fmt: skip
        run = taken_out(Path(roots[engine]) / file, function, scope)
        logits = F.linear(hidden_states, weight)
        topk_weights, topk_ids = run(hidden_states, logits, e_score_correction_bias=tensors.get("bias"), **settings)
    tensors |= {"topk_weights": topk_weights, "topk_ids": topk_ids.long()}
    return tensors, {"source": f"{engine}, {file}, {function}", "experts": experts, "config": config}


def softcapped(file, hidden_states, weight, topk):
    """SGLang's Triton kernel for Grok, by Triton's interpreter."""
    with tempfile.TemporaryDirectory() as folder:  # an interpreted kernel is read from its file
        text = file.read_text().replace("from sglang.srt.utils import is_hip\n", "is_hip = lambda: False\n")
        Path(folder, "grok_router.py").write_text(text)
        sys.path.insert(0, folder)
        module = importlib.import_module("grok_router")
        return module.fused_moe_router_cudacore(hidden_states, weight, topk, 30.0)


def compute_experts(name, seed):
    """Tensors and config.json of an experts class, in float64."""
    spec = ROUTING[name]
    config, _, written = built(spec, seed)
    home = importlib.import_module(f"transformers.models.{spec['module']}.modeling_{spec['module']}")
    more = {"swiglu_limit": 0.5} if name == "step3p5" else {}
    if name in ("glm5_next", "deepseek_v4", "minimax_m3", "gpt_oss"):
        config.swiglu_limit = written["swiglu_limit"] = 0.75  # tokens below reach it
    config._experts_implementation = "eager"
    experts = getattr(home, EXPERTS[name][0])(config.ffn_config if name == "dbrx" else config, **more).double().eval()
    tensors = {}
    for key, parameter in experts.named_parameters():
        values = (torch.randn(parameter.shape) * 0.4).bfloat16()
        parameter.data.copy_(values)
        tensors[key] = values
    count = written.get("ffn_config", written).get("moe_num_experts") or ROUTED[name]["experts"]
    hidden_states = torch.randn(TOKENS, HIDDEN).bfloat16()
    ids = torch.stack([torch.randperm(count)[:2] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, 2) + 0.25
    with torch.no_grad():
        if name == "llama4":
            scores = torch.zeros(TOKENS, count).scatter(-1, ids, weights).double()
            inputs = (scores.T.unsqueeze(-1) * hidden_states.double()).reshape(-1, HIDDEN)
            output = experts(inputs).view(count, TOKENS, HIDDEN).sum(dim=0)
        else:
            output = experts(hidden_states.double(), ids, weights.double())
    if name == "step3p5":
        written["swiglu_limits"] = [0.5, 0.5]
    tensors |= {"hidden_states": hidden_states, "topk_ids": ids, "topk_weights": weights, "output": output.reshape(TOKENS, HIDDEN)}
    return tensors, {"source": f"transformers, {spec['module']}, {EXPERTS[name][0]}", "what": EXPERTS[name][1],
                     "experts": count, "config": written}  # fmt: skip


def compute_situ(roots):
    """vLLM's SituAndMul, with and without the clip of up."""
    torch.manual_seed(77)
    scope = {"torch": torch, "CustomOp": object}
    situ = taken_out(Path(roots["vllm"]) / "vllm/model_executor/layers/activation.py", "SituAndMul", scope)
    gate_up = (torch.randn(TOKENS, 2 * HIDDEN) * 2).bfloat16().float()
    tensors = {"gate_up": gate_up}
    for key, beta, linear in (("plain", 1.5, None), ("clipped", 1.5, 0.75)):
        one = situ.__new__(situ)
        one.beta, one.linear_beta = beta, linear
        tensors[key] = one.forward_native(gate_up)
    return tensors


def write(stem, tensors, cases):
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "vllm": "0.33.0", "sglang": "0.5.23"}
    save_file({key: value.contiguous() for key, value in tensors.items()}, HERE / f"{stem}.safetensors")
    goldens = json.dumps({"versions": versions, "cases": cases}, sort_keys=True, separators=(",", ":"))
    # A line for each case, to be read in a diff.
    goldens = goldens.replace('{"config":', '\n{"config":')
    (HERE / f"{stem}.json").write_text(goldens + "\n")


ROUTED = {}


def main() -> None:
    roots = {"vllm": sys.argv[1], "sglang": sys.argv[2]}
    tensors = {}
    for number, (name, spec) in enumerate(ROUTING.items()):
        found, ROUTED[name] = route_block(name, spec, 1000 + number)
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
    for number, name in enumerate(ENGINES):
        found, ROUTED[name] = route_engine(name, 2000 + number, roots)
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
    write("goldens", tensors, ROUTED)
    tensors, cases = {}, {}
    for number, name in enumerate(EXPERTS):
        found, cases[name] = compute_experts(name, 3000 + number)
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
    tensors |= {f"situ.{key}": value for key, value in compute_situ(roots).items()}
    write("experts", tensors, cases)
    assert all(math.isfinite(value.double().sum()) for value in tensors.values())


if __name__ == "__main__":
    main()
