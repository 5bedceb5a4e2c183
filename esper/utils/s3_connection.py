"""How boto3 is set up for Esper, and what its errors mean here."""

from __future__ import annotations

import base64
import zlib
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    NoCredentialsError,
    PartialCredentialsError,
    ProfileNotFound,
)

from esper.configs import HIDDEN, StorageConfig
from esper.errors import ConfigError, EsperError, StorageFull, StoreUnavailable, one_line

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

_NO_ROOM = frozenset({"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "507"})
_NO_CREDENTIALS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    ProfileNotFound,
)
_PERMISSIONS = (
    "credentials that may s3:GetObject, s3:PutObject, s3:DeleteObject and s3:ListBucket there"
)
_REGION = "the region that the bucket is in"
_CREDENTIALS = "credentials that the service knows"

_MENDING = {
    "NoSuchBucket": ("bucket", "a bucket that exists"),
    "InvalidBucketName": ("bucket", "a bucket that exists"),
    "InvalidAccessKeyId": ("access_key_id", _CREDENTIALS),
    "XAdminUserNotFound": ("access_key_id", _CREDENTIALS),  # versitygw's
    "ExpiredToken": ("access_key_id", _CREDENTIALS),
    "InvalidToken": ("access_key_id", _CREDENTIALS),
    "SignatureDoesNotMatch": ("secret_access_key", "the secret of storage.access_key_id"),
    "AccessDenied": ("access_key_id", _PERMISSIONS),
    "AccountProblem": ("access_key_id", _PERMISSIONS),
    "AllAccessDisabled": ("access_key_id", _PERMISSIONS),
    "AuthorizationHeaderMalformed": ("region", _REGION),
    "PermanentRedirect": ("region", _REGION),
    "IllegalLocationConstraintException": ("region", _REGION),
}
"""Which setting mends what a service answers, by its code."""


def connect(config: StorageConfig) -> S3Client:
    """A client with the settings' address, credentials, time limits and retries.

    Neither address nor proxy come from the environment; credentials do where none are set.

    Raises:
        ConfigError: half of the credentials is set, or none are found; no such address.
    """
    if (config.access_key_id is None) != (config.secret_access_key is None):
        missing = "access_key_id" if config.access_key_id is None else "secret_access_key"
        raise ConfigError(f"storage.{missing}", None, "both halves of the credentials, or neither")
    secret = config.secret_access_key
    s3: dict[str, Any] = {"addressing_style": "path" if config.endpoint_url else "auto"}
    if config.checksum == "sha256":
        s3["payload_signing_enabled"] = False  # the checksum's header is signed
    options = Config(
        signature_version="s3v4",
        connect_timeout=config.connect_timeout_seconds,
        read_timeout=config.read_timeout_seconds,
        max_pool_connections=config.pool_size,
        retries={"mode": "adaptive", "total_max_attempts": config.attempts},
        # What is to be checked has its checksum given; boto3 would add a second one.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        ignore_configured_endpoint_urls=True,  # type: ignore[call-arg]
        proxies={},
        tcp_keepalive=True,
        s3=s3,  # type: ignore[arg-type]
    )
    try:
        _ = urlsplit(config.endpoint_url or "").port  # boto3 finds a wrong one only when it asks
        client: S3Client = boto3.session.Session().client(
            "s3",
            region_name=config.region,
            endpoint_url=config.endpoint_url,
            aws_access_key_id=config.access_key_id,
            aws_secret_access_key=None if secret is None else secret.get_secret_value(),
            config=options,
        )
    except ValueError as error:
        raise ConfigError("storage.endpoint_url", config.endpoint_url, one_line(str(error))) from (
            error
        )
    except BotoCoreError as error:
        raise translated(error, "", config) from error
    return client


def code_of(error: ClientError) -> str:
    """The service's code for what went wrong, as in NoSuchKey."""
    return error.response.get("Error", {}).get("Code", "")


def translated(error: ClientError | BotoCoreError, key: str, config: StorageConfig) -> EsperError:
    """One of Esper's errors for one of boto3's."""
    place = config.endpoint_url or f"region {config.region}"
    if isinstance(error, _NO_CREDENTIALS):
        return ConfigError("storage.access_key_id", config.access_key_id, _CREDENTIALS)
    if not isinstance(error, ClientError):
        return StoreUnavailable(
            f"object {key}: no answer from the S3 service ({place}): {one_line(str(error))}; "
            "see storage.endpoint_url"
        )
    code = code_of(error)
    if code in _MENDING:
        setting, allowed = _MENDING[code]
        came = HIDDEN if setting == "secret_access_key" else getattr(config, setting)
        return ConfigError(f"storage.{setting}", came, f"{allowed} ({place} says {code})")
    if code in _NO_ROOM:
        return StorageFull(f"object {key}: no room left in bucket {config.bucket} ({code})")
    said = one_line(error.response.get("Error", {}).get("Message", ""))
    return StoreUnavailable(f"object {key}: the S3 service ({place}) answered {code}: {said}")


def encoded(digest: bytes) -> str:
    """A digest as S3's headers have it."""
    return base64.b64encode(digest).decode("ascii")


def crc32(data: bytes | bytearray) -> str:
    """The CRC-32 as S3's headers have it."""
    return encoded(zlib.crc32(data).to_bytes(4, "big"))
