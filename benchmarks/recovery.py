"""10,000 active tasks after a crash, until ready and until the first action, against a JSON file per task: see `nightdesk.bench.recover`."""

import sys

from nightdesk.bench.recover import main

if __name__ == "__main__":
    sys.exit(main())
