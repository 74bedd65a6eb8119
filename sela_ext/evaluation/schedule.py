"""How linear probes are trained: the published schedules, and every part of them an option."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from sela_ext.errors import OptionError, nearest


@dataclass(frozen=True)
class ProbeSchedule:
    """SGD with a learning rate that is divided at given epochs.

    Attributes:
        epochs: passes over the training images, at least 1.
        batch_size: images per step, at least 2.
        lr: learning rate of the first epoch, above 0.
        factor: what it is multiplied by at each milestone, above 0.
        milestones: epochs, counted from 0, at whose start that happens.
        momentum: of SGD, in [0, 1).
        weight_decay: at least 0.

    Raises:
        OptionError: a value outside its range.

    Example:
        >>> schedule = ProbeSchedule.alexnet()
        >>> [schedule.rate(epoch) for epoch in (0, 9, 10, 35)]
        [0.01, 0.01, 0.001, 1e-05]
    """

    epochs: int
    batch_size: int
    lr: float
    factor: float = 0.1
    milestones: tuple[int, ...] = ()
    momentum: float = 0.9
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "milestones", tuple(sorted(int(epoch) for epoch in self.milestones)))
        for name, low in (("epochs", 1), ("batch_size", 2)):
            if int(getattr(self, name)) != getattr(self, name) or getattr(self, name) < low:
                raise OptionError(
                    f"schedule {name}: expected a whole number of at least {low}, found {getattr(self, name)}"
                )
        for name in ("lr", "factor"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise OptionError(f"schedule {name}: expected a finite number above 0, found {value}")
        if not 0 <= self.momentum < 1:
            raise OptionError(f"schedule momentum: expected a number in [0, 1), found {self.momentum}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise OptionError(
                f"schedule weight_decay: expected a finite number of at least 0, found {self.weight_decay}"
            )

    def rate(self, epoch: int) -> float:
        """The learning rate of an epoch, counted from 0."""
        return float(f"{self.lr * self.factor ** sum(epoch >= at for at in self.milestones):.12g}")

    def stretched(self, epochs: int) -> ProbeSchedule:
        """The same course in another number of epochs: milestones move in proportion, rounded, to 1 at least.

        Example:
            >>> ProbeSchedule.alexnet().stretched(18).milestones
            (5, 10, 15)
        """
        share = epochs / self.epochs
        return dataclasses.replace(
            self, epochs=epochs, milestones=tuple(max(1, round(at * share)) for at in self.milestones)
        )

    @classmethod
    def resnet(cls, epochs: int = 100) -> ProbeSchedule:
        """Pooled features: lr .1, /10 at 85 and 128, batch 1024, no weight decay; 100 epochs, or up to 146.

        Source: Asano et al. 2020, appendix; the authors' code runs 146 epochs.
        """
        return cls(epochs, 1024, 0.1, 0.1, (85, 128), 0.9, 0.0)

    @classmethod
    def alexnet(cls) -> ProbeSchedule:
        """Convolutional layers, as the authors' code has it: 36 epochs, lr .01, /10 at 10, 20 and 30, batch 192."""
        return cls(36, 192, 0.01, 0.1, (10, 20, 30), 0.9, 1e-5)

    @classmethod
    def alexnet_paper(cls) -> ProbeSchedule:
        """Convolutional layers, as the paper says: 36 epochs, lr .01, /5 at 5, 15 and 25, batch 192."""
        return cls(36, 192, 0.01, 0.2, (5, 15, 25), 0.9, 1e-5)


def named_schedule(schedule: str | ProbeSchedule, epochs: int | None = None) -> ProbeSchedule:
    """A schedule by name: "resnet" (100 epochs), "resnet-146", "alexnet" (the authors' code), "alexnet-paper".

    Args:
        schedule: a name, or a schedule, which is taken as it is.
        epochs: stretch it to so many.

    Raises:
        OptionError: unknown name.
    """
    known = {
        "resnet": ProbeSchedule.resnet(),
        "resnet-146": ProbeSchedule.resnet(146),
        "alexnet": ProbeSchedule.alexnet(),
        "alexnet-paper": ProbeSchedule.alexnet_paper(),
    }
    if isinstance(schedule, ProbeSchedule):
        found = schedule
    elif schedule in known:
        found = known[schedule]
    else:
        raise OptionError(
            f"schedule: expected {', '.join(known)} or a ProbeSchedule, found {schedule!r}{nearest(schedule, known)}"
        )
    return found if epochs is None else found.stretched(epochs)
