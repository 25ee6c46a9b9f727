"""A run under DeepSpeed: its options, and the user's DeepSpeed JSON completed by them. Imports no DeepSpeed."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.loop.config import Config
from symdist.routing.recipes import load_recipe

TYPE = "SymDist"
"""The type of optimizer that `symdist_deepspeed` registers."""

_AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class DeepSpeedRun(Config):
    """A pretraining run under DeepSpeed. Every value can stand in the TOML file and on the command line, which wins.

    What the DeepSpeed JSON leaves out, or says is "auto", is filled in from these values; what it says otherwise must
    agree with them.
    """

    deepspeed: Path = Path(__file__).resolve().parent / "configs" / "deepspeed" / "stage1.json"
    """The DeepSpeed config, a JSON file."""

    def check(self, *, ranks: int) -> None:
        """As `Config.check`, and for what the JSON says."""
        super().check(ranks=ranks)
        self.settings(ranks=ranks)

    def simulated(self, ranks: int) -> dict[str, Any] | None:
        """See `Config`; at stage 0 weights are whole, and only the job itself tells what it shares out."""
        settings = self.settings(ranks=ranks)
        stage = zero_stage(settings)
        if settings["optimizer"]["type"] != TYPE or not stage:
            return None
        return {"mesh": {"dp_shard": ranks}, "zero": stage}

    def settings(self, *, ranks: int) -> dict[str, Any]:
        """What the JSON says, completed by what this configuration says.

        Raises ValueError for a file that cannot be read, for what contradicts this configuration, naming both, and for
        kinds of parallelism that the job does not do.
        """
        settings = self._read()
        split = f"--batch {self.batch} over {ranks} ranks × {self.accumulation} micro-batches"
        micro = self.batch // (ranks * self.accumulation)
        self._fill(settings, "train_batch_size", self.batch, f"--batch {self.batch}")
        self._fill(settings, "train_micro_batch_size_per_gpu", micro, split)
        self._fill(settings, "gradient_accumulation_steps", self.accumulation, f"--accumulation {self.accumulation}")
        # Left out, newer releases of DeepSpeed clip at 1 and older ones not at all.
        self._fill(settings, "gradient_clipping", self.clip, f"--clip {self.clip}")
        self._fill_precision(settings)
        self._fill_optimizer(settings)
        # The job has a log of its own.
        settings.setdefault("steps_per_print", self.steps + 1)
        for name, size in (
            ("sequence_parallel_size", settings.get("sequence_parallel_size", 1)),
            ("tensor_parallel.autotp_size", _section(settings, "tensor_parallel").get("autotp_size", 0)),
        ):
            if size > 1:
                raise ValueError(
                    f"{self.deepspeed}: {name} is {size}, but this job splits data over all ranks and nothing else; "
                    "leave it out"
                )
        return settings

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.deepspeed.read_text())
        except OSError as error:
            raise ValueError(f"DeepSpeed config {self.deepspeed} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ValueError(f"DeepSpeed config {self.deepspeed} is not valid JSON: {error}") from None
        if not isinstance(content, dict):
            raise ValueError(f"DeepSpeed config {self.deepspeed} should hold an object, not {content!r}")
        return content

    def _fill(self, section: dict[str, Any], key: str, value: Any, told: str) -> None:
        if section.get(key, _AUTO) == _AUTO:
            section[key] = value
        elif section[key] != value:
            raise self._contradiction(key, section[key], told)

    def _contradiction(self, key: str, theirs: Any, told: str) -> ValueError:
        return ValueError(
            f"{self.deepspeed}: {key} is {theirs!r}, but the run has {told}; "
            f"make them agree, or leave {key} out of the file"
        )

    def _fill_precision(self, settings: dict[str, Any]) -> None:
        for key, on in (("bf16", self.precision == "bfloat16"), ("fp16", False)):
            if _section(settings, key).get("enabled") == _AUTO:
                settings[key]["enabled"] = on
        found = precision(settings)
        if self.precision not in (_AUTO, found):
            raise self._contradiction(
                "the precision (bf16, fp16, torch_autocast)", found, f"--precision {self.precision}"
            )

    def _fill_optimizer(self, settings: dict[str, Any]) -> None:
        optimizer = settings.setdefault("optimizer", {})
        if optimizer.setdefault("type", TYPE) != TYPE:
            if self.override:
                raise ValueError(
                    f"{self.deepspeed}: the optimizer is {optimizer['type']}, which has no recipe that "
                    f"--override {self.override[0]} could change; give its options in the file"
                )
            if self.spike_sigma:
                raise ValueError(
                    f"{self.deepspeed}: the optimizer is {optimizer['type']}, which cannot leave out a step for its "
                    "loss; leave --spike-sigma out, or take SymDist"
                )
            return
        params = optimizer.setdefault("params", {})
        self._fill(params, "nonfinite", self.nonfinite, f"--nonfinite {self.nonfinite}")
        if params.get("lr") == _AUTO:
            del params["lr"]
        if params.get("recipe", _AUTO) == _AUTO:
            params["recipe"] = self.recipe
        theirs, ours = load_recipe(params["recipe"]), load_recipe(self.recipe)
        if _plain(theirs.sections, theirs.patterns, theirs.schedules) != _plain(
            ours.sections, ours.patterns, ours.schedules
        ):
            raise self._contradiction("the recipe", theirs.name, f"--recipe {self.recipe}")
        overrides = params.get("overrides", _AUTO)
        params["overrides"] = overrides = {} if overrides == _AUTO else overrides
        for role, options in self.overrides().items():
            for name, value in options.items():
                given = overrides.setdefault(role, {}).setdefault(name, value)
                if _plain(given) != _plain(value):
                    raise self._contradiction(
                        f"the override of {role}.{name}", given, f"--override {role}.{name}={value}"
                    )


def precision(settings: Mapping[str, Any]) -> str:
    """What a DeepSpeed config has forward and backward computed in."""
    autocast = _section(settings, "torch_autocast")
    if _section(settings, "fp16").get("enabled"):
        return "float16"
    if _section(settings, "bf16").get("enabled") or _section(settings, "bfloat16").get("enabled"):
        return "bfloat16"
    return str(autocast.get("dtype", "bfloat16")).removeprefix("torch.") if autocast.get("enabled") else "float32"


def zero_stage(settings: Mapping[str, Any]) -> int:
    """The ZeRO stage of a DeepSpeed config."""
    return int(_section(settings, "zero_optimization").get("stage", 0))


def loads_universal(settings: Mapping[str, Any]) -> bool:
    """Whether a DeepSpeed config says that checkpoints to load are universal ones."""
    return bool(_section(settings, "checkpoint").get("load_universal", False))


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    return settings.get(name) or {}


def _plain(*values: Any) -> Any:
    """As JSON has it: no tuples."""
    return json.loads(json.dumps(values))
