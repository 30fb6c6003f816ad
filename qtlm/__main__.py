"""`python -m qtlm` is `qtlm`."""

from qtlm.cli import main

main()
