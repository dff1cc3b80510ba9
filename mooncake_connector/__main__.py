"""``python -m mooncake_connector`` is the ``mooncake-connector`` command."""

import sys

from mooncake_connector.cli import main

if __name__ == "__main__":
    sys.exit(main())
