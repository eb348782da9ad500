"""What every test of a site leaves behind: nothing."""

from __future__ import annotations

import asyncio

import pytest


@pytest.fixture(autouse=True)
async def nothing_goes_on():
    """Trainings that nobody asked for end with their test, and give their reservations back."""
    yield
    begun = [task for task in asyncio.all_tasks() if task.get_name() == "training"]
    for task in begun:
        task.cancel()
    if begun:
        await asyncio.wait(begun)
        if rest := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(rest, timeout=5.0)
