"""What all tests share."""

import os

from hypothesis import settings

# A change is judged by the same examples wherever it is tested; EXPLORE_TESTS=1 draws anew.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("default" if os.environ.get("EXPLORE_TESTS") else "repeatable")
