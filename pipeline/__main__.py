"""`python -m pipeline` is the same program as `fgsm`."""

from pipeline.cli import main

main()
