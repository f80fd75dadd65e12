"""``python -m fusecli``, and what the installed command runs."""

import signal

# Until the command is there, Ctrl-C just ends the process: no traceback of imports.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from fusecli.cli import main  # noqa: E402

if __name__ == "__main__":
    main()
