"""Whether the steps of a stage keep to their shapes, where each new shape means compiling the step again."""

import contextlib
from collections.abc import Iterator

from clipkit.device import Device
from clipkit.errors import UserError

# The first steps of a stage differ from the rest: weights that were just copied, and an optimizer without state.
WARM_UP_STEPS = 3


class StaticShapes:
    """Holds the steps of a stage to the graphs of its first ones: a step that is compiled each time takes minutes."""

    def __init__(self, device: Device) -> None:
        self.device, self.steps = device, 0

    @contextlib.contextmanager
    def step(self, samples_seen: int) -> Iterator[None]:
        """Around a step. Raises UserError when it was compiled again after the warm-up."""
        before = self.device.compilations()
        yield
        self.steps += 1
        found = self.device.compilations() - before
        if found and self.steps > WARM_UP_STEPS:
            raise UserError(
                f"the training step was compiled again at {samples_seen:,} samples ({found} graphs): its shapes "
                "change, and each such step waits for the compiler; PT_XLA_DEBUG_LEVEL=2 shows where, --resume goes on"
            )
