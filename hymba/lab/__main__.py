"""`python -m hymba.lab ...`, which is `hymba lab ...` where tyro is not installed."""

import sys

from hymba.errors import UserError
from hymba.lab.options import main

if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:], "python -m hymba.lab"))
    except UserError as error:
        print(f"hymba: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
