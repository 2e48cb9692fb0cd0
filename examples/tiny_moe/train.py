"""Train the small qwen3_moe on which the examples evaluate quantization.

    python train.py --text TEXT --out FOLDER

The text is the King James Bible (1611, in the public domain) as Debian's package bible-kjv prints it, without the
numbers of its verses:

    apt-get install bible-kjv
    bible -f 'gen1:1-rev22:21' < /dev/null | sed 's/^[^ ]* //' > kjv.txt

Its last part, the Revelation, is held out and written to ``FOLDER/heldout.txt``. 1.5 million parameters, 4 layers of 8
experts, a vocabulary of 512 byte pairs. The seed is fixed; results differ in the last digits from machine to machine.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

SEED = 20261128
HELD_OUT = "The Revelation of Jesus Christ, which God gave unto him"
WINDOW, BATCH = 256, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(SEED)
    text = options.text.read_text("utf-8")
    end = text.index(HELD_OUT)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "heldout.txt").write_text(text[end:], "utf-8")
    tokenizer = train_tokenizer(text[:end])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(options.out)
    ids = torch.tensor(tokenizer.encode(text[:end]).ids)
    model = make_model().to(options.device)
    train(model, ids, options.steps, options.device)
    held = torch.tensor(tokenizer.encode(text[end:]).ids)
    print(f"held out: {loss_on(model, held, options.device):.4f} nats a token")
    model.to(torch.bfloat16).save_pretrained(options.out)


def train_tokenizer(text: str) -> Tokenizer:
    """Byte pairs, 512 of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def make_model() -> Qwen3MoeForCausalLM:
    """4 layers, hidden 128, 8 experts of 96, 2 of them for each token."""
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=128, intermediate_size=256, moe_intermediate_size=96, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=8, num_experts_per_tok=2,
        norm_topk_prob=True, max_position_embeddings=2048, output_router_logits=True, router_aux_loss_coef=0.01,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config)


def train(model: Qwen3MoeForCausalLM, ids: torch.Tensor, steps: int, device: str) -> None:
    """AdamW with a warm-up and a cosine, on random windows."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 * (1 + math.cos(math.pi * step / steps)) + 0.02)
    )
    started = time.perf_counter()
    for step in range(steps):
        at = torch.randint(len(ids) - WINDOW - 1, (BATCH,))
        batch = torch.stack([ids[start : start + WINDOW] for start in at.tolist()]).to(device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}: loss {loss.item():.3f}, {time.perf_counter() - started:.0f} s", flush=True)


@torch.no_grad()
def loss_on(model: Qwen3MoeForCausalLM, ids: torch.Tensor, device: str) -> float:
    """Mean loss on whole windows."""
    model.eval()
    model.config.output_router_logits = False
    windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
    losses = [model(input_ids=part.to(device), labels=part.to(device)).loss.item() for part in windows.split(BATCH)]
    return sum(losses) / len(losses)


if __name__ == "__main__":
    main()
