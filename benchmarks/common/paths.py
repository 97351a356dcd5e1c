"""Where the benchmarks' files lie."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "benchmarks" / "models"
RESULTS = ROOT / "benchmarks" / "results"
