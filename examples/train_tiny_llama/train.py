"""Trains the tiny Llama from scratch and writes a Hugging Face checkpoint.

python train.py --out DIR --compile
"""

import argparse
import json
import random
import time
from pathlib import Path

import evaluate
import tiny_tokenizer
import torch
import torch.nn.functional as F
from documents import Author
from model import CONFIG, Llama
from safetensors.torch import load_file, save_file
from tiny_tokenizer import BEGIN, END, END_TURN
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

LENGTHS = (128, 512, 2048)  # tokens per row; every batch has rows of one length
# (until this share of the steps, odds of the three lengths)
CURRICULUM = ((0.06, (1, 0, 0)), (0.15, (0.4, 0.6, 0)), (1.0, (0.2, 0.4, 0.4)))


class Batches(IterableDataset):
    """Endless batches of fresh documents: ids, labels (int64) and weights (float32), all [rows, length].

    The curriculum follows each worker's own count, so a given seed, worker count and number of steps always
    give the same data.
    """

    def __init__(self, folder: Path, seed: int, steps: int, tokens: int, start: int):
        self.folder, self.seed, self.steps, self.tokens, self.start = folder, seed, steps, tokens, start

    def __iter__(self):
        from tokenizers import Tokenizer

        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        rng = random.Random(f"{self.seed} {worker} {self.start}")
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer.json"))
        author = Author(tokenizer, rng)
        end = tokenizer.token_to_id(END)
        step = self.start + worker
        while True:
            odds = next(odds for until, odds in CURRICULUM if step / self.steps < until or until == 1.0)
            length = rng.choices(LENGTHS, odds)[0]
            rows = max(1, self.tokens // length)
            ids = torch.full((rows, length), end, dtype=torch.int64)
            labels, weights = ids.clone(), torch.zeros(rows, length)
            for row in range(rows):
                columns = author.document(length)
                for table, column in zip((ids, labels, weights), columns, strict=True):
                    table[row, : len(column)] = torch.tensor(column)
            yield ids, labels, weights
            step += workers


def save(model: Llama, folder: Path):
    """Write the weights (bfloat16, Hugging Face names) and the configuration files."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    special = {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    ends = {"bos_token_id": special[BEGIN], "eos_token_id": [special[END], special[END_TURN]]}
    weights = {name: w.detach().to("cpu", torch.bfloat16) for name, w in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | ends, indent=2) + "\n")
    generation = ends | {"pad_token_id": special[END], "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def optimizers(model: Llama, rate: float):
    """Muon for the matrices, AdamW for embedding and norms."""
    matrices = [w for n, w in model.named_parameters() if w.ndim == 2 and "embed" not in n]
    others = [w for n, w in model.named_parameters() if w.ndim == 1 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def rate_at(step: int, steps: int, warmup: int = 100) -> float:
    """Share of the peak learning rate: warm up, hold, then fall to zero over the last 45%."""
    return min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (0.45 * steps)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--steps", type=int, default=7500)
    parser.add_argument("--tokens", type=int, default=65536, help="tokens in a batch")
    parser.add_argument("--rate", type=float, default=3e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=14, help="processes that write documents")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop (and save) after this time")
    parser.add_argument("--resume", type=Path, help="model.safetensors to start from")
    parser.add_argument("--start", type=int, default=0, help="step to go on from with --resume")
    parser.add_argument("--every", type=int, default=2500, help="steps between checkpoints")
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    args = parser.parse_args()
    began = time.time()
    args.out.mkdir(parents=True, exist_ok=True)
    tiny_tokenizer.write(args.out, args.seed)
    torch.manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    model = Llama().to(device)
    if args.resume:
        model.load_state_dict(load_file(args.resume))
    if args.compile:
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    optimizer = optimizers(model, args.rate)
    batches = iter(
        DataLoader(
            Batches(args.out, args.seed, args.steps, args.tokens, args.start),
            batch_size=None,
            num_workers=args.workers,
            prefetch_factor=4,
            pin_memory=device == "cuda",
        )
    )
    seen, total, answers, hits, loss_sum = 0, 0.0, 0.0, 0.0, 0.0
    step = args.start
    while step < args.steps and time.time() - began < args.minutes * 60:
        ids, labels, weights = (t.to(device, non_blocking=True) for t in next(batches))
        for group in (g for o in optimizer for g in o.param_groups):
            group["lr"] = args.rate * rate_at(step, args.steps)
        with torch.autocast(device, torch.bfloat16):
            logits = model(ids)[:, :-1]
        targets, weights = labels[:, 1:].flatten(), weights[:, 1:].flatten()
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in optimizer:
            o.step()
            o.zero_grad(set_to_none=True)
        with torch.no_grad():
            asked = weights == 1
            loss_sum += (losses * asked).sum()
            hits += ((logits.flatten(0, 1).argmax(-1) == targets) & asked).sum()
            answers += asked.sum()
            total += loss.detach()
        seen += ids.numel()
        step += 1
        if step % 100 == 0 or step == args.steps:
            print(
                f"step {step} loss {total / 100:.4f} answer loss {loss_sum / answers:.4f} "
                f"answer tokens right {hits / answers:.4f} tokens {seen / 1e6:.0f}M "
                f"time {time.time() - began:.0f}s",
                flush=True,
            )
            total, answers, hits, loss_sum = 0.0, 0.0, 0.0, 0.0
        if step % args.every == 0:
            save(model, args.out)
            evaluate.glance(model, args.out, device)
    save(model, args.out)
    print(f"done: {step} steps, {seen / 1e6:.0f}M tokens, {time.time() - began:.0f}s", flush=True)


if __name__ == "__main__":
    main()
