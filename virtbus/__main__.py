"""`python -m virtbus`: the same as the `virtbus` command."""

from virtbus.cli import main

main()
