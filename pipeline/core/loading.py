"""Loading: a word to the user before a library is imported that takes seconds."""

import logging
import sys

logger = logging.getLogger(__name__)

NAMES = {"torch": "PyTorch", "datasets": "Hugging Face datasets", "matplotlib": "Matplotlib"}


def say_loading(*modules: str) -> None:
    """Say which of some libraries are about to be imported; nothing of those that are there."""
    missing = [NAMES[module] for module in modules if module not in sys.modules]
    if missing:
        logger.info("Loading %s.", " and ".join(missing))
