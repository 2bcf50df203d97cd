"""Real kernels as Triton compiles them, one barrier or wait taken out at a time: the emulator must stop, or err.

Not each of them is missed, on these problems. The barrier before the first copies stands before anything was written.
Those between attention's two loops keep the second one's first copies off buffers that the first still reads: which
buffers these are turns with the number of tiles, and here they are others. The wait behind a loop finds nothing under
way, where the loop's last rounds began no copies. A launch's products are there at once in the emulator, so that a
wait for them is missed only where what they read is written again.
"""

import json
from pathlib import Path

import forked
import pytest

from kernels.device import HAS_TRITON

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def mutants(*arguments: str) -> list[dict]:
    done = forked.run(str(Path(__file__).with_name("mutants.py")), *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_barrier_of_a_layer_norm_is_missed():
    (kernel,) = mutants("sm_90", "layer_norm", "long")
    assert kernel["kernel"].startswith("_layer_norm_forward") and len(kernel["outcomes"]) >= 4
    for name, outcome in kernel["outcomes"]:
        assert name == "bar.sync"
        assert "another warp" in outcome and "with no barrier between" in outcome


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90"])
def test_barriers_and_waits_of_attention(arch):
    (kernel,) = mutants(arch, "scaled_dot_product_attention", "one_over_a_tile")
    assert kernel["kernel"] == "_attention_forward"
    by_name = {}
    for name, outcome in kernel["outcomes"]:
        by_name.setdefault(name, []).append(outcome)
    missed = {name: [one for one in outcomes if one != "unnoticed"] for name, outcomes in by_name.items()}
    assert sum(map(len, missed.values())) >= 0.6 * len(kernel["outcomes"])
    assert any("with no barrier between" in one for one in missed["bar.sync"])
    assert any("before the copy to it has been waited for" in one for one in missed["cp.async.wait_group"])
    if arch == "sm_90":
        assert missed["wgmma.wait_group.sync.aligned"]


@pytest.mark.slow
def test_what_orders_the_warps_of_attention_on_hopper():
    """Its one idle arrival says whose turn is first, and no turns are taken here.

    Waits that are not missed are those that keep ptxas from moving code; Triton puts a barrier before each of them. The
    wait for scores alone, once those are there at once, orders nothing.
    """
    tile = "64 64 4 2 1 2 0 1".split()
    (kernel,) = mutants("sm_90", "scaled_dot_product_attention", "longer", *tile)
    assert kernel["kernel"] == "_attention_forward_hopper"
    by_name = {}
    for name, outcome in kernel["outcomes"]:
        by_name.setdefault(".".join(name.split(".")[:2]), []).append(outcome)
    missed = {name: sum(one != "unnoticed" for one in outcomes) for name, outcomes in by_name.items()}
    assert all("nothing completes" in one for one in by_name["mbarrier.arrive"] if one != "unnoticed")
    assert missed["mbarrier.arrive"] == len(by_name["mbarrier.arrive"]) - 1
    assert missed["mbarrier.try_wait"] >= 0.7 * len(by_name["mbarrier.try_wait"])
    assert missed["wgmma.wait_group"] >= 0.6 * len(by_name["wgmma.wait_group"])
    assert missed["bar.sync"] >= 8
