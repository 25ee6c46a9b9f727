"""The exchange: decides where rules run and answers what they ask of other ranks."""

from symdist.exchange.flat_jobs import FlatJob
from symdist.exchange.jobs import Given, Job, Made, Placement, Stack
from symdist.exchange.placement import Plan, place
from symdist.exchange.rehearsal import rehearse
from symdist.exchange.scheduler import Task, run
from symdist.exchange.stages import InStage
from symdist.exchange.trail import ExchangeError, Trail
from symdist.exchange.transport import Collectives, Counting, Transport

__all__ = [
    "Collectives",
    "Counting",
    "ExchangeError",
    "FlatJob",
    "Given",
    "InStage",
    "Job",
    "Made",
    "Placement",
    "Plan",
    "Stack",
    "Task",
    "Trail",
    "Transport",
    "place",
    "rehearse",
    "run",
]
