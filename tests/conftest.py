# python -m pytest tests
"What all tests share: one thread (sums in the same order everywhere), no windows, nothing written to the reader's caches."
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # must be set before torch is imported
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).resolve().parent))  # `import book`
