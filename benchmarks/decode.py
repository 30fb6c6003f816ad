"""Writing speed at batch 1: qtlm with its cache beside `transformers.generate` and llama.cpp (through llama-cpp-python), the same shape and weights, in one run.

    python benchmarks/decode.py              # about three minutes on two cores; the extra `[bench]` brings the peers
    python benchmarks/decode.py --compile    # and single tokens compiled, which needs a C++ compiler and some minutes

Decoding writes 128 tokens greedily after a prompt of 16, prompt included in the time. Prefill reads 240 tokens up to the logits of the next one.
llama.cpp gets the same weights in a GGUF file that is written here, and has to give float32's tokens in float32. What is not installed says so in the table.
"""

import argparse
import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import in_turn, random_ids, report, tiny_lm
from inference import first_line
from torch import nn

from qtlm import TinyLM, generate, quantize_model_ptq
from qtlm.cache import KVCache

PROMPT, NEW, PREFILL = 16, 128, 240
BASE, PEER = "transformers float32", "llama.cpp Q8_0"


def half_turned(weight: np.ndarray, heads: int) -> np.ndarray:
    "Rows of a query or key matrix in llama.cpp's order, which turns neighbours where Hugging Face's layout turns halves."
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def gguf_names(model: TinyLM) -> dict[str, np.ndarray]:
    "The weights under llama.cpp's names, float32."
    c, parts = model.config, {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    parts |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
    parts |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    weights = {name: p.detach().float().numpy() for name, p in model.named_parameters()}
    found = {"token_embd.weight": weights["model.embed_tokens.weight"], "output_norm.weight": weights["model.norm.weight"]}
    for layer in range(c.num_hidden_layers):
        for theirs, ours in parts.items():
            w = weights[f"model.layers.{layer}.{theirs}.weight"]
            heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(ours)
            found[f"blk.{layer}.{ours}.weight"] = half_turned(w, heads) if heads else w
    return found


def write_gguf(model: TinyLM, path: Path, kind: str) -> Path:
    "Write a tied `TinyLM` as a GGUF file of the llama architecture, matrices in `kind` (F32, Q8_0, Q4_0)."
    import gguf

    c, kind = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_rope_dimension_count(c.hidden_size // c.num_attention_heads)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("llama")  # which tokens it holds does not matter: ids go in and come out
    special = ["<unk>", "<s>", "</s>"]
    tokens = special + [f"<0x{i:02X}>" for i in range(256)]
    tokens += [f"t{i}" for i in range(c.vocab_size - len(tokens))]
    kinds = [gguf.TokenType.UNKNOWN, *[gguf.TokenType.CONTROL] * 2, *[gguf.TokenType.BYTE] * 256]
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(c.vocab_size)])
    writer.add_token_types([*kinds, *[gguf.TokenType.NORMAL] * (c.vocab_size - len(kinds))])
    for name, w in gguf_names(model).items():
        own = kind if w.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(w, own) if own != gguf.GGMLQuantizationType.F32 else np.ascontiguousarray(w), raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def set_field(struct: object, name: str, value: object) -> object:
    "Set a field of a ctypes struct and return it."
    setattr(struct, name, value)
    return struct


class Qtlm:
    "A model of this package."

    def __init__(self, model: nn.Module, **cache):
        self.model, self.own = model.eval(), KVCache(model, **cache)
        self.cache = self.own if cache else True  # as a user would: nothing prepared, unless asked for

    def decode(self, prompt: torch.Tensor) -> list[int]:
        return generate(self.model, prompt, NEW, temperature=0, cache=self.cache).tolist()

    def prefill(self, prompt: torch.Tensor) -> torch.Tensor:
        self.own.reset()
        return self.own.extend(prompt[None])


class Transformers:
    "The same weights in `LlamaForCausalLM`, float32."

    def __init__(self, model: TinyLM):
        import transformers

        self.model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**model.to_llama_config())).eval()
        self.model.load_state_dict(model.state_dict())

    def decode(self, prompt: torch.Tensor) -> list[int]:
        out = self.model.generate(prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        return out[0].tolist()

    def prefill(self, prompt: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return self.model(prompt[None], use_cache=True, logits_to_keep=1).logits[:, -1]


PROBE = "import llama_cpp, sys; llama_cpp.Llama(sys.argv[1], n_ctx=64, verbose=False).eval([1] * 16)"


class LlamaCpp:
    """The same weights in llama.cpp, on as many threads.

    llama.cpp lays quantized weights out anew, and version 0.3.36 of llama-cpp-python crashes on a tied model where it does (seen on a processor with AMX). So it is tried
    in a process of its own first, and where that dies the weights stay as they are in the file; the row says so.
    """

    def __init__(self, model: TinyLM, kind: str, folder: Path):
        import llama_cpp

        threads, path = torch.get_num_threads(), write_gguf(model, folder / f"{kind}.gguf", kind)
        defaults = llama_cpp.llama_model_default_params
        self.plain = subprocess.run([sys.executable, "-c", PROBE, str(path)], capture_output=True).returncode != 0
        if self.plain:
            llama_cpp.llama_cpp.llama_model_default_params = lambda: set_field(defaults(), "use_extra_bufts", False)
        self.model = llama_cpp.Llama(str(path), n_ctx=model.config.block_size, n_batch=512, n_threads=threads, n_threads_batch=threads, verbose=False)
        llama_cpp.llama_cpp.llama_model_default_params = defaults

    def decode(self, prompt: torch.Tensor) -> list[int]:
        self.model.reset()
        out = prompt.tolist()
        for _, token in zip(range(NEW), self.model.generate(prompt.tolist(), temp=0.0, top_k=1, repeat_penalty=1.0)):
            out.append(token)
        return out

    def prefill(self, prompt: torch.Tensor) -> None:
        self.model.reset()
        self.model.eval(prompt.tolist())


def makers(model: TinyLM, folder: Path, compiled: bool) -> dict[str, Callable[[], object]]:
    "What is compared, by name; made when called, because a library may be missing."
    eight, four = (quantize_model_ptq(model, bits=bits) for bits in (8, 4))
    found = {
        BASE: lambda: Transformers(model),
        "float32": lambda: Qtlm(model),
        "INT8": lambda: Qtlm(eight),
        "INT8, cache in 8 bits": lambda: Qtlm(eight, bits=8),
        "INT4": lambda: Qtlm(four),
        "INT8 in bf16": lambda: Qtlm(quantize_model_ptq(copy.deepcopy(model).bfloat16(), bits=8)),
    }
    if compiled:
        found |= {"INT8, compiled": lambda: Qtlm(eight, compile=True), "INT4, compiled": lambda: Qtlm(four, compile=True)}
    return found | {f"llama.cpp {kind}": lambda kind=kind: LlamaCpp(model, kind, folder) for kind in ("F32", "Q8_0", "Q4_0")}


def measure(peers: dict[str, object], what: str, prompt: torch.Tensor, count: int, rounds: int) -> dict[str, dict]:
    "Time one call of each in turn; add tokens a second, and the percentage of llama.cpp's Q8_0."
    rows = in_turn({name: lambda peer=peer: getattr(peer, what)(prompt) for name, peer in peers.items()}, rounds)
    for name, row in rows.items():
        row |= {"weights_as_in_the_file": 1} if getattr(peers[name], "plain", False) else {}
        row["tokens_per_second"] = count / row["seconds"]
        if PEER in rows:
            row["percent_of_llama_cpp_Q8_0"] = 100 * rows[PEER]["seconds"] / row["seconds"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="also with compiled single tokens")
    options = parser.parse_args()
    model, peers, errors = tiny_lm().eval(), {}, {}
    for p in model.parameters():
        if p.dim() == 2:
            p.data.mul_(2)  # so that the likeliest token is a clear choice
    prompt, text = random_ids(PROMPT), random_ids(PREFILL)
    with tempfile.TemporaryDirectory() as folder:
        for name, make in makers(model, Path(folder), options.compile).items():
            try:
                peers[name] = make()
            except Exception as error:
                errors[name] = {"error": first_line(error)}
        want = peers["float32"].decode(prompt)
        for name in (BASE, "llama.cpp F32"):
            if name in peers:
                got = peers[name].decode(prompt)
                assert got[: PROMPT + 16] == want[: PROMPT + 16], f"{name} writes other tokens"
        decode = measure(peers, "decode", prompt, NEW, options.rounds)
        prefill = measure(peers, "prefill", text, PREFILL, options.rounds)
    report("decode", {f"decode, {NEW} tokens": decode | errors, f"prefill, {PREFILL} tokens": prefill | errors})


if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
