"""Durable commits per second, against one fsync per file: see `nightdesk.bench.commit`."""

import sys

from nightdesk.bench.commit import main

if __name__ == "__main__":
    sys.exit(main())
