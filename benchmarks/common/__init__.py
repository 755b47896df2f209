"""Share code among the benchmarks. Importing this package lets them import the repository's tests as well."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
