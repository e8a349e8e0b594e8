"""The errors that users see. Each message says what is wrong, why, and what to do instead."""

from __future__ import annotations


class ShrinkError(Exception):
    """Base of everything hf_shrink raises on purpose."""


class RecipeError(ShrinkError):
    """The recipe asks for something that does not exist, contradicts itself, or cannot be met."""


class ArchitectureError(ShrinkError):
    """The model is not built the way the requested step needs."""


class CalibrationError(ShrinkError):
    """The calibration or evaluation data is missing, empty, too short, or produced bad numbers."""


class CheckpointError(ShrinkError):
    """A checkpoint folder cannot be read or written as asked."""


class HubError(ShrinkError):
    """The Hub will not take a push as asked: no token, no permission, a name that holds something else."""


class RecoveryInterrupted(RuntimeError):
    """A recovery after a run did not come to its end. The compressed model is on the disk; the message says how to go
    on.

    No ShrinkError, because something was written.
    """


class PushInterrupted(ConnectionError):
    """A push that began did not come to its end. What was to be pushed is on the disk; the message says how to go on.

    No ShrinkError, because nothing that was asked for is wrong.
    """
