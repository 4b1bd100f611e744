"""Held-out accuracy of a checkpoint: exact answers under greedy decoding, per kind and prompt length.

python evaluate.py [--quick] [--model DIR] [--kv bf8] [--dtype bfloat16]

A case counts only if every token of the answer, and the end token after it, is the most likely one given the
prompt and the answer so far: that is what greedy decoding would produce, at the cost of one forward pass.
"""

import argparse
import json
import random
import time
from collections import defaultdict
from pathlib import Path

import torch
from data import Case, capital_cases, chat_recall_case, fox_cases, recall_case
from model import round_bf8
from tiny_tokenizer import END, END_TURN

CHECKPOINT = Path(__file__).resolve().parents[2] / "disagg_tt" / "checkpoint"
LENGTHS = (32, 128, 256, 512, 1024, 1500)
SEED = 20250  # training uses other seeds


def all_cases(tokenizer, count: int, lengths=LENGTHS, capital_lengths=(0, 128, 1024)) -> list[Case]:
    """`count` recall cases per kind and length; the fox and all capitals after filler of several lengths."""
    rng = random.Random(SEED)
    cases = fox_cases(rng, [4] + [n for n in lengths for _ in range(count)], tokenizer)
    for form in ("raw", "raw question", "chat"):
        cases += capital_cases(rng, form, 0, tokenizer, plain=True)
        for n in capital_lengths:
            cases += capital_cases(rng, form, n, tokenizer)
    for kind in ("name", "colour", "code"):
        for n in lengths:
            cases += [recall_case(rng, kind, n, tokenizer) for _ in range(count)]
            cases += [chat_recall_case(rng, kind, n, tokenizer) for _ in range(count)]
    return cases


def encode(tokenizer, case: Case) -> tuple[list[int], list[int]]:
    """Token ids of the prompt (with bos) and of the answer (with its end token)."""
    if isinstance(case.prompt, str):
        prompt, end = tokenizer.encode(case.prompt), END
    else:
        text = tokenizer.apply_chat_template(case.prompt, add_generation_prompt=True, tokenize=False)
        prompt, end = tokenizer.encode(text, add_special_tokens=False), END_TURN
    answer = tokenizer.encode(case.answer, add_special_tokens=False)
    return prompt, [*answer, tokenizer.convert_tokens_to_ids(end)]


@torch.no_grad()
def score(logits_of, tokenizer, cases: list[Case], device="cpu", batch_tokens=16384):
    """Per case (right?, smallest margin): margin is the logit of the right token minus the best other one.

    logits_of: ids [batch, time] int64 -> logits [batch, time, vocab].
    """
    encoded = [encode(tokenizer, case) for case in cases]
    order = sorted(range(len(cases)), key=lambda i: len(encoded[i][0]) + len(encoded[i][1]))
    results = [None] * len(cases)
    while order:
        longest = len(encoded[order[-1]][0]) + len(encoded[order[-1]][1])
        width = -(-longest // 32) * 32
        batch = [order.pop() for _ in range(min(len(order), max(1, batch_tokens // width)))]
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        for row, i in enumerate(batch):
            prompt, answer = encoded[i]
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        logits = logits_of(ids.to(device)).float()
        for row, i in enumerate(batch):
            prompt, answer = encoded[i]
            rows = logits[row, len(prompt) - 1 : len(prompt) + len(answer) - 1].cpu()
            target = torch.tensor(answer)[:, None]
            right = rows.gather(1, target)[:, 0]
            others = rows.scatter(1, target, -torch.inf).amax(1)
            margin = (right - others).min().item()
            results[i] = (margin > 0, margin)
    return results


def glance(model, folder: Path, device: str):
    """A short look during training, printed on one line: accuracy per kind over all lengths."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    cases = all_cases(tokenizer, 20, capital_lengths=(128,))
    with torch.compiler.set_stance("force_eager"), torch.autocast(device, torch.bfloat16):
        results = score(model, tokenizer, cases, device)
    right = defaultdict(list)
    for case, (ok, _) in zip(cases, results, strict=True):
        right[case.kind if "code" not in case.kind else f"{case.kind} {case.tokens}"].append(ok)
    print("  " + ", ".join(f"{kind} {sum(r) / len(r):.2f}" for kind, r in right.items()), flush=True)


def load(folder: Path, dtype: torch.dtype, kv: str, device: str):
    """The checkpoint in plain transformers; with kv="bf8", K and V are rounded to bfloat8_b blocks."""
    from transformers import AttentionInterface, AttentionMaskInterface, AutoTokenizer, LlamaForCausalLM
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def bf8_attention(module, query, key, value, *args, **kwargs):
        return sdpa_attention_forward(module, query, round_bf8(key), round_bf8(value), *args, **kwargs)

    AttentionInterface.register("bf8_kv", bf8_attention)
    AttentionMaskInterface.register("bf8_kv", sdpa_mask)
    attention = "bf8_kv" if kv == "bf8" else "sdpa"
    model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation=attention)
    return model.to(device).eval(), AutoTokenizer.from_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=25, help="recall cases per kind and length")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter prompts: under a minute")
    parser.add_argument("--kv", choices=("exact", "bf8"), default="exact", help="precision of K and V")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--wrong", action="store_true", help="print the cases answered wrongly")
    args = parser.parse_args()
    began = time.time()
    model, tokenizer = load(args.model, getattr(torch, args.dtype), args.kv, args.device)
    if args.quick:
        cases = all_cases(tokenizer, 4, (32, 256, 512), (0,))
        cases += [recall_case(random.Random(i), "code", 1500, tokenizer) for i in range(4)]
    else:
        cases = all_cases(tokenizer, args.count)
    results = score(lambda ids: model(ids, use_cache=False).logits, tokenizer, cases, args.device)
    table, margins = defaultdict(lambda: defaultdict(list)), defaultdict(list)
    for case, (ok, margin) in zip(cases, results, strict=True):
        table[case.kind][case.tokens].append(ok)
        margins[case.kind].append(margin)
        if args.wrong and not ok:
            print(case)
    columns = sorted({case.tokens for case in cases})
    print(f"{'kind':18}{'all':>8}{'cases':>7}{'margin':>8}" + "".join(f"{n:>7}" for n in columns))
    summary = {}
    for kind, row in table.items():
        flat = [ok for oks in row.values() for ok in oks]
        summary[kind] = round(sum(flat) / len(flat), 4)
        low = sorted(margins[kind])[len(flat) // 100]
        cells = "".join(f"{100 * sum(row[n]) / len(row[n]):7.1f}" if n in row else "      -" for n in columns)
        print(f"{kind:18}{100 * summary[kind]:7.2f}%{len(flat):7}{low:8.2f}{cells}")
    print(
        json.dumps(
            {
                "accuracy": summary,
                "cases": len(cases),
                "dtype": args.dtype,
                "kv": args.kv,
                "seconds": round(time.time() - began, 1),
            }
        )
    )


if __name__ == "__main__":
    main()
