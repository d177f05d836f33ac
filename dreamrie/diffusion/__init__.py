"""DreamBooth on Stable Diffusion: pictures, prior preservation, the model's parts, the task."""

from __future__ import annotations

import logging


def _is_of_interest(record: logging.LogRecord) -> bool:
    """Not the remark, made whenever diffusers is imported, that torchvision could resize pictures."""
    return "requires torchvision (not installed)" not in record.getMessage()


# dreamrie resizes with Pillow and needs no torchvision, so nobody has to be told to install it.
logging.getLogger("transformers.utils.import_utils").addFilter(_is_of_interest)
