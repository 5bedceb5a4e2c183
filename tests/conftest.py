"""What all tests share."""

import os

from hypothesis import settings

from tests.servers import (  # noqa: F401
    any_redis,
    postgres_server,
    postgres_url,
    private_postgres,
    private_redis,
    private_s3,
    redis_8_server,
    redis_namespace,
    redis_server,
    s3_bucket,
    s3_server,
)

# A change is judged by the same examples wherever it is tested; EXPLORE_TESTS=1 draws anew.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("default" if os.environ.get("EXPLORE_TESTS") else "repeatable")
