"""The least time of a step: bytes, operations and launches against counts by hand."""

import json
from pathlib import Path

import pytest
import torch

from minigpt.config import preset
from minigpt.errors import UserError
from profiling import floor
from profiling.__main__ import parser
from profiling.limits import PRODUCTS

H200 = PRODUCTS["H200 SXM"]


def counted(function) -> list[floor.Work]:
    with floor.Counter("sm_90") as counter:
        function()
    return counter.work


def test_ops_by_hand():
    a, b, ids = torch.ones(8, 16), torch.ones(16, 4), torch.zeros(3, dtype=torch.int64)
    (product,) = counted(lambda: a @ b)
    assert (product.bytes, product.flops) == (4 * (8 * 16 + 16 * 4 + 8 * 4), 2 * 8 * 16 * 4)
    assert product.us(H200) == pytest.approx(max(1024 / 66.9e6, 896 / 4.8e6))
    assert counted(lambda: (a.t(), a[2:], a.view(-1), torch.empty_like(a), a.detach(), a.expand(3, 8, 16))) == []
    assert [each.bytes for each in counted(lambda: a.add_(1.0))] == [2 * 4 * 128]
    assert [each.bytes for each in counted(lambda: a[:1].expand(8, 16) + a)] == [4 * (16 + 2 * 128)]
    assert [each.bytes for each in counted(lambda: torch.embedding(a, ids))] == [2 * 4 * 3 * 16 + 8 * 3]
    (foreach,) = counted(lambda: torch._foreach_mul_([a, b], 2.0))
    assert foreach.bytes == 2 * 4 * (128 + 64)


def test_tensor_cores_are_for_halves_alone():
    work = floor.Work("aten::mm", "", 1, 0, 10**12, "bfloat16")
    assert work.us(H200) == pytest.approx(1e6 / 989.4)
    assert floor.Work("aten::mm", "", 1, 0, 10**12, "float32").us(H200) == pytest.approx(1e6 / 66.9)


@pytest.mark.parametrize("kernels", ["torch", "triton"])
def test_a_step_of_the_tiny_model(kernels):
    """Products by the formula 6 N tokens and attention's, launches of ours by the plans."""
    config = preset("tiny", kernels=kernels, dtype="bf16", batch_size=2, block_size=128, window=0)
    step = floor.count(config)
    rows, width, tokens = 2 * 128, 64, 128
    products = 6 * rows * (2 * 12 * width**2 + width * floor_vocabulary(config))
    attention = (2 + 5) * 2 * tokens * (tokens + 1) // 2 * width * 2 * 2
    seen = sum(work.flops for work in step.work if "attention" not in work.op)
    causal = sum(work.flops for work in step.work if "attention" in work.op)
    assert seen == products
    assert causal == (attention if kernels == "triton" else 7 * 2 * tokens * tokens * width * 2 * 2)
    ours = [work for work in step.work if work.op.startswith("kernels::")]
    assert bool(ours) == (kernels == "triton")
    if ours:
        assert [work.launches for work in ours if work.op == "kernels::attention_qkvpacked"] == [1, 1]
        assert [work.launches for work in ours if work.op == "kernels::attention_qkvpacked_backward"] == [2, 2]
        joined = [work for work in step.work if work.op in ("aten::cat", "aten::stack") and work.phase == "backward"]
        assert not joined, "the gradients of query, key and value are one tensor"
        assert sum(work.launches for work in ours) >= len(step.planned) >= 2 * 3 + 5 * 3 + 2
    assert {work.phase for work in step.work} == {"forward", "backward", "clipping", "AdamW"}


def floor_vocabulary(config) -> int:
    from profiling.estimate import vocabulary

    return vocabulary(config)


def test_the_command(capsys, tmp_path):
    arguments = parser().parse_args(["floor", "--preset", "tiny", "--kernels", "torch", "triton", "--json", "-"])
    assert arguments.run(arguments) == 0
    document = json.loads(capsys.readouterr().out)
    torchs, ours = document["kernels"]
    assert ours["bytes"] < torchs["bytes"] and ours["launches"] < torchs["launches"]
    for row in (torchs, ours):
        for name in ("launches", "bytes", "flops", "us"):
            assert sum(group[name] for group in row["groups"].values()) == pytest.approx(row[name])
        assert row["tokens_per_second"] == pytest.approx(document["tokens"] / row["us"] * 1e6)
    arguments.json = None
    assert arguments.run(arguments) == 0
    said = capsys.readouterr().out
    assert "H200 SXM" in said and "attention" in said and "Counted, not measured" in said
    arguments.kernels = ["cuda"]
    with pytest.raises(UserError, match="unknown kernels 'cuda'"):
        arguments.run(arguments)


def test_the_page_says_what_is_counted():
    page = (Path(__file__).parents[2] / "docs" / "performance.md").read_text(encoding="utf-8")
    found = floor.floors([preset("shakespeare", kernels=name, dtype="bf16") for name in ("torch", "triton")])
    for row in found["kernels"]:
        numbers = f"{row['launches']:,} | {row['bytes'] / 1e9:.2f} | {row['flops'] / 1e12:.2f} | {row['us']:,.0f} |"
        assert f"| `shakespeare`, 16,384 tokens | `{row['kernels']}` | {numbers}" in page
