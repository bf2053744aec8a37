"""What a broker's URL names (``redis/address.py``)."""

import pytest

from streamtask.errors import ConfigError
from streamtask.redis.address import Address


def test_of_sentinels():
    found = Address.parse("redis+sentinel://me:p%40ss@one,two:1234/master/3?sentinel_password=x%2Fy&socket_timeout=2")
    assert found.nodes == (("one", None), ("two", 1234))
    assert (found.username, found.password) == ("me", "p@ss")
    assert (found.service, found.database) == ("master", 3)
    assert found.query == {"sentinel_password": "x/y", "socket_timeout": "2"}
    assert "p%40ss" not in found.shown
    assert "x%2Fy" not in found.shown


def test_of_a_cluster():
    found = Address.parse("redis+cluster://me:secret@one:7000,two,[::1]:7002?socket_timeout=2")
    assert found.nodes == (("one", 7000), ("two", None), ("::1", 7002))
    assert found.first_url == "redis://me:secret@one:7000?socket_timeout=2"


def test_of_an_embedded_server():
    assert Address.parse("embedded://").folder == ""
    assert Address.parse("embedded:///var/lib/x?db=0").folder == "/var/lib/x"


@pytest.mark.parametrize(
    "url, said",
    [
        ("redis+sentinel://one,two", "names no service"),
        ("redis+sentinel://one/master/three", "must be a number"),
        ("redis://one/three", "must be a number"),
        ("redis://", "names no host"),
        ("redis://one:70000", "can't be read"),
        ("redis://p#ss@one", "has an @ after its host"),
        ("redis://one?protocol=3", "streamtask needs '2' there"),
        ("unix://", "names no socket"),
        ("http://one", "unknown scheme"),
        ("localhost", "unknown scheme"),
    ],
)
def test_a_wrong_one(url: str, said: str):
    with pytest.raises(ConfigError, match=said):
        Address.parse(url)


def test_no_secret_is_shown():
    url = "redis+sentinel://me:secret@one/master?sentinel_password=secret"
    assert "secret" not in repr(Address.parse(url))
    assert "secret" not in repr(Address.parse("redis+cluster://me:secret@one"))
