"""What a file that cannot be read as weights raises, and the words for why and what to do."""

from __future__ import annotations


class WeightsError(ValueError):
    """A file cannot be read as weights. The message says which one, why, and what to do."""


def refused(why: str) -> WeightsError:
    """Of a file that wants more than to describe arrays."""
    return WeightsError(
        f"{why}. Only arrays and plain containers are read, and nothing in a file is run. If you trust its origin, "
        "load it with PyTorch on a machine you can spare and save its state dict with safetensors"
    )


def damaged(why: str) -> WeightsError:
    """Of a file that contradicts itself or ends too early."""
    return WeightsError(f"{why}. The file is damaged, incomplete or of another kind: download or copy it again")


def short(text: str) -> str:
    """Text out of a file, quoted and cut for a message.

    Example:
      >>> short("os.system"), short("a" * 99)[-8:]
      ("'os.system'", "aaaa'...")
    """
    return ascii(text[:80]) + ("..." if len(text) > 80 else "")
