"""What counts as a refusal in the end-to-end test of isolation."""

import pytest

from tests.e2e.verdicts import opened, refused


@pytest.mark.parametrize(
    ("name", "came", "is_refused"),
    [
        ("hub GET /", {"status": 403, "text": "no"}, True),
        ("hub GET /", {"status": 404, "text": "no"}, True),
        ("hub GET /", {"status": 200, "text": '{"items":[]}'}, True),
        ("hub GET /", {"status": 200, "text": '{"items":["another\'s"]}'}, False),
        ("hub GET /", {"status": 307, "text": ""}, False),
        ("hub GET /", {"status": 500, "text": "it broke"}, False),
        ("hub GET /", {"status": 503, "text": "it is not there"}, False),
        ("hub GET /", {"error": "TimeoutError", "text": ""}, False),
        ("api server /", {"error": "gaierror", "text": ""}, False),
        ("node kubelet /pods", {"status": 401, "text": "Unauthorized"}, True),
        ("node kubelet /pods", {"status": 404, "text": ""}, False),
        ("node kubelet /pods", {"error": "ConnectionRefusedError", "text": ""}, False),
        ("node port 10255", {"error": "ConnectionRefusedError", "text": ""}, True),
        ("node port 10255", {"status": 200, "text": "metrics"}, False),
        ("node port 10259 with TLS", {"status": 403, "text": "Forbidden"}, True),
        ("bus KEYS *", {"error": "NoPermissionError", "text": "", "code": "NOPERM"}, True),
        ("bus KEYS *", {"error": "ConnectionError", "text": "refused", "code": None}, False),
        ("bus KEYS *", {"error": "ResponseError", "text": "unknown command", "code": "ERR"}, True),
        ("bus KEYS *", {"error": "ResponseError", "text": "no such key", "code": "ERR"}, False),
        ("bus as default by guess 0", {"text": "", "code": "WRONGPASS"}, True),
        ("bus as default by guess 0", {"text": "", "code": "NOPERM"}, False),
        ("bus as esper-probe by guess 0", {"text": "", "code": "NOPERM"}, True),
        ("bus without a user", {"text": "", "code": "NOAUTH"}, True),
    ],
)
def test_only_who_was_asked_refuses(name, came, is_refused):
    assert refused(name, came) is is_refused


@pytest.mark.parametrize(
    ("came", "is_opened"),
    [
        ({"answer": "0"}, True),
        ({"status": 200, "text": ""}, True),
        ({"status": 403, "text": ""}, False),
        ({"error": "TimeoutError", "text": ""}, False),
    ],
)
def test_what_is_answered_is_open(came, is_opened):
    assert opened(came) is is_opened
