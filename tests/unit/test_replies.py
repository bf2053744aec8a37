"""What Redis' error replies become, as 6.2 and 8.2 write them, and the documented table beside the one in the code."""

from __future__ import annotations

import pytest
from redis._parsers import BaseParser

from streamtask.cli import exit_status
from streamtask.errors import (
    AccessRefused,
    BrokerOutOfMemory,
    BrokerUnavailable,
    ConfigError,
    Misconfigured,
    ReplyError,
)
from streamtask.redis.link import MOVED, translate
from streamtask.redis.replies import KINDS, Kind, code_of, translate_reply
from tests.unit.test_docs import rows

IN_6_2 = "ERR Error running script (call to f_5bd1): @user_script:19: @user_script: 19: -"
CLASSES = {
    Kind.AWAY: BrokerUnavailable,
    Kind.FULL: BrokerOutOfMemory,
    Kind.ACCESS: AccessRefused,
    Kind.SETTING: Misconfigured,
    Kind.OTHER: ReplyError,
}


@pytest.mark.parametrize("code", KINDS)
@pytest.mark.parametrize(
    "text", ["{} as it says", IN_6_2 + "{} as it says", "{} as it says script: 5bd1, on @user_script:3."]
)
def test_each_code_is_known_wherever_it_stands(code, text):
    error = translate_reply(text.format(code), "here")
    assert type(error) is CLASSES[KINDS[code]]
    if KINDS[code] is Kind.AWAY:
        assert (error.code, code in str(error)) == (code, True)


@pytest.mark.parametrize("code", KINDS)
def test_redis_py_tells_the_same(code):
    error = translate(
        BaseParser.parse_error(f"{code} 7 127.0.0.1:1" if code in MOVED else f"{code} as it says"), "here"
    )
    assert type(error) is CLASSES[KINDS[code]]


@pytest.mark.parametrize(
    "text, code",
    [
        ("WRONGTYPE Operation against a key", "WRONGTYPE"),
        ("ERR no such key", "NOGROUP"),
        ("NOGROUP No such key 'x'", "NOGROUP"),
        ("ERR unknown command 'BUSY x', with args", "ERR"),
        ("ERR value is not an integer", "ERR"),
        ("SOMETHINGNEW happened", "SOMETHINGNEW"),
        (IN_6_2 + "WRONGTYPE Operation against a key", "WRONGTYPE"),
        ("-NOSCRIPT No matching script", "NOSCRIPT"),
    ],
)
def test_what_is_not_known_is_of_that_call_alone(text, code):
    error = translate_reply(text, "here")
    assert type(error) is ReplyError
    assert error.code == code == code_of(text)


def test_too_many_clients_is_an_outage():
    assert type(translate_reply("ERR max number of clients reached", "here")) is BrokerUnavailable


def test_the_documented_table_is_the_one_of_the_code():
    assert rows("docs/operations.md", "When Redis answers with an error") >= KINDS.keys()


def test_a_sentinel_in_the_place_of_a_redis_is_told() -> None:
    for text in (
        "ERR unknown command 'EVALSHA', with args beginning with: 'x'",
        "ERR unknown command `SMEMBERS`, with",
    ):
        error = translate_reply(text, "redis://h:26379")
        assert isinstance(error, Misconfigured)
        assert "redis://h:26379 keeps no data: of a Sentinel the URL begins with redis+sentinel://" in str(error)
    assert not isinstance(translate_reply("ERR unknown command 'CONFIG'", "redis://h"), Misconfigured)


def test_a_refused_password_is_an_outage_and_no_wrong_setting():
    """Of one kind: else what became of it would follow from which of two clauses stands first."""
    assert issubclass(AccessRefused, BrokerUnavailable)
    assert not issubclass(AccessRefused, ConfigError)
    assert exit_status(AccessRefused("wrong")) == 2
    assert exit_status(BrokerUnavailable("away")) == 1
