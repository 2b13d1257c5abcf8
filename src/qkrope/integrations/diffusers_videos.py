"""The attention processors of the video models; see ``diffusers_base``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .diffusers_base import ADD, ADDED, QK, TO, Part, Processor, Table, of_pairs, projected_out

__all__ = ["HunyuanVideoProcessor", "LTX2Processor", "WanProcessor"]

WAN_TEXT = 512  # tokens of Wan's text; those before them are the image's


class HunyuanVideoProcessor(Processor):
    """HunyuanVideo: [video, text] of which the text does not turn.

    Double blocks project and normalise the text apart; single blocks take both as one stream.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Table | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of video and text tokens: (video, text)."""
        table, text = of_pairs(image_rotary_emb), encoder_hidden_states
        video, x, turning = hidden_states.shape[1], hidden_states, None
        if text is not None and attn.add_q_proj is None:
            x = torch.cat([x, text], dim=1)
            turning = video if table is not None else None
        q, k, v = self.projected(attn, x, TO)
        if text is None or attn.add_q_proj is None:
            q, k = self.turned(attn, Part(QK, q, k, table=table, rotate_to=turning))
        else:
            added = self.projected(attn, text, ADD)
            q, k, v = self.joint(attn, Part(QK, q, k, v, table), Part(ADDED, *added))
        made = self.attend(q, k, v, attention_mask)
        if text is None:
            return made, None
        made, text = made[:, :video], made[:, video:]
        if attn.to_out is not None:
            made = projected_out(attn, made)
        if attn.to_add_out is not None:
            text = attn.to_add_out(text)
        return made, text


class WanProcessor(Processor):
    """Wan: the row of all heads is normalised; attention to text and image does not turn."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: Table | None = None,
    ) -> Tensor:
        """Self attention, or attention to text and, where the model has one, an image."""
        source, image = encoder_hidden_states, None
        if source is not None and attn.add_k_proj is not None:
            before = source.shape[1] - WAN_TEXT
            image, source = source[:, :before], source[:, before:]
        if source is None:
            q, k, v = self.projected(attn, hidden_states, TO, "to_qkv")
        else:
            (q,) = self.projected(attn, hidden_states, TO[:1])
            k, v = self.projected(attn, source, TO[1:], "to_kv")
        q, k = self.turned(attn, Part(QK, q, k, table=of_pairs(rotary_emb)))
        made = self.attend(q, k, v, attention_mask, parallel=source is None)
        if image is not None:
            image_k, image_v = self.projected(attn, image, ADD[1:], "to_added_kv")
            _, image_k = self.turned(attn, Part(ADDED, None, image_k))
            made = made + self.attend(q, image_k, image_v, parallel=False)
        return projected_out(attn, made)


class LTX2Processor(Processor):
    """LTX-2: the row of all heads is normalised; a table by head, or one for each modality.

    Attention to text does not turn. Takes the place of the perturbed processor too.
    """

    def pairing_of(self, attn: Any) -> str:
        """Halves where the model's rope is "split"."""
        return "half" if attn.rope_type == "split" else "interleaved"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        query_rotary_emb: Table | None = None,
        key_rotary_emb: Table | None = None,
        perturbation_mask: Tensor | None = None,
        all_perturbed: bool | None = None,
    ) -> Tensor:
        """Attention to itself, to text or to the other modality.

        Where ``perturbation_mask`` is 0 the values stand for what attention gives.
        """
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = attention_mask
        if mask is not None:
            batch, tokens = source.shape[:2]
            mask = attn.prepare_attention_mask(mask, tokens, batch)
            mask = mask.view(batch, attn.heads, -1, mask.shape[-1])
        if all_perturbed is None and perturbation_mask is not None:
            all_perturbed = bool((perturbation_mask == 0).all())
        if all_perturbed:
            made = attn.to_v(source)
        else:
            (q,) = self.projected(attn, hidden_states, TO[:1])
            k, v = self.projected(attn, source, TO[1:])
            table = self._tables(attn, query_rotary_emb, key_rotary_emb)
            q, k = self.turned(attn, Part(QK, q, k, table=table))
            made = self.attend(q, k, v, mask)
            if perturbation_mask is not None:
                made = torch.lerp(v.flatten(2, 3), made, perturbation_mask)
        if attn.to_gate_logits is not None:
            gates = 2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))
            made = (made.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2, 3)
        return projected_out(attn, made)

    def _tables(self, attn: Any, q_table: Table | None, k_table: Table | None) -> Any:
        """One for q and k, or one for each; without q's nothing turns."""
        if q_table is None:
            return None
        table = self._by_head(attn, q_table)
        return table if k_table is None else (table, self._by_head(attn, k_table))

    def _by_head(self, attn: Any, table: Table) -> Table | None:
        """Views ``[batch, tokens, heads, head_dim / 2]``."""
        cos, sin = table
        if self.pairing_of(attn) == "interleaved":  # [batch, tokens, heads * head_dim]
            return of_pairs(self.heads_of(attn, cos, sin))
        return cos.transpose(1, 2), sin.transpose(1, 2)
