"""`python -m mambalens`."""

from mambalens.cli import main

main()
