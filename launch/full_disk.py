"""A full disk has as many names as there are libraries that write; here it gets one message."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..core.errors import AfterglowError, RunFolderError

CODES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# What safetensors (Rust) and torch (C++) say instead of raising OSError.
WORDS = ("No space left", "Disk quota exceeded", "File too large", "PytorchStreamWriter failed", "unexpected pos")


@contextmanager
def says_when_the_disk_is_full(folder: Path) -> Iterator[None]:
    """Do what writes to a run folder.

    Raises:
        RunFolderError: the disk, the quota or the largest size of a file is exceeded.
    """
    try:
        yield
    except AfterglowError:
        raise
    except Exception as error:
        if not means_full(error):
            raise
        free = shutil.disk_usage(folder).free / 1e9
        raise RunFolderError(
            f"{folder}: could not be written to, the disk or your quota is full ({free:,.2f} GB are free): {error}. "
            "The checkpoints before this one are whole. Make room, or set `save_total_limit`; then the same command "
            "goes on from the last of them."
        ) from error


def means_full(error: BaseException | None) -> bool:
    """Whether an error, or what it came from, is that of a full disk."""
    while error is not None:
        code = getattr(error, "errno", None)
        if code in CODES or (code is None and any(word in str(error) for word in WORDS)):
            return True
        error = error.__cause__ or error.__context__
    return False
