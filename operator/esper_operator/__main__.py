"""`python -m esper_operator`."""

from __future__ import annotations

from esper_operator.main import main

if __name__ == "__main__":
    raise SystemExit(main())
