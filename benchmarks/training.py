"""Training throughput: a qtlm step beside a plain loop around transformers' Llama of the same shape, same weights, same data, in one run.

    python benchmarks/training.py            # about three minutes on two cores; needs `pip install qtlm[dev]`

Both run forward, backward, clipping to a norm of 1 and a fused AdamW step on 8 x 256 tokens. The plain loop is the usual one: autocast, the model's own loss
(`labels=`), `clip_grad_norm_`. qtlm's step does everything that `Trainer.training_step` does: checks of every number, history, seeding. The equal first losses are asserted.
"""

import argparse
from functools import partial

import torch
from common import SHAPE, in_turn, random_ids, report, tiny_lm
from transformers import LlamaConfig, LlamaForCausalLM

from qtlm import Trainer

BATCH, LENGTH = 8, SHAPE["block_size"]


def llama_like(model) -> LlamaForCausalLM:
    "transformers' Llama with the shape and the weights of `model`."
    shape = model.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=SHAPE["intermediate_size"],
            num_hidden_layers=shape.num_hidden_layers,
            num_attention_heads=shape.num_attention_heads,
            num_key_value_heads=shape.num_attention_heads,
            max_position_embeddings=shape.block_size,
            rms_norm_eps=shape.rms_norm_eps,
            rope_theta=shape.rope_theta,
            tie_word_embeddings=True,
            use_cache=False,
        )
    )
    llama.load_state_dict(model.state_dict())
    return llama


def plain_step(model, bf16: bool, compiled: bool):
    "The loop that one writes by hand; returns a function that takes one step and returns its loss."
    forward = torch.compile(model) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)

    def step(ids):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = forward(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def qtlm_step(bf16: bool, compiled: bool):
    "A qtlm training step on the same ids; the loss of position t is that of token t + 1, as in transformers."
    trainer = Trainer(tiny_lm(), dtype="bf16" if bf16 else "fp32", compile=compiled, progress=False)
    return lambda ids: trainer.training_step({"input_ids": ids, "labels": ids})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="compiled, too (needs a C++ compiler; minutes more)")
    options = parser.parse_args()
    ids = random_ids(BATCH, LENGTH)
    tables = {}
    for bf16 in (True, False):
        for compiled in (False, True) if options.compile else (False,):
            plain, ours = plain_step(llama_like(tiny_lm()), bf16, compiled), qtlm_step(bf16, compiled)
            first, second = plain(ids), ours(ids)
            assert abs(first - second) < 2e-2, (first, second)
            calls = {"transformers Llama, plain loop": partial(plain, ids), "qtlm": partial(ours, ids)}
            rows = in_turn(calls, options.rounds)
            for row in rows.values():
                row["tokens_per_second"] = BATCH * LENGTH / row["seconds"]
            tables[f"{'bf16' if bf16 else 'float32'}, {'compiled' if compiled else 'eager'}"] = rows
    report("training", tables)


if __name__ == "__main__":
    main()
