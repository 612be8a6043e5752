"""`python -m nightdesk` is `nightdesk`.

Comes from: cli/
Goes to: cli/
"""

import sys

from nightdesk.cli import main

if __name__ == "__main__":
    sys.exit(main())
