"""`python -m benchmarks compare`: verdicts row by row, and what it refuses to compare."""

import copy

import pytest
from test_stats import times

from benchmarks import comparison, results
from minigpt.errors import UserError


def pair(document, ratio=1.0):
    a, b = copy.deepcopy(document), copy.deepcopy(document)
    a["rows"][0]["samples_ms"], b["rows"][0]["samples_ms"] = times(1), times(2, scale=ratio)
    a["rows"][1]["samples_ms"], b["rows"][1]["samples_ms"] = times(3), times(4)
    return a, b


@pytest.mark.parametrize(("ratio", "verdict"), [(1.0, "SAME"), (1.1, "SLOWER"), (0.9, "FASTER")])
def test_verdicts(ratio, verdict, document):
    found, unmatched = comparison.compare(*pair(document, ratio))
    assert [c.verdict for c in found.values()] == [verdict, "SAME"] and unmatched == []
    text = comparison.table(found)
    assert verdict in text and "layer_norm 768 float32 forward torch" in text


def test_a_file_is_the_same_as_itself(document):
    document["rows"][0] |= results.timed([1.0, 30.0] * 5)
    document["rows"][1] |= results.timed([1.0, 2.0, 9.0] * 4)
    found, _ = comparison.compare(document, copy.deepcopy(document))
    assert [c.verdict for c in found.values()] == ["SAME", "SAME"]
    assert all(c.low > 0 for c in found.values())


def test_rows_of_one_file_are_named(document):
    a, b = pair(document)
    b["rows"] = b["rows"][:1]
    found, unmatched = comparison.compare(a, b)
    assert len(found) == 1 and unmatched == ["layer_norm 768 float32 forward eager"]
    b["rows"] = []
    with pytest.raises(UserError, match="no row is timed in both"):
        comparison.compare(a, b)


def test_files_of_two_devices_or_kinds_are_refused(document):
    a, b = pair(document)
    b["machine"]["slug"] = "another"
    with pytest.raises(UserError, match="--force-gpu"):
        comparison.compare(a, b)
    assert len(comparison.compare(a, b, force_gpu=True)[0]) == 2
    b["kind"] = "train"
    with pytest.raises(UserError, match="no rows in common"):
        comparison.compare(a, b, force_gpu=True)


def test_what_else_differs_is_told(document):
    a, b = pair(document)
    assert comparison.differences(a, b) == []
    b["versions"]["torch"] = "9.9"
    b["ceilings"]["copy_gbps"] = 20.0
    told = " ".join(comparison.differences(a, b))
    assert "torch is" in told and "9.9" in told and "a plain copy moved 10 GB/s in A and 20" in told
