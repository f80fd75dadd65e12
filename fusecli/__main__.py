"""``python -m fusecli``, and what the installed command runs."""

import signal

# Until the command is there, Ctrl-C just ends the process (no traceback of imports), unless it is to be ignored.
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from fusecli.cli import main

if __name__ == "__main__":
    main()
