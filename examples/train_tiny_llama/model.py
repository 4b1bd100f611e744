"""A Llama in plain PyTorch whose parameter names are those of Hugging Face's LlamaForCausalLM."""

import torch
import torch.nn.functional as F
from torch import nn

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 768,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000.0,
    "rope_scaling": None,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "initializer_range": 0.02,
    "tie_word_embeddings": True,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}


def round_bf8(x: torch.Tensor) -> torch.Tensor:
    """x as bfloat8_b would hold it: 16 neighbours share an exponent, each keeps sign and 7 magnitude bits.

    x: [..., n], n a multiple of 16; same shape and dtype back. Gradients pass unchanged.
    """
    blocks = x.detach().float().unflatten(-1, (-1, 16))
    largest = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    step = torch.exp2(torch.floor(torch.log2(largest)) - 6)
    rounded = (blocks / step).round().clamp(-127, 127) * step
    return x + (rounded.flatten(-2).to(x.dtype) - x).detach()


class RMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + CONFIG["rms_norm_eps"])
        return (wide * scale * self.weight).to(x.dtype)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads, self.kv_heads = CONFIG["num_attention_heads"], CONFIG["num_key_value_heads"]
        self.dim = CONFIG["head_dim"]
        hidden = CONFIG["hidden_size"]
        self.q_proj = nn.Linear(hidden, self.heads * self.dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.kv_heads * self.dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.kv_heads * self.dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.dim, hidden, bias=False)

    def forward(self, x, cos, sin):
        """x: [batch, time, hidden]; cos, sin: [time, head_dim] float32.

        K (after RoPE) and V are rounded as a bfloat8_b cache would, so that training gets used to it.
        """

        def split(y, heads):
            return y.unflatten(-1, (heads, self.dim)).transpose(1, 2)

        def rotate(y):
            first, second = y.float().chunk(2, -1)
            return (y * cos + torch.cat((-second, first), -1) * sin).to(y.dtype)

        q = rotate(split(self.q_proj(x), self.heads))
        k = round_bf8(rotate(split(self.k_proj(x), self.kv_heads)))
        v = round_bf8(split(self.v_proj(x), self.kv_heads))
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = Attention(), MLP()
        self.input_layernorm = RMSNorm(CONFIG["hidden_size"])
        self.post_attention_layernorm = RMSNorm(CONFIG["hidden_size"])

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin).to(x.dtype)
        return x + self.mlp(self.post_attention_layernorm(x)).to(x.dtype)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(CONFIG["vocab_size"], CONFIG["hidden_size"])
        self.layers = nn.ModuleList(Layer() for _ in range(CONFIG["num_hidden_layers"]))
        self.norm = RMSNorm(CONFIG["hidden_size"])


class Llama(nn.Module):
    """Token ids [batch, time] int64 -> logits [batch, time, vocab]. The residual stream is in `dtype`."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.model, self.dtype = Decoder(), dtype
        half = CONFIG["head_dim"] // 2
        turn = CONFIG["rope_theta"] ** (-torch.arange(half) / half)
        angle = torch.outer(torch.arange(CONFIG["max_position_embeddings"]), turn).repeat(1, 2)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                spread = 0.02 if "embed" in name else 0.5 * weight.shape[1] ** -0.5
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=spread * (0.3 if into_residual else 1.0))

    def forward(self, ids):
        x = self.model.embed_tokens(ids).to(self.dtype)
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)
