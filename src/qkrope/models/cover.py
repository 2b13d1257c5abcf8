"""Whether the kernels run a call of the catalogue: by running it, on a few tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .catalogue import Call, Entry

if TYPE_CHECKING:
    import torch

__all__ = ["arguments", "problem", "reason"]

_TOKENS, _TEXT = 5, 2


def reason(entry: Entry, device: str = "cpu") -> str | None:
    """Why the kernels of ``device`` do not give the q, k and v of an entry; None where they do."""
    for call in entry.calls:
        if (why := problem(call, device)) is not None:
            return f"{call.label}: {why}" if call.label else why
    return None


def problem(call: Call, device: str = "cpu") -> str | None:
    """What the kernels of ``device`` refuse in a call, or None where it has just run there.

    It runs on a few bfloat16 tokens, and every result is finite; what is computed is the concern of
    the tests. RuntimeError where there is no such device.
    """
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        raise RuntimeError(f"device: expected one that is here, got {device!r}")

    from ..ops import qk_norm_rope

    args, keywords = arguments(call, device)
    try:
        results = qk_norm_rope(*args, **keywords)
    except (TypeError, ValueError) as refusal:
        return str(refusal).partition(";")[0]
    if not all(bool(torch.isfinite(x).all()) for x in results if x is not None):
        return "a result is not finite"
    return None


def arguments(
    call: Call, device: str = "cpu", dtype: torch.dtype | None = None, seed: int = 0
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Small random arguments of a call, and its keywords, as `qkrope.qk_norm_rope` takes them.

    q and k are views of one packed tensor where the call names a layout. Weights, biases, scales
    and tables have the forms that the call says; dtype is bfloat16 unless given.
    """
    import torch

    dtype = torch.bfloat16 if dtype is None else dtype
    make = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=make).to(device, dtype)

    spec, width = call.spec, call.spec.head_dim
    heads = {"q": spec.num_q_heads, "k": spec.num_kv_heads, "v": spec.num_kv_heads}
    norms = {"q": spec.q_norm, "k": spec.k_norm_resolved, "v": spec.v_norm}
    given: dict[str, torch.Tensor | None] = {}
    for side in "qkv":
        x = None
        if side in call.takes:
            # A packed layout: the heads of a side are every second one of a wider tensor.
            x = normal(_TOKENS, heads[side], 2 * width)[..., :width]
            x = x if call.layout else x.contiguous()
        given[side] = x

    def channels(side: str, form: str, shift: float) -> torch.Tensor | None:
        norm = norms[side]
        if form == "none" or given[side] is None or norm is None or norm.kind == "none":
            return None
        covered = norm.weight_dim(width)
        shape = (heads[side], covered) if form == "heads" else (covered,)
        shape = (heads[side] * width,) if norm.scope == "row" else shape
        return 0.2 * normal(*shape) + shift - norm.weight_offset

    keywords: dict[str, Any] = {}
    for side in "qk":
        if side in call.bias and given[side] is not None:
            keywords[f"{side}_bias"] = channels(side, "head", 0.0)
        if (scale := getattr(call, f"{side}_scale")) and given[side] is not None:
            shapes = {"token": (_TOKENS, 1, 1), "head": (heads[side], 1), "channel": (width,)}
            shape = shapes.get(scale)
            keywords[f"{side}_scale"] = 1.25 if shape is None else 1 + normal(*shape).float().abs()
    if call.rotate:
        keywords[f"rotate_{call.rotate}"] = _TEXT if call.rotate == "from" else _TOKENS - _TEXT
    positions: Any = None
    if "table" in call.positions and spec.rope is not None:
        keywords["cos_sin"] = _tables(call, make, device)
    elif spec.rope is not None:
        lead = (spec.position_axes, _TOKENS) if spec.position_axes else (_TOKENS,)
        positions = torch.randint(0, 1000, lead, generator=make).to(device)
        if call.positions == "each":
            positions = positions, positions + 3
    if "v" in call.takes:
        keywords["v"] = given["v"]
    weights = (channels(side, getattr(call, f"{side}_weight"), 1.0) for side in "qk")
    return (given["q"], given["k"], *weights, positions, spec), keywords


def _tables(call: Call, make: torch.Generator, device: str) -> Any:
    """cos and sin of the rotated tokens, one value a pair; by head, or for each side."""
    import torch

    spec, pairs = call.spec, call.spec.rotary_dim // 2
    tokens = _TOKENS - (_TEXT if call.rotate else 0)

    def table(heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        lead = (tokens, heads) if "head" in call.positions else (tokens,)
        angle = 40 * torch.rand((*lead, pairs), generator=make)
        return angle.cos().to(device), angle.sin().to(device)

    sides = table(spec.num_q_heads), table(spec.num_kv_heads)
    same = call.positions == "table" or spec.num_q_heads == spec.num_kv_heads
    return sides[0] if same and not call.positions.startswith("tables") else sides
