"""What holds for all tests."""

import signal
import threading

# A shell that runs the tests in the background has them ignore Ctrl-C, and so would the programs
# that they start, some of which are tested for how they stop.
if threading.current_thread() is threading.main_thread():
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
