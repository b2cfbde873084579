"""Tasks for the test of isolated workers, which import them by name."""

import os
import time


def misbehave(task: str) -> str:
    """Answer in capitals, except where told to die or to hang."""
    if task == "die":
        os.abort()
    if task == "hang":
        time.sleep(60)
    return task.upper()
