"""Work shared out among processes of this machine."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["share_out"]


def share_out(
    work: Callable[..., None],
    of_others: Sequence[tuple[Any, ...]],
    own: Callable[[], None],
) -> None:
    """Does a share of the work here and each of the others in a process of its own, to the end.

    Args:
        work: what others do; it and what it is given can be pickled.
        of_others: its arguments, for each of the other processes.
        own: this process's share.

    Raises:
        ChildProcessError: one of the others failed.
    """
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=work, args=arguments) for arguments in of_others]
    try:
        for process in others:
            process.start()
        own()
        for process in others:
            process.join()
    except BaseException:
        for process in others:
            if process.is_alive():
                process.terminate()
        raise
    if failed := [process.exitcode for process in others if process.exitcode]:
        raise ChildProcessError(
            f"{len(failed)} of {len(others) + 1} processes failed (exit status {failed[0]}). Write "
            "the same again to go on."
        )
