"""The memory bank: what is written stands there, and survives a checkpoint."""

import torch

from sela_ext.training.bank import Bank

CPU = torch.device("cpu")


def filled(valid):
    bank = Bank(len(valid), CPU)
    bank.fill(torch.zeros(len(valid), 3, dtype=torch.bfloat16), torch.tensor(valid))
    return bank


def test_a_bank_begins_with_nothing_valid():
    assert not Bank(31, CPU).valid.any()


def test_what_is_written_stands_at_its_images_in_the_banks_own_type():
    bank = filled([True] * 5)
    bank.write(torch.tensor([4, 1]), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], requires_grad=True))
    assert bank.embeddings.dtype is torch.bfloat16
    assert not bank.embeddings.requires_grad
    assert bank.embeddings[[4, 1]].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert not bank.embeddings[[0, 2, 3]].any()


def test_an_image_that_is_seen_for_the_first_time_becomes_valid():
    bank = filled([True, False, False])
    bank.write(torch.tensor([2]), torch.ones(1, 3))
    assert bank.valid.tolist() == [True, False, True]


def test_a_bank_comes_back_from_its_state():
    bank = filled([True, False])
    bank.write(torch.tensor([0]), torch.ones(1, 3))
    other = Bank(2, CPU)
    other.load(bank.state())
    assert torch.equal(other.embeddings, bank.embeddings)
    assert torch.equal(other.valid, bank.valid)
