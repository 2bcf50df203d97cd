"""Attention maps: softmax(Q K^T / sqrt(D)) itself, for every backend, and pictures that show them."""

import json
import re

import pytest
import torch
from matplotlib.image import imread

from minigpt.attention_maps import attention_maps, draw, shown, write_page
from minigpt.backends import resolve
from minigpt.config import ModelConfig
from minigpt.errors import UserError
from minigpt.model import GPT

CPU = torch.device("cpu")
IDX = torch.randint(0, 30, (13,), generator=torch.Generator().manual_seed(3))


def model(kernels="eager", **options):
    torch.manual_seed(4)
    made = GPT(ModelConfig(30, 16, 2, 3, 24, **options), resolve(kernels, CPU))
    with torch.no_grad():
        for block in made.blocks:
            block.attention.qkv.weight *= 5  # so that heads differ
    return made


def softmax_in_float64(made):
    """The maps as the paper has them, from hooks on the products of queries, keys and values."""
    found = []

    def note(module, inputs, qkv):
        q, k, _ = qkv.double().view(13, 3, 3, 8).permute(1, 2, 0, 3)
        scores = (q @ k.mT) / 8**0.5
        found.append(scores.masked_fill(torch.ones(13, 13).triu(1).bool(), -torch.inf).softmax(-1))

    handles = [block.attention.qkv.register_forward_hook(note) for block in made.blocks]
    made.eval()(IDX[None])
    for handle in handles:
        handle.remove()
    return torch.stack(found).detach()


@pytest.mark.parametrize("kernels", ["eager", "torch", pytest.param("triton", marks=pytest.mark.interpreted)])
def test_the_maps_are_the_softmax_of_the_scores(kernels):
    made = model(kernels, dropout=0.5)
    made.train()
    ops = made.ops
    maps = attention_maps(made, IDX)
    assert made.training and made.ops is ops and made.blocks[1].attention.ops is ops
    assert maps.shape == (2, 3, 13, 13) and maps.dtype == torch.float32 and not maps.requires_grad
    torch.testing.assert_close(maps.double(), softmax_in_float64(made), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 3, 13), rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [1, 13, 60])
def test_a_picture_has_a_panel_for_each_head(length, tmp_path):
    maps = torch.rand(2, 3, length, length).tril()
    draw(maps, [shown("\n \x00$"[i % 4]) for i in range(length)], tmp_path / "maps.png", title="a $title_{")
    picture = imread(tmp_path / "maps.png")
    assert picture.shape[1] > picture.shape[0] > 500 and picture[..., :3].std() > 0.01
    with pytest.raises(UserError, match="none/maps"):
        draw(maps, ["x"] * length, tmp_path / "none" / "maps.png")


def test_a_page_holds_the_maps_and_asks_nobody_for_anything(tmp_path):
    maps = torch.rand(2, 3, 4, 4).tril()
    hostile = ["</script><script>alert(1)</script>", "<b>", "&amp;", "\u2028"]
    write_page(maps, hostile, tmp_path / "maps.html", title="<img src=x onerror=alert(1)>")
    page = (tmp_path / "maps.html").read_text()
    assert page.count("<script>") == page.count("</script>") == 1 and "<img" not in page and "<b>" not in page
    assert not re.search(r"https?:|//[a-z]|\bsrc=|\bhref=|@import|fetch\(", page.replace("\\u003cimg src=x", ""))
    assert "default-src 'none'" in page
    data = json.loads(re.search(r"const data = (\{.*\});", page)[1])
    assert data["labels"] == hostile and data["title"].startswith("<img")
    torch.testing.assert_close(torch.tensor(data["maps"]) / 1000, maps, rtol=0, atol=6e-4)


def test_labels_can_be_seen():
    assert shown(" a\n") == "\u2423a\u23ce" and shown("\x00\x1b") == "\\x00\\x1b" and shown("") == "\u2205"
    assert shown("\u202e") == "\\x202e"
