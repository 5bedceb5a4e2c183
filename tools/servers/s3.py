"""An S3 server over a folder: versitygw."""

from __future__ import annotations

import http.client
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.servers.process import HOST, ServerProcess, new_password
from tools.servers.versitygw import versitygw_binary

REGION = "us-east-1"


class S3Server(ServerProcess):
    """An S3 endpoint at `url`, for whoever holds `access_key_id` and `secret_access_key`.

    Buckets are folders under `folder`/data; what S3 keeps beside an object lies in `folder`/meta,
    so that no extended attributes are needed.
    """

    name = "s3"

    def __init__(self, folder: Path, *, port: int = 0) -> None:
        super().__init__(folder, port=port)
        self.region = REGION
        self.access_key_id = "esper"
        self._secret = self.folder / "secret"
        self._client: Any = None

    @property
    def secret_access_key(self) -> str:
        """Made at the first start, and kept beside the data."""
        return self._secret.read_text()

    @property
    def url(self) -> str:
        """For `storage.endpoint_url`."""
        return f"http://{HOST}:{self.port}"

    def client(self) -> Any:
        """A boto3 client of the owner, for setting up and looking; always the same one."""
        if self._client is None:
            import boto3

            self._client = boto3.client(
                "s3",
                endpoint_url=self.url,
                region_name=self.region,
                aws_access_key_id=self.access_key_id,
                aws_secret_access_key=self.secret_access_key,
            )
        return self._client

    def create_bucket(self, name: str) -> None:
        """Make an empty bucket."""
        self.client().create_bucket(Bucket=name)

    def _prepare(self) -> None:
        for part in ("data", "meta"):
            (self.folder / part).mkdir(exist_ok=True)
        if not self._secret.exists():
            self._secret.touch(mode=0o600)
            self._secret.write_text(new_password())

    def _command(self) -> Sequence[str]:
        listening = ["--port", f"{HOST}:{self.port}", "--region", self.region, "--keep-alive"]
        storing = ["posix", "--sidecar", str(self.folder / "meta"), str(self.folder / "data")]
        return [str(versitygw_binary()), "--quiet", *listening, "--health", "/health", *storing]

    def _environment(self) -> Mapping[str, str]:
        return {"ROOT_ACCESS_KEY": self.access_key_id, "ROOT_SECRET_KEY": self.secret_access_key}

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(HOST, self.port, timeout=1)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == http.HTTPStatus.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
