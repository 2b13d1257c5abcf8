"""The attention processors of the image models; see ``diffusers_base``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .diffusers_base import (
    ADD,
    ADDED,
    QK,
    TO,
    Part,
    Processor,
    Table,
    of_complex,
    of_pairs,
    projected_out,
    rows,
)

__all__ = [
    "Flux2Processor",
    "Flux2SingleProcessor",
    "FluxProcessor",
    "QwenImageProcessor",
    "ZImageProcessor",
]


class FluxProcessor(Processor):
    """FLUX.1: [text, image] under one table; single blocks have one stream, not projected here."""

    alone_projects = False

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Table | None = None,
    ) -> Any:
        """Attention of image tokens, with text tokens where given: image, or (image, text)."""
        table = of_pairs(image_rotary_emb)
        q, k, v = self.projected(attn, hidden_states, TO, "to_qkv")
        if encoder_hidden_states is None:
            q, k = self.turned(attn, Part(QK, q, k, table=table))
            made = self.attend(q, k, v, attention_mask)
            return projected_out(attn, made) if self.alone_projects else made
        text = encoder_hidden_states.shape[1]
        text_q, text_k, text_v = self.projected(attn, encoder_hidden_states, ADD, "to_added_qkv")
        parts = (
            Part(ADDED, text_q, text_k, text_v, rows(table, slice(None, text))),
            Part(QK, q, k, v, rows(table, slice(text, None))),
        )
        made = self.attend(*self.joint(attn, *parts), attention_mask)
        return projected_out(attn, made[:, text:].contiguous()), attn.to_add_out(
            made[:, :text].contiguous()
        )


class Flux2Processor(FluxProcessor):
    """FLUX.2, double blocks: as FLUX.1, and a stream alone is projected too."""

    alone_projects = True


class Flux2SingleProcessor(Processor):
    """FLUX.2, single blocks: ``[q | k | v | mlp]`` of one projection, in which q and k turn."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Table | None = None,
    ) -> Tensor:
        """Attention and MLP of all tokens."""
        packed = attn.to_qkv_mlp_proj(hidden_states)
        # By the whole model's ratio: a rank of tensor parallelism holds the same share of each.
        qkv_width, mlp_width = 3 * attn.inner_dim, attn.mlp_hidden_dim * attn.mlp_mult_factor
        here = packed.shape[-1] * qkv_width // (qkv_width + mlp_width)
        qkv, mlp = packed.tensor_split([here], dim=-1)
        q, k, v = self.heads_of(attn, *qkv.chunk(3, dim=-1))
        q, k = self.turned(attn, Part(QK, q, k, table=of_pairs(image_rotary_emb)))
        made = self.attend(q, k, v, attention_mask)
        return attn.to_out(torch.cat([made, attn.mlp_act_fn(mlp)], dim=-1))


class QwenImageProcessor(Processor):
    """Qwen-Image: [text, image], a complex table for each."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of image and text tokens: (image, text)."""
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states: expected the text stream, got None")
        if attention_mask is not None:
            raise ValueError(
                "attention_mask: expected None, since the mask of both streams is made from "
                "encoder_hidden_states_mask, got a tensor"
            )
        text = encoder_hidden_states.shape[1]
        mask = None
        if encoder_hidden_states_mask is not None:
            images = encoder_hidden_states_mask.new_ones(hidden_states.shape[:2], dtype=torch.bool)
            mask = torch.cat([encoder_hidden_states_mask, images], dim=1)[:, None, None, :]
        image_table, text_table = image_rotary_emb or (None, None)
        text_q, text_k, text_v = self.projected(attn, encoder_hidden_states, ADD)
        q, k, v = self.projected(attn, hidden_states, TO)
        parts = (
            Part(ADDED, text_q, text_k, text_v, of_complex(text_table)),
            Part(QK, q, k, v, of_complex(image_table)),
        )
        made = self.attend(*self.joint(attn, *parts), mask)
        return projected_out(attn, made[:, text:].contiguous()), attn.to_add_out(
            made[:, :text].contiguous()
        )


class ZImageProcessor(Processor):
    """Z-Image: one stream, a complex table."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        freqs_cis: Tensor | None = None,
    ) -> Tensor:
        """Self attention; a mask of [batch, tokens] is one of keys."""
        q, k, v = self.projected(attn, hidden_states, TO)
        q, k = self.turned(attn, Part(QK, q, k, table=of_complex(freqs_cis)))
        if attention_mask is not None and attention_mask.ndim == 2:
            attention_mask = attention_mask[:, None, None, :]
        return projected_out(attn, self.attend(q, k, v, attention_mask))
