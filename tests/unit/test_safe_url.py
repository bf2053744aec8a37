"""What of a URL is shown: no password, whatever the option is called that holds it."""

from __future__ import annotations

import pytest

from streamtask.redis.address import safe_url

SECRET = "hunter2"

NAMES = ["password", "auth", "pwd", "pass", "credential", "credentials", "credential_provider", "api_key", "key", "jwt"]


@pytest.mark.parametrize("name", [*NAMES, *map(str.upper, NAMES), "sentinel_password", "pass%77ord", ""])
def test_no_option_shows_a_secret(name: str) -> None:
    for url in (f"redis://h:1/0?{name}={SECRET}", f"redis://u@h/0?db=1&{name}={SECRET}", f"unix:///s?{name}={SECRET}"):
        assert SECRET not in safe_url(url)
    assert safe_url(f"redis://h:1/0?db=1&{name}={SECRET}") == f"redis://h:1/0?db=1&{name}=***"


@pytest.mark.parametrize(
    "url, shown",
    [
        (f"redis://h/0?db=1;password={SECRET}", "redis://h/0?db=***"),
        (f"redis://h/0?db=1#{SECRET}", "redis://h/0?db=***"),
        (f"redis://h/0#{SECRET}", "redis://h/0#***"),
        (f"redis://h/0?{SECRET}", "redis://h/0?***"),
        (f"redis://h/0?a={SECRET}={SECRET}&{SECRET}", "redis://h/0?a=***&***"),
        (f"redis://h/0?a=b?password={SECRET}", "redis://h/0?a=***"),
        (f"redis://u:{SECRET}@h/0?auth={SECRET}", "redis://u:***@h/0?auth=***"),
        (f"h?password={SECRET}", "(unreadable URL)"),
    ],
)
def test_nor_does_anything_else(url: str, shown: str) -> None:
    assert safe_url(url) == shown


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost:6379/0",
        "unix:///run/redis.sock?db=3&socket_timeout=1.5",
        "rediss://h:1/0?ssl_cert_reqs=none&ssl_ca_certs=/etc/my%20ca.pem",
        "redis+sentinel://a:1,b:2/mymaster/0",
        "localhost:6379",
        "memory://",
    ],
)
def test_what_is_no_secret_is_shown(url: str) -> None:
    assert safe_url(url) == url
