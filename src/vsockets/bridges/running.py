"""What programs that serve until they are told to stop have in common."""

from __future__ import annotations

import asyncio


async def first(*awaitables: object) -> None:
    """Return when the first is done, and raise what it raises; the others are called off."""
    tasks = [asyncio.ensure_future(one) for one in awaitables]  # type: ignore[call-overload]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
