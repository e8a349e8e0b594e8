"""Getting a compressed model's quality back."""

from hf_shrink.training.recovery.checkpoint import recover_checkpoint
from hf_shrink.training.recovery.options import Recovery
from hf_shrink.training.recovery.recover import Recovered, recover

__all__ = ["Recovered", "Recovery", "recover", "recover_checkpoint"]
