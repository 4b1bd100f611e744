"""Rotary position embedding tables in the Hugging Face convention (rotate-half), with llama3 and linear scaling."""

import math

import torch

from disagg_tt.config import LlamaConfig


def inverse_frequencies(config: LlamaConfig) -> torch.Tensor:
    """Return the rotation speed of each pair of dimensions, float32 [head_dim / 2], radians per position.

    The llama3 rule is the one published with Llama 3.1: wavelengths beyond original_length / low_freq_factor are slowed
    down by `factor`, those below original_length / high_freq_factor stay, those between are interpolated.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    speeds = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return speeds
    if scaling.kind == "linear":
        return speeds / scaling.factor
    original = scaling.original_max_position_embeddings
    wavelengths = 2 * math.pi / speeds
    smooth = (original / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    smooth = smooth.clamp(0, 1)
    return (1 - smooth) * speeds / scaling.factor + smooth * speeds


def cos_sin(config: LlamaConfig, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cos and sin for positions 0..length-1, each float32 [length, head_dim], both halves alike."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), inverse_frequencies(config))
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()
