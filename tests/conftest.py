# python -m pytest tests
"What all tests share: one thread (sums in the same order everywhere), no windows, nothing written to the reader's caches."
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # must be set before torch is imported
os.environ.setdefault("MPLBACKEND", "Agg")
sys.path.insert(0, str(Path(__file__).resolve().parent))  # `import book`


@pytest.fixture
def room():
    "A new directory in memory, gone after the test."
    path = Path(tempfile.mkdtemp(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None))
    yield path
    shutil.rmtree(path)
