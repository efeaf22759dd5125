"""`python -m mambalens`."""

from mambalens.cli.app import main

main()
