"""Attention's dropout: one mask forward and backward, drawn by nothing but chance, and drawn again by its seed."""

import math

import numpy as np
import pytest
import torch
from parity import DTYPES, differentiate, generator_of, in_float64, name_of
from test_attention import attention, both, draw, hold_gradient_of_lse, problem, torchs

from kernels.attention import draw_seed
from kernels.catalogue import ATTENTION


def dropout_mask(inputs, options, seed):
    """The mask that a run with this seed multiplies the probabilities with: read off by values that are an identity."""
    query, key = inputs["query"], inputs["key"]
    q_len, k_len = query.shape[-2], key.shape[-2]
    # every score equal, so that a probability is 1 / k_len; each piece of the identity is a head's width of keys
    query, key = torch.zeros_like(query), torch.zeros_like(key)
    width, pieces = query.shape[-1], []
    for start in range(0, k_len, width):
        value = torch.zeros_like(key)
        for column in range(min(width, k_len - start)):
            value[..., start + column, column] = 1.0
        torch.manual_seed(seed)
        kept = attention(query, key, value, **(options | {"is_causal": False, "query_offset": 0}))
        pieces.append(kept[..., : min(width, k_len - start)] * k_len)
    mask = torch.cat(pieces, -1).double()
    keep = 1.0 / (1.0 - round(options["dropout_p"] * 2**16) / 2**16)  # dropout_p is taken in steps of 2^-16
    on = mask > 0.5 * keep
    assert mask.shape == (*inputs["query"].shape[:-1], k_len) and q_len == mask.shape[-2]
    torch.testing.assert_close(
        mask, on.double() * keep, rtol=2e-2 if inputs["query"].dtype != torch.float32 else 1e-3, atol=1e-6
    )
    return on.double() * keep


def hold_one_mask(op, shape, options, dtype, device):
    """Output and every gradient are those of the reference under the mask that the seed gives, in float64."""
    inputs = problem(device, **shape, dtype=dtype)
    mask = dropout_mask(inputs, options, seed=11)
    grad = draw(*inputs["query"].shape, seed=5, dtype=dtype, device=device)
    torch.manual_seed(11)
    ours = differentiate(op.public, op, inputs, options, grad)
    exact_options = {name: value for name, value in options.items() if name != "dropout_p"} | {"dropout_mask": mask}
    truth = differentiate(op.reference, op, in_float64(inputs), exact_options, grad.double())
    for quantity, exact in truth.items():
        error = (ours[quantity].double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
        # an element that one pass drops and the other keeps gives 1e-3 and more
        assert error < 8 * torch.finfo(dtype).eps, f"{quantity}: {error:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"b": 2, "h": 2, "q": 33, "k": 33, "d": 32}, {"dropout_p": 0.2, "is_causal": True}),
        ({"h": 4, "q": 19, "k": 70, "d": 64, "kv_heads": 2}, {"dropout_p": 0.5, "enable_gqa": True}),
        ({"h": 1, "q": 67, "k": 200, "d": 16}, {"dropout_p": 0.3}),
        ({"h": 1, "q": 140, "k": 139, "d": 64}, {"dropout_p": 0.1, "is_causal": True, "query_offset": -1}),
    ],
    ids=["causal", "grouped", "long", "offset"],
)
def test_dropout_is_one_mask_forward_and_backward(shape, options, dtype, device):
    hold_one_mask(ATTENTION, shape, options, dtype, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("q", [20, 130], ids=["short", "long"])
def test_the_log_sum_exp_and_its_gradient_know_no_dropout(q, dtype, device):
    inputs = problem(device, b=2, h=2, q=q, k=70, d=32, dtype=dtype)
    options = {"dropout_p": 0.5, "is_causal": True}
    mask = dropout_mask(inputs, options, seed=11)
    hold_gradient_of_lse(inputs, options, {"is_causal": True, "dropout_mask": mask}, with_output=True, seed=11)


@pytest.mark.parametrize("p", [0.99, 1.0])
@pytest.mark.parametrize("q", [60, 270], ids=["short", "long"])
def test_a_gradient_of_lse_is_as_exact_whatever_is_dropped(q, p, device):
    """Small gradients in fp16: those of the scores must not be rounded before they are divided by what is kept."""
    inputs = problem(device, h=1, q=q, k=q, d=32, dtype=torch.float16)
    for factor in (1.0, 2.0**-9):
        hold_gradient_of_lse(inputs, {"dropout_p": p}, {}, with_output=False, seed=11, factor=factor)


def forward_mask(p: float, seed: int, device, b=2, h=2, q=40, k=64):
    """The probabilities after dropout, 1 / k before: read out with values that are an identity."""
    query, key = (torch.zeros(b, h, length, k, device=device) for length in (q, k))
    torch.manual_seed(seed)
    return attention(query, key, torch.eye(k, device=device).expand(b, h, k, k), dropout_p=p)


def masks_of_both_passes(p: float, seed: int, device, b=2, h=1, q=40, k=64):
    """The kept elements as the forward kernel has them, and the two of the backward pass: every probability 1 / k."""
    zeros = {name: torch.zeros(b, h, length, k, device=device) for name, length in (("query", q), ("key", k))}
    identity = torch.eye(k, device=device)

    def differentiated(key, value, grad):
        torch.manual_seed(seed)
        return both(attention, {"query": zeros["query"], "key": key, "value": value}, {"dropout_p": p}, grad)

    each_key = identity.expand(b, h, k, k)
    each_query = identity[:q].expand(b, h, q, k)
    keep = 1 / (1 - round(p * 2**16) / 2**16)
    forward = forward_mask(p, seed, device, b, h, q, k)
    # dvalue = dropped^T grad: with the identity for grad the mask itself, transposed
    by_keys = differentiated(zeros["key"], each_key, each_query)["dvalue"].transpose(-2, -1)[..., :q, :]
    # dquery = scale * p * (mask * keep * dp - delta) key, with dp = 1 and the identity for the keys
    ones = torch.zeros_like(zeros["key"])
    ones[..., 0] = 1.0
    one_each = torch.zeros_like(zeros["query"])
    one_each[..., 0] = 1.0
    result = differentiated(each_key, ones, one_each)
    by_queries = result["dquery"] * k * math.sqrt(k) + result["output"][..., :1]
    return forward, by_keys, by_queries, keep / k


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_both_passes_keep_the_same_elements(p, device):
    forward, by_keys, by_queries, kept = masks_of_both_passes(p, 3, device)
    assert torch.equal(forward > 0.5 * kept, by_keys > 0.5 * kept)
    assert torch.equal(forward > 0.5 * kept, by_queries > 0.5 * kept * forward.shape[-1])
    assert 0.0 < (forward > 0).double().mean().item() < 1.0


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_what_is_kept_is_scaled_exactly(p, device):
    """Zero, or the probability over 1 - p to the bit, p in steps of 2^-16; a probability of 1 / 64 rounds nothing."""
    forward = forward_mask(p, 1, device, h=1)
    scale = torch.tensor(65536 / (65536 - round(p * 65536)), dtype=torch.float32) / 64
    assert set(forward.unique().tolist()) == {0.0, scale.item()}


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.9])
def test_the_share_that_is_kept_is_binomial(p, device):
    """Over everything, and for every row, column and head: within what chance allows, and not closer than it does."""
    masks = torch.stack([forward_mask(p, seed, device) > 0 for seed in range(3)]).double()

    def deviations(mask, dims):
        n = math.prod(mask.shape[dim] for dim in dims)
        return (mask.mean(dims) - (1 - p)) / math.sqrt(p * (1 - p) / n)

    assert deviations(masks, (0, 1, 2, 3, 4)).abs() < 4.5
    for dims in ((2, 3, 4), (1, 3, 4), (0, 1, 2, 3), (4,)):  # each batch, head, column, row
        found = deviations(masks, dims)
        assert found.abs().max() < 5.5, dims
        if found.numel() > 60:  # a mask that repeats itself, or counts what it drops, has another spread
            assert abs(found.std().item() - 1.0) < 5 / math.sqrt(found.numel()), dims


def test_nothing_in_a_mask_hangs_together(device):
    """Correlations of batches, heads, seeds, and neighbours at every distance along rows and columns are chance."""
    masks = torch.stack([forward_mask(0.5, seed, device) > 0 for seed in range(2)]).double() - 0.5

    def correlation(one, other):
        return abs((one * other).mean().item() / 0.25) * math.sqrt(one.numel())  # in standard deviations

    pairs = [(masks[0], masks[1]), (masks[:, 0], masks[:, 1]), (masks[:, :, 0], masks[:, :, 1])]
    for distance in (1, 2, 3, 4, 7, 8, 16, 32):  # 8 keys share a call of the generator
        pairs.append((masks[..., distance:], masks[..., :-distance]))
        pairs.append((masks[..., distance:, :], masks[..., :-distance, :]))
        pairs.append((masks[..., distance:, distance:], masks[..., :-distance, :-distance]))
    pairs.append((masks[..., :40], masks[..., :40].transpose(-2, -1)))
    assert max(correlation(*pair) for pair in pairs) < 4.5
    assert correlation(masks[0], masks[0]) > 100, "what is told apart here is told apart by nothing"


def test_dropout_mask_does_not_hang_on_tiles(device):
    from kernels.device import INTERPRETED, TARGETS
    from kernels.op import plan_for

    if not INTERPRETED:
        pytest.skip("the device's own tiles run in every other test")
    inputs = problem(device, h=1, q=70, k=90, d=64, dtype=torch.bfloat16)
    options = {"dropout_p": 0.3, "is_causal": True, "query_offset": 20}
    grad = draw(*inputs["query"].shape, seed=5, dtype=torch.bfloat16)
    results = []
    for arch in (None, "sm_90", "gfx942"):
        torch.manual_seed(3)
        if arch is None:
            results.append(both(attention, inputs, options, grad))
        else:
            with plan_for(TARGETS[arch]):
                results.append(both(attention, inputs, options, grad))
    for other in results[1:]:
        for quantity, value in results[0].items():
            error = (other[quantity].double() - value.double()).square().mean().sqrt()
            assert error < 2**-7 * value.double().square().mean().sqrt(), quantity


def test_dropout_at_its_ends(device):
    inputs = problem(device)
    grad = torch.ones_like(inputs["query"])
    everything = both(attention, inputs, {"dropout_p": 1.0, "is_causal": True}, grad)
    expected = both(torchs, inputs, {"dropout_p": 1.0, "is_causal": True}, grad)
    for quantity, value in expected.items():
        torch.testing.assert_close(everything[quantity], value, msg=lambda m, q=quantity: f"{q}: {m}")
    state = generator_of(device).get_rng_state()
    attention(**inputs, dropout_p=0.0)
    assert torch.equal(state, generator_of(device).get_rng_state()), "no dropout, but the generator moved"


def test_dropout_draws_the_next_mask_each_time(device):
    inputs = problem(device)
    torch.manual_seed(0)
    first, second = (attention(**inputs, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, attention(**inputs, dropout_p=0.5))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_dropout_survives_checkpointing(use_reentrant, device):
    """Recomputed in backward, the mask is the same, for the generator's state is restored; and is not if it is not."""
    from torch.utils.checkpoint import checkpoint

    inputs = problem(device)

    def gradients(wrap):
        leaves = [tensor.clone().requires_grad_() for tensor in inputs.values()]
        torch.manual_seed(7)
        out = wrap(lambda q, k, v: attention(q, k, v, dropout_p=0.4, is_causal=True), *leaves)
        torch.rand(3, device=device)  # the generator moves on between the passes
        out.square().sum().backward()
        return [leaf.grad for leaf in leaves]

    plain = gradients(lambda f, *a: f(*a))
    options = {"use_reentrant": use_reentrant}
    kept = gradients(lambda f, *a: checkpoint(f, *a, preserve_rng_state=True, **options))
    lost = gradients(lambda f, *a: checkpoint(f, *a, preserve_rng_state=False, **options))
    assert all(torch.equal(one, two) for one, two in zip(plain, kept, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(plain, lost, strict=True))


def philox(counter, seed: int) -> list[np.ndarray]:
    """Philox-4x32-7 of four uint32 arrays, as Salmon et al. define it."""
    a, b, c, d = (np.asarray(word, dtype=np.uint64) for word in counter)
    low, high = seed % 2**32, seed >> 32 & 0xFFFFFFFF
    for turn in range(7):
        one, two = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        keys = (low + turn * 0x9E3779B9) % 2**32, (high + turn * 0xBB67AE85) % 2**32
        a, c = two >> np.uint64(32) ^ b ^ np.uint64(keys[0]), one >> np.uint64(32) ^ d ^ np.uint64(keys[1])
        b, d = two & np.uint64(0xFFFFFFFF), one & np.uint64(0xFFFFFFFF)
    return [a, b, c, d]


def test_the_philox_here_is_the_published_one():
    """Against Random123's vectors for philox4x32 of 7 rounds."""
    cases = [
        ((0, 0, 0, 0), 0, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        ((2**32 - 1,) * 4, 2**64 - 1, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ]
    for counter, seed, expected in cases:
        assert " ".join(f"{int(word):08x}" for word in philox(counter, seed)) == expected


@pytest.mark.parametrize("k_len", [40, 200], ids=["short", "long"])
@pytest.mark.parametrize("threshold", [1, 6554, 0x7FFF, 0x8000, 0x8001, 52429, 65535])
def test_the_mask_is_philoxs(k_len, threshold, device):
    """Bit for bit: 16 bits an element, kept where they reach the threshold."""
    b, h, q_len = 2, 3, 40
    torch.manual_seed(threshold)
    seed = int(draw_seed(device))
    mask = forward_mask(threshold / 2**16, threshold, device, b, h, q_len, k_len) != 0.0
    groups, queries, heads = np.meshgrid(np.arange(k_len // 8), np.arange(q_len), np.arange(b * h), indexing="ij")
    a, b_, c, d = philox((groups, queries, heads, np.zeros_like(heads)), seed)
    halves = [half for word in (a, c, b_, d) for half in (word & np.uint64(0xFFFF), word >> np.uint64(16))]
    expected = np.stack(halves).astype(np.int64) >= threshold  # (key % 8, key // 8, query, head)
    expected = expected.transpose(3, 2, 1, 0).reshape(b, h, q_len, k_len)
    assert np.array_equal(mask.cpu().numpy(), expected)
    if threshold not in (1, 65535):
        assert 0.9 < expected.mean() / (1 - threshold / 2**16) < 1.1
