"""Event to first line of the opportunity handler, against plain uvloop and asyncio: see `nightdesk.bench.switch`."""

import sys

from nightdesk.bench.switch import main

if __name__ == "__main__":
    sys.exit(main())
