"""`python -m qtlm` is `qtlm`."""

import sys

from qtlm.cli import main

sys.exit(main())
