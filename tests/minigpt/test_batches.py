"""The order of the data: every epoch all of the text, as a pure function of seed and step."""

import pytest
import torch

from minigpt.batches import Batches
from minigpt.errors import UserError


def starts(batches, count):
    """Where each window of the first `count` batches starts; the text must be 0, 1, 2, ..."""
    return [int(row[0]) for index in range(count) for row in batches[index][0]]


@pytest.mark.parametrize(
    ("length", "window", "batch"), [(1000, 7, 4), (97, 1, 5), (65, 64, 3), (129, 64, 12), (10, 4, 1)]
)
def test_windows_follow_the_text_and_targets_are_the_next_tokens(length, window, batch):
    batches = Batches(torch.arange(length), window, batch, seed=1)
    for index in (0, 1, 17, 10**6):
        inputs, targets = batches[index]
        assert inputs.shape == targets.shape == (batch, window) and inputs.dtype == torch.int64
        assert torch.equal(targets, inputs + 1) and int(targets.max()) < length
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(window))


def test_an_epoch_is_all_of_the_text_once_and_cut_elsewhere_each_time():
    length, window = 1000, 7
    per_epoch = length // window - 1
    seen = starts(Batches(torch.arange(length), window, 1, seed=3), 3 * per_epoch)
    epochs = [seen[i : i + per_epoch] for i in range(0, len(seen), per_epoch)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(min(epoch), min(epoch) + per_epoch * window, window))
        assert epoch != sorted(epoch)
    assert len({min(epoch) for epoch in epochs}) > 1
    orders = [[(start - min(epoch)) // window for start in epoch] for epoch in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]  # not only cut elsewhere


@pytest.mark.parametrize("batch", [1, 4, 50, 137, 300])
def test_batches_across_the_ends_of_epochs_leave_nothing_out(batch):
    """Each window of an epoch once, none of the next before that, whatever the batch; each batch asked for alone."""
    length, window = 1000, 7
    per_epoch = length // window - 1
    one_by_one = starts(Batches(torch.arange(length), window, 1, seed=3), 3 * per_epoch)
    count = 3 * per_epoch // batch
    alone = [start for i in range(count) for start in starts_of(Batches(torch.arange(length), window, batch, 3)[i])]
    assert alone == one_by_one[: count * batch] and count


def starts_of(batch):
    return batch[0][:, 0].tolist()


def test_the_order_depends_on_nothing_but_seed_and_number():
    text = torch.arange(500)
    forward, backward = Batches(text, 8, 6, seed=5), Batches(text, 8, 6, seed=5)
    expected = {index: forward[index][0] for index in range(40)}
    for index in reversed(range(40)):
        assert torch.equal(backward[index][0], expected[index])
    assert not torch.equal(Batches(text, 8, 6, seed=6)[0][0], expected[0])


def test_half_the_batch_twice_is_the_batch():
    text = torch.arange(300)
    whole, half = Batches(text, 8, 6, seed=5), Batches(text, 8, 3, seed=5)
    for index in range(30):
        assert torch.equal(whole[index][0], torch.cat([half[2 * index][0], half[2 * index + 1][0]]))


def test_every_window_of_a_short_text_turns_up():
    batches = Batches(torch.arange(11), 4, 2, seed=0)
    assert set(starts(batches, 200)) == set(range(11 - 4))


def test_a_text_shorter_than_a_window_is_refused():
    Batches(torch.arange(9), 8, 1, seed=0)
    for length in (8, 1, 0):
        with pytest.raises(UserError, match=f"has {length} tokens, and one window needs 9"):
            Batches(torch.arange(length), 8, 1, seed=0)
