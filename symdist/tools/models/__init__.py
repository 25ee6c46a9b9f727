"""Language models by name: presets for `transformers` architectures with random weights.

Importing this package is cheap; `transformers` is imported when a model is built.
"""

from symdist.tools.models.build import active_parameters, blocks, build, names
from symdist.tools.models.shard import check_sizes, shard

__all__ = ["active_parameters", "blocks", "build", "check_sizes", "names", "shard"]
