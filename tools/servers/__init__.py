"""Redis, Postgres and S3 as processes of this machine: no root, no Docker, loopback only."""
