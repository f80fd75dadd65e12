"""``python -m fusecli``."""

from fusecli.cli import main

main()
