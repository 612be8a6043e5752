"""Event to order bytes at the venue, intent on disk, against plain uvloop and SQLite: see `nightdesk.bench.path`."""

import sys

from nightdesk.bench.path import main

if __name__ == "__main__":
    sys.exit(main())
