"""Record, with Quark's own functions, which quantization config each module gets.

Writes cases.json beside this file, which is kept compressed: `xz -9e --check=sha256 cases.json`. The tests compare the project's resolver with it; Quark itself is not needed then.
Run in a virtual environment with amd-quark 0.13 (`pip install torch==2.13.0 amd-quark==0.13 transformers accelerate`):

    python make_cases.py [--old-python /path/to/venv-with-0.11.1/bin/python]

`--old-python` runs the same cases under amd-quark 0.11.1 (with transformers 4.57.6) and records where it differs.

What is called, per case:
  loader  QConfig.from_dict(quantization_config), then get_layer_quant_config(config, type(module), name): how an exported
          config.json is read back, by Quark and by transformers
  f2f     _get_layer_quant_config_by_tensor_name(name + ".weight", config[, tensor]): file-to-file quantization
  eager   setup_config_per_layer + setup_kv_cache_config on {name: module}: in-memory quantization

cases.json:
  {"quark": "0.13", "layer_config": {...}, "groups": [GROUP, ...]}
  GROUP = {"note": str, "exclude": [pattern, ...], "layers": [key, ...] (keys of layer_quant_config, in order),
           "types": [name, ...] (keys of layer_type_quant_config), "kv": [key, ...] (keys of kv_cache_quant_config),
           "cases": [CASE, ...]}
  CASE  = [name, module type, OUTCOME] or [name, module type, {"loader": OUTCOME, "f2f": ..., "eager": ..., "eager 0.11.1": ...}]
          the short form when every flow of every version says the same; a flow that could not run is absent
  OUTCOME:
    "excluded"     matched by exclude: kept as it is
    "global"       global_quant_config
    "layer:KEY"    layer_quant_config[KEY]
    "type:NAME"    layer_type_quant_config[NAME]
    "kv:KEY"       kv_cache_quant_config[KEY]
    "output-only"  excluded, but the output is quantized for the KV cache: weight and input stay as they are
    "none"         not a candidate (not a layer that this flow quantizes)
Every config used is `layer_config`, so that only identity tells which one was chosen.
"""
import argparse, copy, fnmatch, importlib.abc, importlib.machinery, importlib.util, json, os, pathlib, random, re, subprocess, sys, tempfile, types
from unittest.mock import MagicMock


class _FxStubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Quark 0.11.1 imports two packages for its FX graph mode (not used here) that torch 2.10 removed."""

    def find_spec(self, name, path=None, target=None):
        if (name + ".").startswith(("torch.ao.quantization.pt2e.", "torch.ao.quantization.quantizer.")):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda attribute: MagicMock(name=attribute)
        return module

    def exec_module(self, module):
        pass


SPEC = {"dtype": "int8", "is_dynamic": False, "qscheme": "per_channel", "ch_axis": 0, "group_size": None, "symmetric": True,
        "round_method": "half_even", "scale_type": "float", "scale_format": None, "scale_calculation_mode": None,
        "mx_element_dtype": None, "observer_cls": "PerChannelMinMaxObserver", "is_scale_quant": False}
LAYER = {"weight": SPEC, "input_tensors": {**SPEC, "is_dynamic": True, "ch_axis": 1}, "output_tensors": None, "bias": None,
         "target_device": None}

ATTENTION = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1, 10) for p in "qkvo"]
EXPERTS = [f"model.layers.{i}.mlp.experts.{e}.{p}_proj" for i in (0, 1, 11) for e in (0, 1, 12) for p in ("gate", "up", "down")]
MIXTRAL = [f"model.layers.0.block_sparse_moe.experts.{e}.{w}" for e in (0, 3) for w in ("w1", "w2", "w3")]
OTHER = ["lm_head", "model.lm_head", "language_model.lm_head", "model.embed_tokens", "model.norm", "model.layers.0.mlp.gate",
         "model.layers.0.mlp.gate.linear", "model.layers.1.mlp.gate", "model.layers.0.mlp.gate_proj", "model.layers.0.mlp.shared_expert_gate",
         "model.layers.0.mlp.shared_expert.down_proj", "model.layers.1.mlp.shared_experts.gate_proj", "model.layers.0.input_layernorm",
         "model.layers.0.block_sparse_moe.gate", "model.layers.2.eh_proj", "model.layers.2.enorm", "model.layers.2.shared_head.head",
         "model.layers.2.shared_head.norm", "mtp.layers.0.self_attn.q_proj", "mtp.fc", "model.visual.blocks.0.attn.qkv",
         "model.visual.patch_embed.proj", "model.visual.merger.linear_fc1", "MODEL.LAYERS.0.SELF_ATTN.Q_PROJ", "Model.layers.0.mlp.gate"]
WRAPPED = [f"model.language_model.layers.{i}.{m}" for i in (0, 1) for m in ("self_attn.q_proj", "mlp.experts.0.down_proj", "mlp.gate", "linear_attn.in_proj_qkvz")] \
        + [f"language_model.model.layers.0.{m}" for m in ("self_attn.q_proj", "mlp.experts.0.down_proj", "mlp.gate")] + ["thinker.model.layers.0.mlp.experts.0.up_proj"]
NAMES = ATTENTION + EXPERTS + MIXTRAL + OTHER + WRAPPED

EXCLUDES = ["lm_head", "*lm_head", "*lm_head*", "*.gate", "*mlp.gate", "*mlp.gate*", "*.mlp.gate.*", "*self_attn*", "*self_attn.*", "model.layers.0.*",
            "model.layers.0", "model.layers.1*", "*layers.1.*", "*.layers.[01].*", "*.layers.[!0].*", "model.layers.?.self_attn.q_proj",
            "model.layers.??.self_attn.q_proj", "*.experts.[0-2].*", "*.experts.1?.*", "*.experts.0.down_proj", "*experts*", "*.w[13]", "model.*", "*",
            "", "MODEL.layers.0.*", "*SELF_ATTN*", "*.GATE", "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj.weight", "*q_proj.weight",
            "q_proj", "self_attn", "layers.0.self_attn.q_proj", "model.layers.0.self_attn", "model.layers.0.self_attn.", "re:.*lm_head", "re:.*self_attn.*",
            "re:model\\.layers\\.0\\..*", "re:lm_head", "re:*lm_head", "re:.*", "*:lm_head", "model.layers.[0.mlp.gate", "*.layers.[0", "*shared_expert_gate*", "*shared_expert.*",
            "*shared_expert*", "mtp.*", "*mtp*", "model.visual.*", "*visual*", "*embed*", "*norm", "model.language_model.*", "language_model.*", "^lm_head$", "lm_head$",
            "model\\.layers\\.0\\..*", "(lm_head|mlp)", "*.mlp.experts.*.{up,down}_proj", " lm_head", "lm_head ", "lm_head\n"]
LAYERS = ["*", "*experts*", "*.experts.*", "*.mlp.experts.*.down_proj", "*down_proj", "*_proj", "*self_attn*", "*self_attn.q_proj", "*q_proj", "*[qk]_proj", "*.[!v]_proj",
          "model.layers.0.*", "model.layers.1*", "*.layers.?.*", "model.layers.0.self_attn.q_proj", "model.layers.1.mlp.experts.0.down_proj", "*.experts.[01].*", "re:.*experts.*",
          "*shared_expert*", "*w[123]", "*w1", "self_attn", "*SELF_ATTN*", "lm_head", "*lm_head", "model.layers.0", "model.language_model.*", "*layers.0*", "mtp.*"]
TYPES = ["Linear", "Conv2d", "ConvTranspose2d"]


def groups():
    """[note, exclude, layers, types, kv, [(name, type)]]"""
    out = []
    rng = random.Random(20240)

    def add(note, exclude=(), layers=(), types=(), kv=(), cases=()):
        out.append([note, list(exclude), list(layers), list(types), list(kv), [c if isinstance(c, tuple) else (c, "Linear") for c in cases]])

    def near(patterns, count):
        """Some names that a pattern matches, then names that share a word with one, then others: most cases are close calls."""
        words = [w for w in re.split(r"\W+", " ".join(patterns)) if len(w) > 1 and w not in ("re", "model", "layers")]
        hit = [n for n in NAMES if any(fnmatch.fnmatchcase(n, p) for p in patterns)]
        close = [n for n in NAMES if n not in hit and any(w.lower() in n.lower() for w in words)]
        pick = rng.sample(hit, min(len(hit), count // 2))
        for pool in (close, [n for n in NAMES if n not in close]):
            pool = [n for n in pool if n not in pick]
            pick += rng.sample(pool, min(len(pool), max(0, count - (pool is close) - len(pick))))
        return pick[:count]

    add("nothing set: everything by global", cases=NAMES[::5])
    for pattern in EXCLUDES:
        add("exclude, one pattern", [pattern], cases=near([pattern], 7))
    for pattern in LAYERS:
        add("layer_quant_config, one key", layers=[pattern], cases=near([pattern], 6))
    for _ in range(28):
        layers = rng.sample(LAYERS, rng.choice((2, 3, 4)))
        add("overlapping layer_quant_config keys", layers=layers, cases=near(layers, 7))
    for _ in range(16):
        exclude, layers = rng.sample(EXCLUDES, rng.choice((1, 2, 3))), rng.sample(LAYERS, rng.choice((1, 2, 3)))
        add("exclude and layer_quant_config", exclude, layers, cases=near(exclude + layers, 7))
    q = "model.layers.0.self_attn.q_proj"
    add("an exact key after a pattern that matches too", layers=["*self_attn*", q], cases=[q, "model.layers.1.self_attn.q_proj"])
    add("an exact key before a pattern", layers=[q, "*self_attn*"], cases=[q, "model.layers.1.self_attn.q_proj"])
    add("an exact key last of three", layers=["*q_proj", "*", q], cases=[q, "model.layers.0.self_attn.k_proj"])
    add("an exact key that is excluded", [q], layers=[q, "*self_attn*"], cases=[q, "model.layers.1.self_attn.q_proj"])
    add("a name with brackets as an exact key", layers=["*", "model.blocks[0].fc"], cases=["model.blocks[0].fc", "model.blocks0.fc"])
    add("a name with brackets as an exclude", ["model.blocks[0].fc"], cases=["model.blocks[0].fc", "model.blocks0.fc"])
    add("escaped brackets", ["model.blocks[[]0].fc"], cases=["model.blocks[0].fc", "model.blocks0.fc"])
    kinds = [(n, t) for n in ("model.layers.0.self_attn.q_proj", "model.visual.patch_proj", "model.tokens", "lm_head") for t in
             ("Linear", "LinearSubclass", "Conv2d", "ConvTranspose2d", "Embedding", "EmbeddingBag", "LayerNorm", "Conv1d")]
    for types_ in ((), ("Linear",), ("Conv2d",), ("Conv2d", "Linear"), tuple(TYPES)):
        add("layer types", types=types_, cases=kinds)
    add("layer types and keys", layers=["*q_proj"], types=["Linear"], cases=kinds)
    add("layer types, keys and exclude", ["lm_head"], layers=["*q_proj", "lm_head"], types=["Linear"], cases=kinds)
    add("every module by key", layers=["*"], cases=kinds)
    add("names that file-to-file passes over", layers=["*"], cases=["model.embed_tokens", "model.norm", "model.layers.0.input_layernorm", "model.layers.2.enorm", "model.layers.0.self_attn.q_norm",
        "model.visual.patch_embed.proj", "embedding", "model.vision_embedder.fc", "model.Embed.fc", "model.norm.fc", "model.Norm", "model.layernorm1", "model.normalizer", "weight", "fc"])
    kv = ["*k_proj", "*v_proj"]
    attention = [f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qkv"]
    for exclude, layers in (([], kv), (["*self_attn*"], []), (["model.layers.0.*"], kv), ([], ["*self_attn*"] + kv), (["*v_proj"], ["*q_proj"])):
        # one module at a time: Quark blanks the shared kv entry when it meets an excluded module
        add("KV cache", exclude, layers, kv=kv, cases=attention)
    add("KV cache, overlapping keys", kv=["*_proj", "*k_proj", "*self_attn.v_proj"], cases=attention)
    return out


def record(path):
    if importlib.util.find_spec("torch.ao.quantization.pt2e") is None:
        sys.meta_path.append(_FxStubs())
    import torch
    from torch import nn
    from importlib.metadata import version
    from quark.torch.export.main_export.quant_config_parser import get_layer_quant_config
    from quark.torch.quantization import file2file_quantization as f2f, model_transformation as transformation
    from quark.torch.quantization.config.config import QConfig

    new = not version("amd-quark").startswith("0.11")

    class LinearSubclass(nn.Linear):
        pass

    modules = {"Linear": nn.Linear(2, 2), "LinearSubclass": LinearSubclass(2, 2), "Conv2d": nn.Conv2d(2, 2, 1), "ConvTranspose2d": nn.ConvTranspose2d(2, 2, 1),
               "Embedding": nn.Embedding(2, 2), "EmbeddingBag": nn.EmbeddingBag(2, 2), "LayerNorm": nn.LayerNorm(2), "Conv1d": nn.Conv1d(2, 2, 1)}

    def build(group):
        _, exclude, layers, types_, kv, _ = group
        return QConfig.from_dict({"global_quant_config": copy.deepcopy(LAYER), "exclude": list(exclude), "algo_config": None, "softmax_quant_spec": None, "quant_method": "quark",
                                  "layer_type_quant_config": {t: copy.deepcopy(LAYER) for t in types_}, "layer_quant_config": {k: copy.deepcopy(LAYER) for k in layers},
                                  "kv_cache_quant_config": {k: copy.deepcopy(LAYER) for k in kv}, "kv_cache_post_rope": False, "quant_mode": "eager_mode", "version": version("amd-quark")})

    def which(config, chosen, absent):
        if chosen is None:
            return absent
        if chosen is config.global_quant_config:
            return "global"
        for key, value in config.layer_quant_config.items():
            if value is chosen:
                return f"layer:{key}"
        for key, value in config.layer_type_quant_config.items():
            if value is chosen:
                return f"type:{key.__name__}"
        for key, value in config.kv_cache_quant_config.items():
            if value is chosen:
                return "output-only" if value.weight is None else f"kv:{key}"
        assert chosen.weight is None and chosen.input_tensors is None
        return "output-only"

    answers = []
    for group in groups():
        for name, kind in group[-1]:
            module, answer = modules[kind], {}
            # read back: a type that get_layer_quant_config never answers for is distinguished from an excluded one by a lookup without exclude
            config = build(group)
            chosen = get_layer_quant_config(config, type(module), name)
            bare = build(group[:1] + [[]] + group[2:])
            candidate = get_layer_quant_config(bare, type(module), name) is not None
            answer["loader"] = which(config, chosen, "excluded" if candidate else "none")
            if kind == "Linear":
                config, tensor_name = build(group), name + ".weight"
                extra = (torch.empty(2, 2),) if new else ()
                candidate = f2f._is_linear_weight_tensor(tensor_name)
                answer["f2f"] = which(config, f2f._get_layer_quant_config_by_tensor_name(tensor_name, config, *extra), "excluded" if candidate else "none")
            config, chosen = build(group), {}
            transformation.setup_config_per_layer(config, {name: module}, chosen)
            excluded = name in config.exclude
            transformation.setup_kv_cache_config(config, {name: module}, chosen)
            answer["eager"] = which(config, chosen.get(name), "excluded" if excluded else "none")
            answers.append(answer)
    json.dump(answers, open(path, "w"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old-python")
    parser.add_argument("--record", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.record:
        return record(arguments.record)
    with tempfile.TemporaryDirectory() as folder:
        def run(python):
            path = os.path.join(folder, "answers.json")
            subprocess.run([python, __file__, "--record", path], check=True, stdout=subprocess.DEVNULL)
            return json.load(open(path))
        new = run(sys.executable)
        old = run(arguments.old_python) if arguments.old_python else [{} for _ in new]
    answers, lines, count = iter(zip(new, old)), [], 0
    for note, exclude, layers, types_, kv, cases in groups():
        rows = []
        for (name, kind), (answer, before) in zip(cases, answers):
            answer = dict(answer, **{f"{flow} 0.11.1": value for flow, value in before.items() if value != answer[flow]})
            values = set(answer.values())
            rows.append([name, kind, values.pop() if len(values) == 1 else answer])
            count += 1
        lines.append(json.dumps({"note": note, "exclude": exclude, "layers": layers, "types": types_, "kv": kv, "cases": rows}, separators=(",", ":")))
    head = json.dumps({"quark": "0.13", "compared_with": "0.11.1" if arguments.old_python else None, "layer_config": LAYER}, separators=(",", ":"))
    out = pathlib.Path(__file__).with_name("cases.json")
    out.write_text(head[:-1] + ',"groups":[\n' + ",\n".join(lines) + "\n]}\n")
    print(f"{out}: {len(lines)} groups, {count} cases, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
