"""A worker of the check for GPUs whose jobs end it, or never end; apart, so that starting it takes no time."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection

from gpu_check_parts.rows import Row, Settings


def faulty_worker(connection: Connection, settings: Settings) -> None:
    connection.send(([], False))
    while True:
        job = connection.recv()
        if job.name == "dies":
            os._exit(3)
        if job.name == "hangs":
            time.sleep(600)
        connection.send(([Row(job.part, job.name, str(os.getpid()))], job.name == "breaks the GPU"))
