"""For tests and doctests: what is collected, and that Ctrl-C is heard.

Where a framework is not installed, the module that serves it has no doctests to collect. A shell's background commands start with
SIGINT ignored, and so do the tests, where these are among them.
"""

import signal
from importlib.util import find_spec

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

collect_ignore = [
    f"src/precond/integrations/{framework}.py" for framework in ("lightning", "transformers") if find_spec(framework) is None
]
collect_ignore_glob = ["tests/*/*_script.py"]  # programs that tests start in processes of their own
