"""The exchange: decides where rules run and answers what they ask of other ranks."""

from symdist.exchange.collectives.progress import ExchangeError, Trail
from symdist.exchange.collectives.residual_sums import InStage
from symdist.exchange.collectives.transport import Collectives, Counting, Transport
from symdist.exchange.execution.flat_job import FlatJob
from symdist.exchange.execution.job import Given, Job, Made, Placement, Stack
from symdist.exchange.execution.scheduler import Task, run
from symdist.exchange.planning.dry_run import rehearse
from symdist.exchange.planning.plan import Plan, place

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
