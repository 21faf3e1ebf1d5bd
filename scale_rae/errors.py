"""Errors a user can cause and mend. Each says what is wrong, where, and what would be right.

The command line prints them in one line and exits 1.
"""


class ScaleRAEError(Exception):
    """Base of every error this package raises on purpose."""


class ConfigError(ScaleRAEError):
    """A config.json that is missing, unreadable, or asks for something unsupported."""


class CheckpointError(ScaleRAEError):
    """Weights, tokenizer or decoder files that are missing, damaged, or do not fit their config."""


class HubError(ScaleRAEError):
    """A model hub that could not be reached, or that refused."""


class InputError(ScaleRAEError):
    """A prompt, image, latent or option value that cannot be used."""


class DeviceError(ScaleRAEError):
    """A device that is not there, or whose memory is too small."""


class OutputError(ScaleRAEError):
    """A result that could not be written."""


def out_of_memory(error: BaseException | None) -> bool:
    """Whether an error is, or was caused by, a lack of memory on whatever device."""
    import torch

    while error is not None:
        if isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(error, RuntimeError) and ("allocate memory" in str(error) or "out of memory" in str(error)):
            return True  # the CPU's and MPS's
        error = error.__cause__
    return False
