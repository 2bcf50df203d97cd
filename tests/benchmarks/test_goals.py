"""Goals: the worst case counts, what was not measured is said to be, and the page is what the files say."""

import json

import pytest

from benchmarks import goals, results
from benchmarks.goals import GOALS, NO_GPU, UNMEASURED
from minigpt.errors import UserError

GPU = {"slug": "nvidia-h200", "name": "NVIDIA H200", "type": "cuda"}


def row(op, case, which, provider, ms, **more) -> dict:
    key = {"op": op, "case": case, "dtype": "bfloat16", "pass": which, "provider": provider}
    return key | results.timed([ms] * 6) | {"gbps": 1.0, "tflops": 1.0, "intensity": 1.0} | more


def step(preset, configuration, rate, **more) -> dict:
    speeds = {"tokens_per_second": rate, "p20_tokens_per_second": rate, "p80_tokens_per_second": rate}
    key = {"preset": preset, "configuration": configuration}
    return key | results.timed([1.0] * 6) | speeds | {"tokens_per_step": 1} | more


def document(kind, *rows, machine=GPU, **more) -> dict:
    return results.new(kind, {}) | {"machine": dict(machine), "rows": list(rows)} | more


def said(documents) -> dict[str, str]:
    """What the table says of each bar, by the bar's text; of moonshots and of two bars of one text the last."""
    lines = [line.split(" | ") for line in goals.tables(documents).split("\n\n")[0].splitlines()[2:]]
    return {line[1].removeprefix("moonshot: "): line[2].rstrip(" |") for line in lines}


def test_without_a_gpu_nothing_is_claimed():
    found = said([])
    assert set(found.values()) == {NO_GPU}
    assert len(goals.tables([]).split("\n\n")[0].splitlines()) == 2 + sum(
        len(goal.bars) + bool(goal.moonshot) for goal in GOALS
    )


def test_every_case_that_a_bar_names_is_benchmarked():
    from benchmarks import problems

    known = {(op.name, case.name) for op in problems.ops_named([]) for case in problems.all_cases(op, True, False)}
    wanted = {(goals.ATTENTION, case) for case in (*goals.LENGTHS, *goals._HEADS, *goals._DROPPED)}
    wanted |= {(op, case) for op in goals._BOTH_NORMS for case in goals.NORMS}
    wanted |= {("cross_entropy", case) for case in goals.LOSSES} | {("decode_attention", c) for c in goals.CACHES}
    wanted |= {("linear_cross_entropy", "gpt2")}
    assert wanted <= known and wanted == {(op.name, name) for op in problems.ops_named([]) for name in goals.cases(op)}


def test_what_the_goals_name_is_measured_first():
    """A run may end early. Nothing is left out, and among the first ten every op has its turn."""
    from benchmarks import problems, suite

    ops = problems.ops_named([])
    turns = [(op.name, case.name) for op, case in suite.in_order(ops, True, False)]
    named = [turn for turn in turns if turn[1] in goals.cases(next(op for op in ops if op.name == turn[0]))]
    assert turns[: len(named)] == named
    assert sorted(turns) == sorted((op.name, case.name) for op in ops for case in problems.all_cases(op, True, False))
    assert {op for op, _ in turns[:10]} == {op for op, _ in named}


def test_the_worst_case_and_the_best_peer_count():
    rows = [
        row(goals.ATTENTION, "d64-1024", "forward", name, ms)
        for name, ms in (("triton", 2.0), ("torch-flash", 3.0), ("flex", 2.5), ("torch-cudnn", 1.0))
    ]
    rows += [row(goals.ATTENTION, "d128", "forward", name, ms) for name, ms in (("triton", 2.0), ("flex", 1.8))]
    found = said([document("kernels", *rows)])
    assert found["1.0 x the best of SDPA-flash and FlexAttention"] == (
        "missed, 0.90 x (d128 forward without torch-flash, 1 of 12 cases)"
    )
    assert found["1.0 x SDPA-cuDNN"] == "missed, 0.50 x (d64-1024 forward, 1 of 12 cases)"


def test_a_ratio_has_both_sides_of_one_run():
    """What was timed on another day, at another clock, is no peer; the newest run that has both counts."""

    def run(date, *times, case="v65"):
        return document(
            "kernels", *(row("cross_entropy", case, "forward+backward", n, ms) for n, ms in times), date=date
        )

    bar = "1.5 x torch.compile"
    apart = [run("2026-01-02", ("triton", 1.0)), run("2026-01-01", ("compile", 9.0))]
    assert said(apart)[bar] == UNMEASURED
    both = [run("2026-01-03", ("triton", 1.0), ("compile", 2.0)), run("2026-01-01", ("triton", 1.0), ("compile", 3.0))]
    later = run("2026-01-04", ("triton", 0.1))
    assert said([*both, later])[bar] == "so far 2.00 x (v65 forward+backward, 1 of 6 cases)"
    other = run("2026-01-05", ("triton", 1.0), ("compile", 1.6), case="v1024")
    assert said([other, *both, later])[bar] == "so far 1.60 x (v1024 forward+backward, 2 of 6 cases)"
    steps = [document("train", step("gpt2", name, rate)) for name, rate in (("nanoGPT", 1e5), ("triton", 2e5))]
    assert said(steps)["1.1 x nanoGPT, compiled"] == UNMEASURED


def test_a_bar_is_met_when_every_case_and_every_peer_is_there():
    cases = [(case, which) for case in goals.CACHES for which in ["forward"]]
    rows = [row("decode_attention", case, which, "triton", 1.0) for case, which in cases]
    rows += [row("decode_attention", case, which, peer, 2.0) for case, which in cases for peer in goals._SDPA]
    bar = "1.0 x the best of SDPA"

    def told(rows):
        lines = goals.tables([document("kernels", *rows)]).splitlines()
        return next(line for line in lines if line.startswith("| decode_attention, ")).split(" | ")[2].rstrip(" |")

    assert bar in said([]) and told(rows) == "**met**, 2.00 x (gpt2 forward)"
    assert told(rows[1:]) == "so far 2.00 x (gpt2-batch forward, 6 of 7 cases)"
    last = rows[-1]
    assert told(rows[:-1]) == "so far 2.00 x (gpt2 forward, 6 of 7 cases)"
    key = {name: last[name] for name in results.KEYS["kernels"]}
    broken, unable = ([*rows[:-1], key | {"status": status, "reason": "why"}] for status in ("error", "skipped"))
    assert told(broken) == "so far 2.00 x (gpt2 forward, 6 of 7 cases)"
    assert told(unable) == "**met**, 2.00 x (gpt2 forward)", "nobody is held to what cannot do it"
    older = document("kernels", *rows, date="2026-01-01")
    newer = document("kernels", *[row for row in rows if row["provider"] != "torch-cudnn"], date="2026-01-02")
    line = next(line for line in goals.tables([newer, older]).splitlines() if line.startswith("| decode_attention, "))
    assert "**met**" in line, "of a run without a peer less is known than of an older one with it"


def test_shares_memory_training_and_cold_start():
    norms = [row(op, case, "forward", "triton", 1.0, roofline_percent=91 + n)
             for op in goals._BOTH_NORMS for n, case in enumerate(goals.NORMS)]  # fmt: skip
    losses = [
        row("linear_cross_entropy", "gpt2", "forward+backward", name, 1.0, peak_memory_mib=mib)
        for name, mib in (("triton", 90.0), ("torch", 1000.0))
    ]
    steps = [step("shakespeare", "nanoGPT", 1e6), step("shakespeare", "triton", 1.9e6),
             step("shakespeare", "triton+graph", 2.1e6), step("gpt2", "triton", 4e5, peak_memory_mib=10.0),
             step("gpt2", "torch+compile", 3e5, peak_memory_mib=9.0)]  # fmt: skip
    start = {"preset": "shakespeare", "configuration": "triton"} | results.timed([14_000.0] * 3)
    found = said([document("kernels", *norms, *losses), document("train", *steps), document("start", start)])
    assert found["90% of a clone's bandwidth"] == "**met**, 91% (layer_norm 384 forward)"
    assert found["95%"] == "missed, 91% (layer_norm 384 forward)"
    assert found["a tenth of its memory"] == "**met**, 0.09 x"
    assert found["2 x nanoGPT, compiled"] == "**met**, 2.10 x" and found["3 x"] == "missed, 2.10 x"
    assert found["peak memory below `torch+compile`'s"] == "missed, 1.11 x"
    assert found["500,000 tokens/s"] == "missed, 400,000 tokens/s"
    assert found["15 s"] == "**met**, 14.0 s" and found["5 s"] == "missed, 14.0 s"


def test_floors_by_hand():
    """layer_norm of 16384 x 768 in bf16: the input once, the output once, two weights and two statistics."""
    lines = goals.tables([]).splitlines()
    line = next(line for line in lines if line.startswith("| layer_norm | 768"))
    moved = 2 * 16384 * 768 * 2 + 2 * 768 * 2 + 2 * 16384 * 4
    assert float(line.split(" | ")[3]) == pytest.approx(moved / 4800e3, rel=5e-3)
    line = next(line for line in lines if line.startswith("| scaled_dot_product_attention | d128 |"))
    flops = 4 * 16 * 4 * (4096 * 4097 // 2) * 128
    assert float(line.split(" | ")[3].replace(",", "")) == pytest.approx(flops / 989.4e6, rel=5e-3)
    halved = document("kernels", ceilings={"copy_gbps": 2400.0, "matmul_tflops_bfloat16": 494.7})
    assert "measured on NVIDIA H200" in goals.tables([halved])


def test_files_without_a_gpu_or_of_two_are_refused(tmp_path):
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(results.new("kernels", {})))
    if results.load(path)["machine"]["type"] == "cpu":
        with pytest.raises(UserError, match="measured without a GPU"):
            goals._gpu(path)
    other = document("kernels", machine=GPU | {"slug": "nvidia-a100"})
    with pytest.raises(UserError, match="two devices"):
        goals.tables([document("kernels"), other])


def test_the_page_is_what_its_files_say():
    text = goals.PAGE.read_text(encoding="utf-8")
    assert goals.written(text, goals.MARKERS.search(text)[1].split()) == text
    with pytest.raises(UserError, match="has no section"):
        goals.written("nothing", [])
