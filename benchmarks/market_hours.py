"""One week of an exchange: runs by phase, with and without its calendar: see `nightdesk.bench.hours`."""

import sys

from nightdesk.bench.hours import main

if __name__ == "__main__":
    sys.exit(main())
