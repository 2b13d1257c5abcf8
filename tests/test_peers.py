"""Other libraries in the bench: what is fed to them, what becomes of the ones that cannot run."""

from __future__ import annotations

import ctypes
import dataclasses
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import qkrope
from qkrope.bench import (
    baselines,
    data,
    driver,
    peer_cubins,
    peer_ops,
    peers,
    runner,
    shapes,
)
from qkrope.cli import main

CPU = torch.device("cpu")
BF16 = torch.bfloat16
QWEN, NEXT, GLM, FLUX = shapes.find_shapes(
    ["Qwen3-0.6B", "Qwen3-Next-80B-A3B", "GLM-4.5-355B", "FLUX.1"]
)
BY_NAME = {peer.name: peer for peer in peers.PEERS}


# ---- machine code: names, arguments, grids ------------------------------------------------------


def parameters(symbol: str) -> str:
    """The parameter list of a mangled kernel name, a letter each: pointer, int, float."""
    listed = symbol[symbol.rindex("Ev") + 2 :]
    listed = re.sub(r"P(K?)(13__nv_bfloat16|[vil]|S\d_)", "p", listed)
    return re.sub(r"S\d_", "p", listed)  # an earlier pointer type again


@pytest.mark.parametrize(
    ("symbols", "letters"),
    [
        (peer_cubins.SGL_KERNEL_SYMBOLS, peer_cubins.SGL_KERNEL_ARGUMENTS),
        (peer_cubins.VLLM_SYMBOLS, peer_cubins.VLLM_ARGUMENTS),
    ],
    ids=["sgl_kernel", "vllm"],
)
def test_arguments_are_those_of_the_mangled_names(symbols: tuple[str, ...], letters: str) -> None:
    assert len(set(symbols)) == len(symbols)
    for symbol in symbols:
        assert parameters(symbol) == letters, symbol


# The offsets that the machine code itself states (EIATTR_KPARAM_INFO of the wheels named in
# peer_cubins.py): the driver packs by natural alignment, so the ctypes must give these.
@pytest.mark.parametrize(
    ("letters", "offsets"),
    [
        (
            peer_cubins.SGL_KERNEL_ARGUMENTS,
            [0, 8, 12, 16, 20, 24, 32, 40, 48, 56, 60, 64, 68, 72, 76],
        ),
        (peer_cubins.VLLM_ARGUMENTS, [0, 8, 12, 16, 20, 24, 32, 40, 48, 56, 60]),
    ],
    ids=["sgl_kernel", "vllm"],
)
def test_argument_bytes_lie_where_the_kernels_read_them(letters: str, offsets: list[int]) -> None:
    fields = [(f"a{i}", type_) for i, type_ in enumerate(peer_cubins.types(letters))]
    packed = type("Packed", (ctypes.Structure,), {"_fields_": fields})
    assert [getattr(packed, name).offset for name, _ in fields] == offsets


def test_grids() -> None:
    assert peer_cubins.sgl_kernel_grid(3, 40) == peer_cubins.Grid(1, 15)  # 120 warps, 8 a block
    # vLLM: one head a warp below 10240 heads, then 4, then 8; from 256 channels 1, 2, 4.
    chosen = [peer_cubins.vllm_grid(n, 40, 128, 128).heads for n in (1, 255, 256, 1023, 1024)]
    assert chosen == [1, 1, 4, 4, 8]
    wide = [peer_cubins.vllm_grid(n, 20, 256, 64).heads for n in (204, 205, 409, 410)]
    assert wide == [1, 2, 2, 4]
    grid = peer_cubins.vllm_grid(1024, 42, 128, 64)
    # 6 warps cover 42 heads of a token; 8 warps a block each hold a table row and 8 heads.
    assert grid == peer_cubins.Grid(8, 1024 * 6 // 8, 8 * (64 * 2 + 8 * 128 * 2))
    assert [peer_cubins.vllm_grid(n, 40, 128, 128).pdl for n in (16, 17)] == [True, False]
    assert peer_cubins.vllm_grid(4096, 40, 128, 12).heads == 1  # 24 bytes a row: no 16-byte copies


@pytest.mark.parametrize("shape", [QWEN, FLUX], ids=lambda shape: shape.name)
def test_launches_carry_the_pointers_of_their_buffer(
    shape: shapes.Shape, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    launched: list[tuple[Any, ...]] = []

    def launcher(kernel: object, blocks: int, block: int, arguments: tuple, **more: Any) -> object:
        launched.append((kernel, blocks, arguments, more))
        return lambda: None

    monkeypatch.setattr(driver, "launcher", launcher)
    monkeypatch.setattr(peer_cubins, "_kernel", lambda device, path, symbol: symbol)
    first = data.make_inputs(shape, 5, BF16, CPU)
    buffers = [first, data.another_buffer(first)]
    pairs = shape is FLUX
    sides = (shape.spec.num_q_heads, shape.spec.num_kv_heads, shape.num_v_heads)
    weights = (first.q_weight.data_ptr(), first.k_weight.data_ptr())

    peers._theta(peer_cubins.sgl_kernel(tmp_path), buffers)
    peers._packed_table(peer_cubins.vllm(tmp_path), buffers)
    for (kernel, blocks, (values, types), more), inputs in zip(launched, 2 * buffers, strict=True):
        assert len(values) == len(types)
        for value, type_ in zip(values, types, strict=True):
            type_(value)  # refuses a float for an int, and a tensor for a pointer
        assert values[:5] == [inputs.qkv.data_ptr(), *sides, shape.spec.q_norm.eps]
        assert tuple(values[5:7]) == weights
        assert blocks == -(-5 * sum(sides[:2]) // 8)
        assert any(tensor is inputs.qkv for tensor in more["keep"])
        if "13__nv_bfloat16" in kernel:
            assert kernel == peer_cubins.sgl_kernel_symbol(128, pairs) and not more["pdl"]
            assert values[7] == shape.spec.rope.theta and values[9:] == [5, 1.0, 1.0, 1.0, 1.0, 128]
            positions, integer, at = more["keep"][-1], torch.int32, 8
        else:
            assert kernel == peer_cubins.vllm_symbol(BF16, 128, pairs, 1) and more["pdl"]
            table = more["keep"][3]
            assert values[7] == table.data_ptr() and table.dtype == BF16 and values[9:] == [5, 128]
            positions, integer, at = more["keep"][-1], torch.int64, 8
        assert positions.dtype == integer and values[at] == positions.data_ptr()
        assert torch.equal(positions.long(), first.positions)


# ---- layouts: a stand-in that computes from what the peer is given ------------------------------


def unfused(  # the arithmetic of every peer, in float32 and in place
    q: torch.Tensor,
    k: torch.Tensor,
    weights: tuple[torch.Tensor, torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    half: bool,
    eps: float,
) -> None:
    for x, weight in ((q, weights[0]), (k, weights[1])):
        norm = torch.nn.functional.rms_norm(x.float(), x.shape[-1:], weight.float(), eps)
        turned = norm[..., : 2 * cos.shape[-1]]
        a, b = turned.chunk(2, -1) if half else (turned[..., 0::2], turned[..., 1::2])
        c, s = cos[:, None].float(), sin[:, None].float()
        a, b = a * c - b * s, b * c + a * s
        turned.copy_(torch.cat((a, b), -1) if half else torch.stack((a, b), -1).flatten(-2))
        x.copy_(norm)


def packed_table(qkv: torch.Tensor, *rest: Any) -> baselines.Call:
    nq, nk, nv, head_dim, eps, qw, kw, table, neox, positions = rest
    assert qkv.shape[1] == (nq + nk + nv) * head_dim and qkv.is_contiguous()
    heads = qkv.unflatten(1, (-1, head_dim))
    cos, sin = table[positions].chunk(2, -1)
    return lambda: unfused(heads[:, :nq], heads[:, nq : nq + nk], (qw, kw), cos, sin, neox, eps)


def views_table(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> baselines.Call:
    qw, kw, table, positions, half, eps = rest
    assert table.dtype == torch.float32 and positions.dtype == torch.int64
    cos, sin = table[positions].chunk(2, -1)
    return lambda: unfused(q, k, (qw, kw), cos, sin, half, eps)


def theta(qkv: torch.Tensor, *rest: Any) -> baselines.Call:
    nq, nk, nv, head_dim, eps, qw, kw, base, neox, positions, *yarn, rotary = rest
    assert yarn == [1.0] * 4 and positions.dtype == torch.int32
    heads = qkv.unflatten(1, (-1, head_dim))
    frequency = base ** (-torch.arange(0, rotary, 2, dtype=torch.float64) / rotary)
    angle = positions[:, None].double() * frequency
    sides = (heads[:, :nq], heads[:, nq : nq + nk])
    return lambda: unfused(*sides, (qw, kw), angle.cos(), angle.sin(), neox, eps)


def rows(q: torch.Tensor, k: torch.Tensor, *rest: Any) -> baselines.Call:
    qw, kw, cos, sin, norm = rest
    assert q.is_contiguous() and k.is_contiguous() and cos.shape[0] == 1
    half = cos.shape[-1] // 2
    assert torch.equal(cos[..., :half], cos[..., half:])

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        weights = (qw + norm.weight_offset, kw + norm.weight_offset)
        unfused(q, k, weights, cos[0, :, :half], sin[0, :, :half], True, norm.eps)
        return q, k

    return call


LAYOUTS = {
    peers._packed_table: packed_table,
    peers._views_table: views_table,
    peers._theta: theta,
    peers._rows: rows,
}


@pytest.mark.parametrize(
    ("bind", "shape"),
    [
        pytest.param(bind, shape, id=f"{bind.__name__}-{shape.name}")
        for bind in LAYOUTS
        for shape in (QWEN, GLM, FLUX)
        if bind is not peers._rows or shape is not FLUX  # Liger has no interleaved pairs
    ],
)
def test_each_layout_means_the_same_case(bind: Any, shape: shapes.Shape) -> None:
    inputs = data.make_inputs(shape, 6, BF16, CPU)
    (call,) = bind(LAYOUTS[bind], [inputs])
    found, _ = runner.check(inputs, None, call)
    # In ulps (2^-8 of the pair at least): a float32 angle is off by 2^-23 of the position, so by
    # 2^-6 of the pair, 4 ulps; cos and sin in bf16 by 2^-9 each, 1 together; the output by 0.5.
    # A swapped weight, position or pair is off by the pair itself, 128 ulps and more.
    assert found.pair_ulp < 6


def test_every_layout_of_a_peer_is_tested() -> None:
    assert {peer.bind for peer in peers.PEERS} == set(LAYOUTS)


def test_the_table_is_the_one_of_the_unfused_chain() -> None:
    inputs = data.make_inputs(GLM, 4, BF16, CPU)
    table = peers.cos_sin_cache(inputs, torch.float32, rows=50)
    assert table.shape == (50, 64)
    cos, sin = data.fp32_cos_sin(GLM.spec, torch.tensor([49]))
    assert torch.equal(table[49:], torch.cat((cos, sin), -1))


# ---- absent, refusing and broken peers ----------------------------------------------------------


def test_a_peer_that_is_nowhere_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    inputs = data.make_inputs(QWEN, 1, BF16, CPU)
    for folder in (None, tmp_path):
        for name, build in peers.builders(folder).items():
            with pytest.raises(baselines.Unmeasured, match="^not installed$"):
                build([inputs])
            assert name in BY_NAME


def test_a_folder_comes_before_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(name: str) -> None:
        raise AssertionError(f"looked for {name}")

    monkeypatch.setattr(peers, "find_spec", no)
    monkeypatch.setattr(peer_ops, "_library", lambda path: SimpleNamespace(rmsnorm=None, rope=None))
    for name in ("sgl_kernel.cubin", "vllm.cubin", "flashinfer.so", "sglang_diffusion.so"):
        (tmp_path / name).touch()
    inputs = data.make_inputs(QWEN, 1, BF16, CPU)
    for name in ("sgl_kernel", "vllm", "flashinfer", "sglang-diffusion"):
        with pytest.raises(baselines.Unmeasured, match="needs CUDA"):
            BY_NAME[name].builder(tmp_path)([inputs])
    with pytest.raises(AssertionError, match="looked for sglang"):  # diffusion's is not it
        BY_NAME["sglang"].builder(tmp_path)([inputs])


def on_cuda(shape: shapes.Shape, dtype: torch.dtype = BF16) -> Any:
    return SimpleNamespace(shape=shape, qkv=SimpleNamespace(is_cuda=True, dtype=dtype))


def changed(**fields: Any) -> shapes.Shape:
    return dataclasses.replace(QWEN, spec=dataclasses.replace(QWEN.spec, **fields))


@pytest.mark.parametrize(
    ("name", "inputs", "why"),
    [
        ("sglang", on_cuda(QWEN), None),
        ("sglang", on_cuda(FLUX), None),
        ("sglang", on_cuda(QWEN, torch.float16), "no float16"),
        ("vllm", on_cuda(QWEN, torch.float16), None),
        ("vllm", on_cuda(QWEN, torch.float32), "no float32"),
        ("vllm", on_cuda(NEXT), "no weight offset"),
        ("liger", on_cuda(NEXT), None),
        ("liger", on_cuda(FLUX), "no interleaved pairs"),
        ("flashinfer", on_cuda(changed(head_dim=96, rope=qkrope.Rope())), "no head_dim 96"),
        ("flashinfer", on_cuda(changed(rope=None)), "only one RMS norm and a rotation"),
        (
            "flashinfer",
            on_cuda(changed(k_norm=qkrope.Norm(eps=1e-3))),
            "only one RMS norm and a rotation",
        ),
        (
            "sglang",
            on_cuda(changed(rope=qkrope.Rope(scaling=qkrope.Linear(factor=2.0)))),
            "no scaling of this kind",
        ),
        ("vllm", on_cuda(changed(rope=qkrope.Rope(scaling=qkrope.Linear(factor=2.0)))), None),
    ],
)
def test_refusals(name: str, inputs: Any, why: str | None) -> None:
    assert BY_NAME[name].refusal(inputs) == why


def test_one_broken_peer_leaves_the_others() -> None:
    def broken(buffers: object) -> list:
        raise RuntimeError("no such thing\nsecond line")

    def wrong(buffers: list[data.Inputs]) -> list[baselines.Call]:
        return [lambda: None for _ in buffers]  # leaves everything as it was

    plan = runner.Plan(
        [QWEN],
        (3,),
        BF16,
        CPU,
        baselines=(),
        peers={"broken": broken, "wrong": wrong, "good": baselines.eager},
        check_baselines=True,
        rounds=1,
    )
    (found,) = runner.run(plan)
    assert found.baselines["broken"] == {"error": "RuntimeError: no such thing"}
    good, bad = found.baselines["good"], found.baselines["wrong"]
    assert good["us"] > 0 and good["speedup"] > 0
    assert 0.5 <= good["worst_ulp"] < 6 < bad["worst_ulp"] and bad["worst_error"] > 1
    assert found.passed  # it is our own result that this says


@pytest.mark.slow
def test_compiled_in_place_matches_eager() -> None:
    for shape in (GLM, FLUX):
        inputs = data.make_inputs(shape, 4, torch.float32, CPU)
        before = inputs.qkv.clone()
        expected = baselines.eager([inputs])[0]()
        got = baselines.compiled_in_place([inputs])[0]()
        assert torch.equal(inputs.qkv, before)  # it has q and k of its own
        for a, b in zip(got, expected, strict=True):
            # A mean of 128 squares in another order, 2^-24 a term, halved by the root.
            torch.testing.assert_close(a, b, rtol=64 * 2.0**-24, atol=64 * 2.0**-24)


# ---- command line -------------------------------------------------------------------------------


def test_dry_run_prints_a_line_a_peer(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    words = ["bench", "--device", "cpu", "--shape", "Qwen3-0.6B", "--baselines", "eager"]
    assert main([*words, "--peers", str(tmp_path), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(peers.PEERS)
    assert "eager" in lines[0] and "ran; worst error" in lines[0]
    assert all(line.endswith("not installed") for line in lines[1:])

    monkeypatch.setitem(baselines.BASELINES, "eager", lambda buffers: 1 // 0)
    assert main([*words, "--dry-run"]) == 1
    assert "ZeroDivisionError: integer" in capsys.readouterr().out


def test_peers_stand_in_a_table_of_their_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    words = ["bench", "--device", "cpu", "--shape", "Qwen3-0.6B", "--tokens", "2", "--peers"]
    assert main([*words, "--baselines", "eager"]) == 0
    out = capsys.readouterr().out
    assert "x ours" in out
    for name in BY_NAME:
        assert re.search(rf"{name} .*not installed", out), name


def test_a_folder_that_is_not_there_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", "cpu", "--peers", "nowhere"]) == 2
    assert "--peers: nowhere is not a folder" in capsys.readouterr().err
