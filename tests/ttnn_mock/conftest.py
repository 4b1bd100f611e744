"""Where these tests find the end-to-end tests' way of running commands."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "e2e"))
