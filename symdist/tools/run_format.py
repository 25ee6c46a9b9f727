"""The record of a training run: the files in its folder, the keys and units in each, and how a line is made and read.

`launch/records` writes these files and `symdist.tools.run_log` reads them; both take everything about the form from
this module. A program of your own can write them too: only `log.jsonl` is required, and a reader ignores unknown keys.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,  # Before Python 3.12, pydantic does not read those of typing.
    TypeAlias,
    cast,
)

from pydantic import Field
from typing_extensions import TypedDict

from symdist.assignment import Assignment
from symdist.tools.untrusted import misfits, parse_json

LOG = "log.jsonl"
"""A `LogLine` per line: the measures. Written while the run goes on; after a rollback, later lines are removed."""
EVENTS = "events.jsonl"
"""An `Event` per line: starts, stops, checkpoints. Only ever appended to."""
RUN = "run.json"
"""`RunFacts`: what the run is. Written at the start, and again when the run is resumed."""
ROUTING = "routing.json"
"""A list of `RoutingEntry`, one per parameter. Written at the start, if the run uses SymDist."""
PLAN = "plan.json"
"""`PlanFacts`: what a step sends. Written at the start, if the run uses SymDist."""
SUMMARY = "summary.json"
"""`Summary`: the results. Written when the run has reached its last step, and only then."""

Count: TypeAlias = Annotated[int, Field(ge=0, lt=2**53)]
Seconds: TypeAlias = Annotated[float, Field(ge=0, lt=1e11)]

# Pages store steps in 32 bits.
_STEPS = 2**31
_LINE = 2**20

LineKind = Literal["train", "validation"]
EventKind = Literal[
    "start",
    "resume",
    "stop",
    "finish",
    "timeout",
    "save",
    "save_failed",
    "fallback",
    "rollback",
    "spike",
    "nonfinite",
]


class LogLine(TypedDict):
    """A line of `log.jsonl`: the measures of one step, as further keys with numbers; inf and NaN are allowed.

    Jobs write these measures. A validation has `loss` and those of routers. A measure may also be divided into parts,
    with a key for each such as `update_rms/router`.

    - `loss`: mean next-token loss in nats. `gradient_norm`: global norm before clipping.
    - `tokens_per_second`: of all ranks together, the median since the last line. `mfu`: model flop utilization, as a
      fraction of the peak.
    - `optimizer_ms`: milliseconds of an optimizer step; parts by strategy. `optimizer_share`: that as a fraction of the
      whole step.
    - `sent_mb`: megabytes (1e6 bytes) that the busiest rank sends in an optimizer step. `memory_gb`: peak memory of a
      rank in gigabytes (1e9 bytes).
    - `update_rms`, `weight_rms`: root mean squares, by role. `nu`: mean nuclear norm of the matrices, by role.
    - `router_load_cv`: coefficient of variation of the experts' load. `router_dead`: fraction of experts without a
      token. `router_load_entropy`, `router_top_load`, `router_top_expert`, `router_z`, `router_balance`: see
      `symdist.diagnostics.RouterMonitor`. All are means over layers.
    - `logit_rms`, `logit_max`: root mean square and largest magnitude of the logits.
    - `skipped_steps`, `spikes`: counts since the start of the run; left out while they are 0.

    Attributes:
        step: Optimizer steps done.
        kind: A `LineKind`; programs of your own may write further kinds.
    """

    step: int
    kind: str


class Event(TypedDict, total=False):
    """A line of `events.jsonl`. A reader must expect any key to be missing.

    Attributes:
        time: When it happened, in seconds since the epoch.
        step: Optimizer steps done by then.
        event: An `EventKind`; programs of your own may write further kinds.
        text: A sentence for people.
    """

    time: Seconds
    step: Count
    event: str
    text: str


class RunFacts(TypedDict, total=False):
    """The contents of `run.json`. A reader must expect any key to be missing.

    Attributes:
        model: The preset or file of the model.
        recipe: The recipe's name or file.
        steps: The number of steps that the run is to make.
        tokens_per_step: Tokens per step, over all ranks.
        launcher: The engine: "fsdp2", "deepspeed" or "megatron".
        mesh: Sizes of the parallel dimensions by name.
        ranks: The number of ranks.
        device: The name of the GPU, or "cpu".
        parameters: The number of the model's weights.
        active_parameters: The number of weights that a token uses.
        started: When the run was started or resumed, in seconds since the epoch.
        versions: Versions of Python and of packages by name.
        config: The whole configuration of the run, by option.
    """

    model: str
    recipe: str
    steps: Count
    tokens_per_step: Count
    launcher: str
    mesh: dict[str, Count]
    ranks: Count
    device: str
    parameters: Count
    active_parameters: Count
    started: Seconds
    versions: dict[str, str]
    config: dict[str, Any]


class RoutingEntry(TypedDict):
    """An entry of `routing.json`: the fields of `symdist.assignment.Assignment`, whose docstring explains them."""

    name: str
    shape: list[Count]
    role: str
    rule: str
    options: dict[str, Any]
    lr: float
    view: str | dict[str, Any]
    strategy: str
    precision: NotRequired[str]


class CollectiveFacts(TypedDict):
    """The collectives of one kind and group size in a step.

    Attributes:
        kind: The collective, such as "all_reduce".
        ranks: The number of ranks in its group.
        count: How often the rank starts it.
        sent: Bytes the rank sends in all of them.
    """

    kind: str
    ranks: Count
    count: Count
    sent: float


class RoleFacts(TypedDict):
    """How the parameters of one role are stepped.

    Attributes:
        role: The role.
        rules: The names of the rules of its parameters, sorted.
        parameters: The number of parameters.
        weights: The number of their elements.
        strategies: The number of parameters by strategy.
    """

    role: str
    rules: list[str]
    parameters: Count
    weights: Count
    strategies: dict[str, Count]


class PlanFacts(TypedDict):
    """The contents of `plan.json`: an optimizer step of rank 0.

    Attributes:
        collectives: The number of collectives it starts.
        sent: Bytes it sends.
        waves: The number of waves.
        kinds: Its collectives by kind.
        roles: The parameters by role.
    """

    collectives: Count
    sent: float
    waves: Count
    kinds: list[CollectiveFacts]
    roles: list[RoleFacts]


class Summary(TypedDict, total=False):
    """The contents of `summary.json`. A reader must expect any key but `steps` to be missing.

    Further keys: each measure of the last validation as `validation_…`, and engines add versions and sizes of theirs.

    Attributes:
        model: The preset or file of the model.
        recipe: The recipe's name; None if the optimizer is not SymDist.
        steps: The number of steps done.
        ranks: The number of ranks at the end.
        tokens: Tokens in all steps.
        parameters: The number of the model's weights.
        active_parameters: The number of weights that a token uses.
        tokens_per_second: Of all ranks together; the median over the steps of the last process.
        optimizer_share: The optimizer's fraction of a step; the median, as before.
        optimizer_ms: Milliseconds of an optimizer step; the median, as before.
        training_seconds: Time spent in training steps, over all processes of the run.
        skipped_steps: The number of steps that were skipped, for any reason.
        spikes: The number of steps that were skipped as loss spikes.
        validation_loss: The final validation loss in nats.
        validation_router_load_cv: Coefficient of variation of the experts' load in the final validation.
        validation_router_dead: Fraction of experts without a token in the final validation.
    """

    model: str
    recipe: str | None
    steps: Count
    ranks: Count
    tokens: Count
    parameters: Count
    active_parameters: Count
    tokens_per_second: float
    optimizer_share: float
    optimizer_ms: float
    training_seconds: float
    skipped_steps: Count
    spikes: Count
    validation_loss: float
    validation_router_load_cv: float
    validation_router_dead: float


def log_line(step: int, kind: LineKind, measures: Mapping[str, float]) -> str:
    r"""Return a line of `log.jsonl`, with its newline.

    Args:
        step: Optimizer steps done.
        kind: "train" or "validation".
        measures: The measures by name; see `LogLine`.

    Returns:
        The line.

    Example:
        >>> log_line(10, "train", {"loss": 3.5})
        '{"step": 10, "kind": "train", "loss": 3.5}\n'
    """
    return json.dumps({"step": step, "kind": kind, **measures}) + "\n"


def event_line(step: int, event: EventKind, text: str, *, time: float) -> str:
    """Return a line of `events.jsonl`, with its newline; see `Event` for the arguments.

    Returns:
        The line.
    """
    content: Event = {"time": time, "step": step, "event": event, "text": text}
    return json.dumps(content) + "\n"


def parse_log_line(text: bytes) -> LogLine | None:
    """Parse a line of `log.jsonl`.

    Args:
        text: The line, with or without its newline.

    Returns:
        The line, with its measures alone; None if it is not a JSON object with a step from 0 and a string `kind`, or
        has more than 1 MiB.
    """
    line = _json_object(text)
    step, kind = (None, None) if line is None else (line.get("step"), line.get("kind"))
    if line is None or type(step) is not int or not 0 <= step < _STEPS or type(kind) is not str:
        return None
    measures = {key: value for key, value in line.items() if type(value) in (int, float)}
    return cast(LogLine, measures | {"kind": kind})


def parse_event_line(text: bytes) -> Event | None:
    """Parse a line of `events.jsonl`.

    Args:
        text: The line, with or without its newline.

    Returns:
        The event; None if the line is not a JSON object of its form, or has more than 1 MiB.
    """
    event = _json_object(text)
    return None if event is None or misfits(Event, event) else cast(Event, event)


def split_lines(content: bytes) -> tuple[list[bytes], bytes]:
    """Split the content of a log into its complete lines and an incomplete one at the end.

    A process that is writing, or was killed while it wrote, leaves an incomplete last line.

    Args:
        content: The content of `log.jsonl` or `events.jsonl`, from the beginning of a line on.

    Returns:
        The complete lines with their newlines, and the rest, empty if there is none. A last line that only lacks its
        newline is complete, since a complete JSON object cannot grow any more.
    """
    complete, newline, incomplete = content.rpartition(b"\n")
    if incomplete.strip() and _json_object(incomplete) is not None:
        complete, newline, incomplete = content, b"", b""
    return (complete + newline).splitlines(keepends=True), incomplete


def routing_entries(assignments: Iterable[Assignment]) -> list[RoutingEntry]:
    """Return the contents of `routing.json`.

    Args:
        assignments: How each parameter is stepped, from `SymDist.assignments`.

    Returns:
        The entries, in the same order.
    """
    return [cast(RoutingEntry, asdict(assignment)) for assignment in assignments]


def assignments_of(entries: Iterable[RoutingEntry]) -> list[Assignment]:
    """Return how each parameter is stepped, the reverse of `routing_entries`.

    Args:
        entries: The contents of `routing.json`.

    Returns:
        The assignments, in the same order.

    Raises:
        KeyError: If an entry has no shape.
        TypeError: If an entry lacks another key of an `Assignment`.
    """
    known = [field.name for field in fields(Assignment)]
    found = [{key: value for key, value in cast(dict[str, Any], entry).items() if key in known} for entry in entries]
    return [Assignment(**{**entry, "shape": tuple(entry["shape"])}) for entry in found]


def _json_object(text: bytes) -> dict[str, Any] | None:
    try:
        content = parse_json(text) if len(text) <= _LINE else None
    except ValueError:
        return None
    return content if isinstance(content, dict) else None
