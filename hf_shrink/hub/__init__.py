"""The Hub: whose token, which repository, and files on their way there. Knows nothing of models."""

from hf_shrink.hub.destination import Destination, check_destination
from hf_shrink.hub.upload import Pushed, upload

__all__ = ["Destination", "Pushed", "check_destination", "upload"]
