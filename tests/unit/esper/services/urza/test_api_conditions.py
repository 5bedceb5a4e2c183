"""Entity tags: what is known is not sent again, what was changed meanwhile not overwritten."""

from __future__ import annotations

import asyncio

import pytest

from tests.unit.esper.services.urza.hubs import DOCUMENT, target
from tests.unit.esper.services.urza.serving import serving, settings

PATH = f"/api/v1/blueprints/{DOCUMENT.digest}"


@pytest.fixture
def place(sqlite_place):
    """The database's kind makes no difference here."""
    return sqlite_place


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("{tag}", 304),
        ("W/{tag}", 304),
        ('"other", {tag}', 304),
        ("*", 304),
        ('"other"', 200),
        ("{bare}", 200),
        ("no tag at all", 200),
        ("", 200),
    ],
)
def test_what_is_known_is_not_sent_again(place, value, status):
    async def life() -> None:
        async with serving(settings(place)) as client:
            await client.hub.put_blueprint(DOCUMENT)
            tag = (await client.get(PATH)).headers["ETag"]
            asked = value.format(tag=tag, bare=tag.strip('"'))
            answer = await client.get(PATH, headers={"If-None-Match": asked})
            assert (answer.status_code, answer.headers["ETag"]) == (status, tag)
            assert bool(answer.content) is (status == 200)

    asyncio.run(life())


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("{tag}", 200),
        (' "other" ,\t{tag}', 200),
        ("*", 200),
        (None, 200),
        ("W/{tag}", 412),  # weak tags never match strongly
        ('"other"', 412),
        ('""', 412),
        ('"1"', 412),
        ("{bare}", 422),
        ('"open', 422),
        ('{tag} "other"', 422),
        (",", 422),
    ],
)
def test_a_change_is_made_only_of_what_was_read(place, value, status):
    async def life() -> None:
        async with serving(settings(place)) as client:
            await client.hub.put_blueprint(DOCUMENT)
            tag = (await client.get(PATH)).headers["ETag"]
            asked = value and {"If-Match": value.format(tag=tag, bare=tag.strip('"'))}
            answer = await client.patch(PATH, json={"name": "another"}, headers=asked)
            assert answer.status_code == status
            name = (await client.hub.blueprint(DOCUMENT.digest)).document.name
            assert (name == "another") is (status == 200)
            assert (answer.headers.get("ETag", tag) != tag) is (status == 200)

    asyncio.run(life())


def test_what_is_made_in_the_place_of_another_has_another_tag(place):
    async def life() -> None:
        async with serving(settings(place)) as client:
            await client.hub.put_blueprint(DOCUMENT)
            old = (await client.get(PATH)).headers["ETag"]
            assert (await client.delete(PATH, headers={"If-Match": old})).status_code == 204
            await client.hub.put_blueprint(DOCUMENT)
            assert (await client.get(PATH, headers={"If-None-Match": old})).status_code == 200
            assert (await client.delete(PATH, headers={"If-Match": old})).status_code == 412

    asyncio.run(life())


def test_a_kernel_that_is_shown_otherwise_has_another_tag(place):
    async def life() -> None:
        async with serving(settings(place)) as client:
            await client.hub.put_blueprint(DOCUMENT)
            kernel = await client.hub.request_kernel(DOCUMENT.digest, target())
            path = f"/api/v1/kernels/{kernel.kernel}"
            known = {"If-None-Match": (await client.get(path)).headers["ETag"]}
            assert (await client.get(path, headers=known)).status_code == 304
            await client.patch(PATH, json={"name": "another"})
            answer = await client.get(path, headers=known)
            assert (answer.status_code, answer.json()["blueprint"]) == (200, "another")

    asyncio.run(life())
