"""Losses of a run: looked at a step late, means since the last entry of the log, over steps and ranks."""

from types import SimpleNamespace

import pytest
import torch

from sela_ext.errors import NumericsError
from sela_ext.training.losses import Losses
from sela_ext.training.run import StepOutput


class TwoRanks:
    """This rank and another one, which has the same losses at its share."""

    several, world_size = True, 2

    def __init__(self):
        self.calls = 0

    def totals(self, values):
        self.calls += 1
        return [2 * value for value in values]


ALONE = SimpleNamespace(several=False, world_size=1, totals=list)


def make_run(ranks):
    return SimpleNamespace(
        ranks=ranks,
        state={"step": 7, "loss_sum": 0.0, "loss_steps": 0, "part_sums": {}},
        source=SimpleNamespace(name=lambda i: f"image {i}"),
        folder=SimpleNamespace(checkpoints="checkpoints"),
        options=SimpleNamespace(lr=0.5),
    )


def take(losses, loss, index=(0,), share=1.0, **parts):
    scalars = {name: torch.tensor(value) for name, value in parts.items()}
    losses.take(StepOutput(torch.tensor(loss), torch.zeros(1, 2), scalars), torch.tensor(index), share)


def test_means_are_of_the_steps_since_the_last_means():
    run = make_run(ALONE)
    losses = Losses(run)
    take(losses, 1.0, swap=4.0)
    take(losses, 2.0, swap=8.0)
    assert (run.state["loss_sum"], run.state["loss_steps"]) == (1.0, 1)  # the last one is not looked at yet
    losses.add_up()
    assert losses.means() == {"loss": 1.5, "swap": 6.0}
    take(losses, 5.0, swap=1.0)
    losses.add_up()
    losses.add_up()  # adds no step twice
    assert losses.means() == {"loss": 5.0, "swap": 1.0}
    assert losses.means() == {"loss": 0.0}


def test_ranks_are_added_up_once_where_that_is_needed_and_weighed_by_their_shares():
    ranks = TwoRanks()
    run = make_run(ranks)
    losses = Losses(run)
    for loss in (1.0, 3.0):
        take(losses, loss, share=0.5, swap=2 * loss)
    assert ranks.calls == 0
    losses.add_up()
    assert ranks.calls == 1
    assert losses.means() == {"loss": 1.0, "swap": 2.0}


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
@pytest.mark.parametrize("seen_by", ["take", "add_up"])
def test_a_loss_that_is_not_finite_is_an_error_with_step_images_and_remedy(loss, seen_by):
    losses = Losses(make_run(ALONE))
    take(losses, loss, index=(4, 2, 9, 1))
    words = rf"loss is {loss} at step 7, in a batch with image 4, image 2, image 9, \.\.\..*lower lr \(now 0\.5\)"
    with pytest.raises(NumericsError, match=words):
        losses.add_up() if seen_by == "add_up" else take(losses, 1.0)
