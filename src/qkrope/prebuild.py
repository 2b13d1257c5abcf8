"""Building before the first call: ``warmup``, and what the compatibility calls need of it."""

from __future__ import annotations

import torch

from . import _native
from ._limits import flag
from .plan import Plan, bare_of, once_of, plan_of
from .scaling import DynamicNTK
from .spec import Spec
from .variant import DTYPES, Variant


def dtype_name(name: str, dtype: torch.dtype) -> str:
    """The params.h name of a torch dtype; TypeError for one that no kernel reads."""
    text = str(dtype).removeprefix("torch.")
    if text not in DTYPES:
        raise TypeError(f"{name}: expected one of {', '.join(DTYPES)}, got {dtype}")
    return text


def build_variant(
    spec: Spec, device: torch.device, dtype: torch.dtype, weight_dtype: torch.dtype | None = None
) -> None:
    """Compile and load the kernel that computes its own angles, for whatever head counts."""
    from .cuda import launch

    launch.load(_variant(spec, dtype, weight_dtype, "phase"), _index(device))


def warmup(
    spec: Spec,
    device: torch.device | str = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    weight_dtype: torch.dtype | None = None,
    *,
    seq_len: int | None = None,
    backward: bool = False,
) -> None:
    """Compile and load now everything that calls with ``spec`` and these dtypes will run.

    Needed before a CUDA graph is captured. ``weight_dtype`` is that of q_weight and k_weight, by
    default ``dtype``. On a CPU there is nothing to compile: the library is loaded and the Spec
    checked. DynamicNTK and LongRoPE make one table for each length they resolve to: this call
    makes that of ``seq_len``, else of ``max_position_embeddings``. ``backward``: also what the
    gradients of such calls run.
    """
    where = torch.device(device)
    plan_of(spec, seq_len)
    flag("backward", backward)
    dtype_name("dtype", dtype)
    if weight_dtype is not None:
        dtype_name("weight_dtype", weight_dtype)
    if where.type == "cpu":
        _native.lib().cpu_isa()
    elif where.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: got {where}, expected one that is here: no CUDA device is")
        from .cuda import launch

        owners: dict[Variant, Plan] = {}
        scaling = spec.rope.scaling if spec.rope else None
        unscaled = {"table", "inv_freq"} if isinstance(scaling, DynamicNTK) else {"table"}
        for back in (False, True) if backward else (False,):
            own = once_of(spec) if back else spec
            plan, bare = plan_of(own, seq_len), plan_of(bare_of(own))
            for angle in ("phase", "inv_freq", "table") if spec.rotary_dim else ("none",):
                for general in (False, True):
                    variant = _variant(own, dtype, weight_dtype, angle, general, back)
                    owners[variant] = bare if angle in unscaled else plan
        launch.compile_ahead(owners, _index(where))
        for variant, owner in owners.items():
            launch.build(owner, launch.slot_key(variant, _index(where)))
    else:
        raise ValueError(f"device: expected cpu or cuda, got {where}")


def _variant(
    spec: Spec,
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    angle: str,
    general: bool = False,
    backward: bool = False,
) -> Variant:
    name = dtype_name("dtype", dtype)
    weight = dtype_name("weight_dtype", weight_dtype) if weight_dtype is not None else name
    return Variant.of(spec, name, weight, weight, angle, general, backward)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
