"""The self-check on the real card: it passes, is kept, and is shown."""

import pytest
import torch

from sela_ext import kernels
from sela_ext.cli import main
from sela_ext.kernels import check_cases, self_check

pytestmark = pytest.mark.gpu


@pytest.fixture
def checked(cuda, monkeypatch):
    """The real card, its verdict not known yet."""
    monkeypatch.delenv("SELA_SELF_CHECK")
    monkeypatch.setattr("sela_ext.kernels.self_check._verdicts", {})
    monkeypatch.setattr("sela_ext.kernels.device._usable", {})
    return cuda


def test_every_case_agrees_with_the_cpu(cuda):
    runs = self_check.OnCard(self_check.open_device(cuda.place))
    differences = {what: differs() for what, differs in check_cases.cases(runs)}
    assert {what: found for what, found in differences.items() if found is not None} == {}


def test_the_card_passes_and_its_verdict_is_kept(checked, monkeypatch, capsys):
    verdict = kernels.device_verdict(checked.place)
    assert (verdict.state, verdict.kept) == ("passed", False), str(verdict)
    monkeypatch.setattr("sela_ext.kernels.self_check._verdicts", {})
    assert kernels.device_verdict(checked.place).kept
    with pytest.raises(SystemExit) as caught:
        main(["info"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert str(kernels.device_verdict(checked.place)) in shown
    assert torch.cuda.get_device_name(checked.place) in shown


def test_the_card_is_told_apart_by_uuid_and_driver(cuda):
    card = self_check.open_device(cuda.place)
    assert len(card.uuid) > 8
    assert card.driver != "unknown"
    assert card.capability == torch.cuda.get_device_capability(cuda.place)
    assert card.alive()
