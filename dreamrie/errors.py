"""Every failure a user can meet has a name.

    DreamrieError
    |-- ConfigError       a setting, flag, file name or layer choice that cannot work
    |-- ImageError        a picture that cannot be used
    |-- AdapterError      an adapter file that is damaged, incomplete or made for another model
    |-- CheckpointError   a run folder that cannot be written or read back
    `-- NumericalError    a number that is not finite, or a matrix that lost its rank

A message says what was wrong, where, what was found, what is allowed and what to do.
"""

from __future__ import annotations


class DreamrieError(Exception):
    """Base of all errors that dreamrie raises on purpose."""


class ConfigError(DreamrieError):
    """A setting, flag, path or layer choice cannot work."""


class ImageError(DreamrieError):
    """A picture cannot be decoded or used."""


class AdapterError(DreamrieError):
    """An adapter file is damaged, incomplete or does not fit the model."""


class CheckpointError(DreamrieError):
    """A file or folder of a run cannot be written or read back."""


class NumericalError(DreamrieError):
    """A value is not finite, or a matrix has lost the rank it must have."""
