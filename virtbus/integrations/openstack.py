"""What the OpenStack integrations share: one connection, and its errors told as ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import openstack
import requests
from keystoneauth1 import exceptions as keystone
from openstack import exceptions

from virtbus import __version__
from virtbus.errors import ConfigError
from virtbus.integrations.base import ActionRefused, TargetDenied, TargetUnavailable

TIMEOUT_SECONDS = 15

T = TypeVar("T")


def connect(cloud: str | None, setting: str) -> Any:
    """A connection that logs in at its first use. Raises ConfigError when no cloud is configured."""
    try:
        return openstack.connect(
            cloud=cloud, app_name="virtbus", app_version=__version__, api_timeout=TIMEOUT_SECONDS
        )
    except (exceptions.ConfigException, keystone.MissingRequiredOptions, keystone.NoMatchingPlugin) as error:
        raise ConfigError(
            f"no OpenStack cloud: {error}; name one of clouds.yaml in {setting}, or set the OS_* variables"
        ) from error


def call(doing: str, call: Callable[[], T]) -> T:
    """Do one request. Raises TargetUnavailable, or ActionRefused when once more would change nothing."""
    try:
        return call()
    except exceptions.HttpException as error:
        status = error.status_code
        text = f"{doing}: {status or ''} {error.details or error.message}".strip()
        # 409 is a matter of time, and an operator can mend 401, 403 and 404.
        if status is not None and 400 <= status < 500 and status not in (401, 403, 404, 408, 409, 425, 429):
            raise ActionRefused(text) from error
        raise (TargetDenied(text) if status in (401, 403) else TargetUnavailable(text)) from error
    except (exceptions.SDKException, keystone.ClientException, requests.RequestException, OSError) as error:
        raise TargetUnavailable(f"{doing}: {error}") from error
