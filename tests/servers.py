"""Real servers for tests: one of each kind a worker, fresh rooms in them a test.

A test that kills or freezes its server asks for a `private_…` one. A server that can't be had
fails the test; it never skips.
"""

import uuid
from dataclasses import dataclass

import pytest

from tools.servers.postgres import PostgresServer
from tools.servers.redis_server import RedisServer
from tools.servers.s3 import S3Server


@dataclass(frozen=True)
class Bucket:
    """An empty bucket, and what opens it."""

    name: str
    endpoint_url: str
    region: str
    access_key_id: str
    secret_access_key: str


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    with RedisServer(tmp_path_factory.mktemp("redis"), password="letmein") as server:
        yield server


@pytest.fixture(scope="session")
def redis_8_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("redis-8")
    with RedisServer(folder, password="letmein", release=8) as server:
        yield server


@pytest.fixture(params=["redis_server", "redis_8_server"])
def any_redis(request):
    """A Redis of each release that tells its users' rights apart in its own way."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory):
    # It is never killed: what its data survive is asked of a private one.
    with PostgresServer(tmp_path_factory.mktemp("postgres"), durable=False) as server:
        yield server


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory):
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def redis_namespace():
    """A namespace that no other test uses, for `redis.namespace`."""
    return f"test-{uuid.uuid4().hex[:12]}"


@pytest.fixture
def postgres_url(postgres_server):
    """The URL of an empty database, for `database.url`; dropped afterwards."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    yield postgres_server.create_database(name)
    postgres_server.drop_database(name)


@pytest.fixture
def s3_bucket(s3_server):
    name = f"test-{uuid.uuid4().hex[:12]}"
    s3_server.create_bucket(name)
    return Bucket(
        name,
        s3_server.url,
        s3_server.region,
        s3_server.access_key_id,
        s3_server.secret_access_key,
    )


@pytest.fixture
def private_redis(tmp_path):
    with RedisServer(tmp_path / "redis", password="letmein") as server:
        yield server


@pytest.fixture
def private_postgres(tmp_path):
    with PostgresServer(tmp_path / "postgres") as server:
        yield server


@pytest.fixture
def private_s3(tmp_path):
    with S3Server(tmp_path / "s3") as server:
        yield server
