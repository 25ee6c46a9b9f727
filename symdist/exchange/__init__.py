"""The exchange: decides where rules run and answers what they ask of other ranks."""

from symdist.exchange.jobs import Job, Placement, Stack
from symdist.exchange.placement import describe, place
from symdist.exchange.scheduler import Task, run
from symdist.exchange.transport import Collectives, Counting, Transport

__all__ = [
    "Collectives",
    "Counting",
    "Job",
    "Placement",
    "Stack",
    "Task",
    "Transport",
    "describe",
    "place",
    "run",
]
