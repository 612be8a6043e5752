"""100,000 periodic tasks, against APScheduler and sleep loops: see `nightdesk.bench.schedule`."""

import sys

from nightdesk.bench.schedule import main

if __name__ == "__main__":
    sys.exit(main())
