# SPDX-License-Identifier: BSD-3-Clause
"""The gated attention of Qwen3-Next and Qwen3.5 in Hugging Face transformers.

The gate is the second half of every head of `q_proj`; it is read in place, as a strided view, and applied together with the
attention. Attention weights are not returned. Calls with dropout, with `output_attentions`, or with the masks of a flash or
flex implementation keep the original forward.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ._adapter import Adapter, owner_of_forward
from ._transformers import attend

__all__ = ["ADAPTERS"]

# Those whose masks are None, boolean or additive [B, 1, Q, K]. torch_gated_attn: see functions.register_transformers.
_IMPLEMENTATIONS = (None, "eager", "sdpa", "torch_gated_attn")


def _rope(module: nn.Module) -> Any:
    """The function that the module's own forward rotates with, from the file that defines it."""
    forward = owner_of_forward(module).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return forward.__globals__.get("apply_rotary_pos_emb")


def _refuse(module: Any) -> str | None:
    if module.config._attn_implementation not in _IMPLEMENTATIONS:
        return f"the masks of config._attn_implementation {module.config._attn_implementation!r} are not understood"
    if _rope(module) is None:
        return "apply_rotary_pos_emb was not found beside its class"
    heads = module.o_proj.in_features // module.head_dim
    if module.q_proj.out_features != 2 * heads * module.head_dim:
        return "q_proj does not hold a gate as large as the query"
    return None


def _covers(self: Any, mask: Any, kwargs: dict[str, Any]) -> bool:
    if self.config._attn_implementation not in _IMPLEMENTATIONS or kwargs.get("output_attentions"):
        return False
    if self.training and self.attention_dropout > 0:
        return False
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)


def _remember(
    self: Any, key: Tensor, value: Tensor, rotation: tuple[Tensor, Tensor], kwargs: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """All keys and values so far, by the cache if there is one; its argument's name and extras depend on the release."""
    if kwargs.get("cache") is not None:  # transformers 5.24
        others = {name: argument for name, argument in kwargs.items() if name != "cache"}
        found: tuple[Tensor, Tensor] = kwargs["cache"].update(key, value, self.layer_idx, kwargs=others)
    elif kwargs.get("past_key_values") is not None:  # 4.57
        extras = {"cos": rotation[0], "sin": rotation[1], "cache_position": kwargs.get("cache_position")}
        found = kwargs["past_key_values"].update(key, value, self.layer_idx, extras)
    else:
        found = (key, value)
    return found


def _forward(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    if args or not _covers(self, attention_mask, kwargs):
        original: tuple[Tensor, Tensor | None] = self._original_forward(
            hidden_states, position_embeddings, attention_mask, *args, **kwargs
        )
        return original
    heads_last = (*hidden_states.shape[:-1], -1, self.head_dim)
    query, gate = self.q_proj(hidden_states).view(*hidden_states.shape[:-1], -1, 2 * self.head_dim).chunk(2, dim=-1)
    query = self.q_norm(query).transpose(1, 2)  # [B, H, Q, D]
    key = self.k_norm(self.k_proj(hidden_states).view(heads_last)).transpose(1, 2)
    value = self.v_proj(hidden_states).view(heads_last).transpose(1, 2)
    query, key = _rope(self)(query, key, *position_embeddings)
    key, value = _remember(self, key, value, position_embeddings, kwargs)

    # As transformers: without a mask, "eager" attends to every key; "sdpa" is causal.
    causal = kwargs.get("is_causal")
    causal = getattr(self, "is_causal", True) if causal is None else causal
    causal = bool(causal) and self.config._attn_implementation != "eager"
    out = attend(query, key, value, gate.transpose(1, 2), attention_mask, causal=causal, scale=self.scaling)
    return self.o_proj(out.flatten(2)), None


ADAPTERS = (
    Adapter(
        name="Qwen gated attention",
        class_names=frozenset({"Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention"}),
        first=("hidden_states", "position_embeddings", "attention_mask"),
        others=frozenset({"cache", "past_key_values", "cache_position"}),
        attributes=(
            "config",
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "q_norm",
            "k_norm",
            "head_dim",
            "scaling",
            "layer_idx",
        ),
        forward=_forward,
        refuse=_refuse,
    ),
)
