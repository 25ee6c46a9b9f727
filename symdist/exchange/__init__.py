"""The exchange: plans on which ranks each rule runs, and runs the collectives that rules need."""

from symdist.exchange.collectives.progress import ExchangeError, StepProgress
from symdist.exchange.collectives.residual_sums import StageSlot
from symdist.exchange.collectives.transport import CountingTransport, TorchTransport, Transport
from symdist.exchange.execution.job import Job
from symdist.exchange.execution.scheduler import Task, run
from symdist.exchange.execution.stack import Stack, StepInputs, StepOutputs, Strategy
from symdist.exchange.options import BUCKET_BYTES, ExchangeLike, ExchangeOptions
from symdist.exchange.planning.agreement import PlanError, check_agreement, lines_of
from symdist.exchange.planning.dry_run import dry_run
from symdist.exchange.planning.plan import Plan, make_plan
from symdist.hardware import HARDWARE, Hardware

__all__ = [
    "BUCKET_BYTES",
    "HARDWARE",
    "CountingTransport",
    "ExchangeError",
    "ExchangeLike",
    "ExchangeOptions",
    "Hardware",
    "Job",
    "Plan",
    "PlanError",
    "Stack",
    "StageSlot",
    "StepInputs",
    "StepOutputs",
    "StepProgress",
    "Strategy",
    "Task",
    "TorchTransport",
    "Transport",
    "check_agreement",
    "dry_run",
    "lines_of",
    "make_plan",
    "run",
]
