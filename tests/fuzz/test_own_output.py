"""What convert wrote, verify accepts: real exports of every family, varied, to every target.

Variants are layers whose experts stay in float, other linears in float, layers of multi-token prediction in every
layout and under every ``--mtp``, linears and parts of an attention in FP8, scales of the key-value cache and embeddings
in int8. A few in the suite, a thousand with ``make fuzz`` (HYPOTHESIS_EXAMPLES).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_args

import torch
from hypothesis import event, example, given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.checkpoints import Tensors
from support.exports import DATA, int8_families

import quarkconv
from quarkconv.description.description import describe
from quarkconv.targets import TARGETS

from .test_round_trips import FUZZ, scratch

FAMILIES: Final = DATA / "families"
NAMES: Final = int8_families()
Mtp = Literal[
    "none", "own module", "own module, fused", "own module, FP8", "last layer", "last layer, int8", "last layer, fused",
    "last layer, FP8",
]  # fmt: skip
Beside = Literal["nothing", "FP8", "FP8 attention", "cache scales", "int8 embeddings"]
Names = Literal["usual", "quantizer", "blocks"]
_LAYER: Final = re.compile(r"^(.*?(?:layers|blocks)\.)(\d+)\.")


@dataclass(frozen=True)
class Variant:
    """A family's export, changed.

    Attributes:
        export: the export.
        experts_float: a copy of its MoE layer has experts in float; ``declared``: not excluded by the config.
        linears_float: the other linears are in float, and the config does not say so.
        mtp: how a layer of multi-token prediction is stored.
        beside: what is stored beside the layers' own linears.
        names: whether scales are named after the quantizer, or as those of blocks are.
    """

    export: str
    experts_float: Literal["no", "excluded", "declared"] = "no"
    linears_float: bool = False
    mtp: Mtp = "none"
    beside: Beside = "nothing"
    names: Names = "usual"

    def write(self, folder: Path) -> Path:
        """Write the checkpoint; returns ``folder``."""
        tensors = load_file(FAMILIES / self.export / "model.safetensors")
        config = json.loads((FAMILIES / self.export / "config.json").read_text())
        layer = describe(FAMILIES / self.export).int8_layers[-1]
        found = _LAYER.match(layer.prefix)
        assert found is not None
        stack, number = found[1], int(found[2])
        excluded: list[str] = config["quantization_config"]["exclude"]
        if self.linears_float:
            to_float(tensors, lambda name: not name.startswith(f"{layer.prefix}."))
        count = 1 + max(int(other[2]) for name in tensors if (other := _LAYER.match(name)) and other[1] == stack)
        original = {name: value for name, value in tensors.items() if name.startswith(f"{stack}{number}.")}
        if self.experts_float != "no":
            added = renamed(original, f"{stack}{number}.", f"{stack}{count}.")
            to_float(added, lambda name: ".experts." in name)
            tensors |= added
            if self.experts_float == "excluded":
                excluded.append(f"{layer.prefix.replace(f'{stack}{number}.', f'{stack}{count}.')}.*")
            count += 1
        if self.mtp != "none":
            config_part(config)["num_nextn_predict_layers"] = 1
            prefix = "mtp.layers.0." if self.mtp.startswith("own") else f"{stack}{count}."
            added = renamed(original, f"{stack}{number}.", prefix)
            if "int8" not in self.mtp:
                to_float(added, lambda _: True)
            if "fused" in self.mtp:
                fuse(added)
            if "FP8" in self.mtp:
                to_fp8(added)
            tensors |= added
        add_beside(tensors, f"{stack}{number}.self_attn", self.beside)
        for key in ("num_hidden_layers", "n_layers", "num_layers"):
            if key in config_part(config):
                config_part(config)[key] = count
        rename_scales(tensors, self.names)
        folder.mkdir()
        save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return folder


def config_part(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json about the language model."""
    part: dict[str, Any] = config.get("text_config", config)
    return part


def renamed(tensors: Tensors, old: str, new: str) -> Tensors:
    return {new + name.removeprefix(old): value.clone() for name, value in tensors.items()}


def to_float(tensors: Tensors, concerned: Any) -> None:
    """Store int8 linears as BF16, without scales."""
    for name in [name for name in tensors if name.endswith(".weight") and concerned(name)]:
        if tensors[name].dtype == torch.int8:
            module = name.removesuffix(".weight")
            scale = tensors.pop(f"{name}_scale").float()
            tensors.pop(f"{module}.weight_zero_point", None)
            tensors[name] = (tensors[name].float() * scale.reshape(-1, 1)).bfloat16()


def to_fp8(tensors: Tensors) -> None:
    """Store the float experts of a layer in FP8, with scales of blocks."""
    for name in [name for name in tensors if ".experts." in name and name.endswith(".weight")]:
        tensors[f"{name}_scale_inv"] = torch.full([-(-size // 128) for size in tensors[name].shape], 0.5)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)


def rename_scales(tensors: Tensors, names: Names) -> None:
    """Give the scales of int8 weights the names that some tools write."""
    for name in [name for name in tensors if name.endswith(".weight_scale")]:
        weight = tensors[name.removesuffix("_scale")]
        if names == "quantizer":
            tensors[name.replace(".weight_scale", ".weight_quantizer.scale")] = tensors.pop(name)
        elif names == "blocks" and weight.dtype == torch.int8 and tensors[name].numel() in (1, len(weight)):
            scale = tensors.pop(name)
            tensors[f"{name}_inv"] = scale.reshape(-1, 1) if scale.numel() > 1 else scale.reshape(())


def add_beside(tensors: Tensors, attention: str, what: Beside) -> None:
    """Add a linear in FP8 or scales of the cache to an attention, or store the embeddings in int8."""
    if what == "FP8":
        tensors[f"{attention}.added_proj.weight"] = torch.rand(200, 130).to(torch.float8_e4m3fn)
        tensors[f"{attention}.added_proj.weight_scale_inv"] = torch.rand(2, 2) + 0.5
    own = [name for name in tensors if name.startswith(f"{attention}.") and name.endswith("_proj.weight")]
    for name in sorted(own)[:2] if what == "FP8 attention" else []:  # of q, k and v, one stays as it is
        if tensors[name].dtype == torch.int8:
            del tensors[f"{name}_scale"]
            tensors.pop(name.replace(".weight", ".weight_zero_point"), None)
        tensors[f"{name}_scale_inv"] = torch.full([-(-size // 128) for size in tensors[name].shape], 0.5)
        tensors[name] = tensors[name].float().to(torch.float8_e4m3fn)
    if what == "cache scales":
        tensors |= {f"{attention}.attn.{part}_scale": torch.tensor(0.5) for part in "kv"}
    for name in [name for name in tensors if name.endswith("embed_tokens.weight")]:
        if what == "int8 embeddings" and tensors[name].is_floating_point():
            scale = tensors[name].float().abs().amax(1).clamp(min=1e-3) / 127
            tensors[name] = (tensors[name].float() / scale[:, None]).round().to(torch.int8)
            tensors[f"{name}_scale"] = scale


def fuse(tensors: Tensors) -> None:
    """Store the float experts of a layer in two tensors, where they are named as engines fuse them."""
    first = "experts.0.gate_proj.weight"
    heads = {name.removesuffix(".0.gate_proj.weight") for name in tensors if name.endswith(first)}
    for head in heads:
        experts = range(sum(name.startswith(f"{head}.") and name.endswith("gate_proj.weight") for name in tensors))
        parts = {
            leaf: torch.stack([tensors.pop(f"{head}.{expert}.{leaf}.weight") for expert in experts])
            for leaf in ("gate_proj", "up_proj", "down_proj")
        }
        tensors[f"{head}.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
        tensors[f"{head}.down_proj"] = parts["down_proj"]


VARIANTS: Final = st.builds(
    Variant,
    export=st.sampled_from(NAMES),
    experts_float=st.sampled_from(["no", "no", "excluded", "declared"]),
    linears_float=st.booleans(),
    mtp=st.sampled_from(get_args(Mtp)),
    beside=st.sampled_from(get_args(Beside)),
    names=st.sampled_from(["usual", "usual", "usual", "quantizer", "blocks"]),
)


@FUZZ
@given(variant=VARIANTS, to=st.sampled_from(sorted(TARGETS)), mtp=st.sampled_from(["keep", "drop", "quantize"]))
@example(Variant("qwen3_5_moe-0.13-f2f", mtp="own module, fused"), "w8a8-int8", "keep")
@example(Variant("qwen3_5_moe-0.13-f2f", mtp="own module, fused"), "quark", "keep")
@example(Variant("deepseek_v3-0.13-f2f", mtp="last layer, FP8", beside="FP8"), "fused-int8", "keep")
@example(Variant("minimax_m2-0.13-f2f", mtp="own module, FP8", beside="cache scales"), "compressed-tensors", "keep")
@example(Variant("glm4_moe-0.13-f2f", linears_float=True, beside="FP8 attention"), "compressed-tensors", "keep")
@example(Variant("gpt_oss-0.13-eager", experts_float="excluded", beside="int8 embeddings"), "ascend", "keep")
def test_verify_accepts_what_convert_wrote(variant: Variant, to: str, mtp: str) -> None:
    with scratch() as folder:
        source = variant.write(folder / "source")
        try:
            output = quarkconv.convert_checkpoint(source, to, folder / "out", mtp=mtp).output
        except quarkconv.UnsupportedError as error:
            event(f"refused: {error.message[:60]}")
            assert not (folder / "out").exists()
            return
        event(f"{to}: converted")
        for against in (None, source):
            result = quarkconv.verify_checkpoint(output, against, device="cpu", tokens=4)
            assert result.problems == (), (variant, to, mtp, result.problems)
        if to != "bf16":
            assert quarkconv.inspect_checkpoint(output).ok
