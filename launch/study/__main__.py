"""Compare optimizer stacks with equal tuning budgets: python -m launch.study --config launch/configs/study.toml."""

import sys

from launch.study.runner import main

sys.exit(main(sys.argv[1:]))
