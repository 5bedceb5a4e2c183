"""Kernels in a cluster's hub: made anew for each session, and each accepted once."""

from __future__ import annotations

import json
from collections.abc import Sequence

import httpx

from tools import helm
from tools.chaos_checks import Outcome
from tools.real_cluster import HUB, RealCluster
from tools.servers.process import ServerError

DATABASE = "/var/lib/esper/urza.sqlite"
"""In the hub's pod."""


def forget(cluster: RealCluster, kernels: Sequence[str]) -> list[str]:
    """Delete kernels from the hub; whoever asks for them next has them made anew.

    Those that a live session uses stay. So do CompiledKernels, which are people's: in a namespace
    that has them, what they tell of is there again once anybody has asked.

    Returns:
        Those that the hub does not have any more.

    Raises:
        ServerError: the hub refuses one for another reason, or does not answer.
    """
    gone = []
    with cluster.hub() as hub:
        assert hub.token is not None
        headers = {"Authorization": f"Bearer {hub.token.get_secret_value()}"}
        for kernel in kernels:
            url = f"{hub.url}/api/v1/kernels/{kernel}"
            try:
                answer = httpx.delete(url, headers=headers, trust_env=False)
            except httpx.HTTPError as error:
                raise ServerError(f"kernel {kernel} can't be deleted: {error}") from error
            if answer.status_code in (httpx.codes.NO_CONTENT, httpx.codes.NOT_FOUND):
                gone.append(kernel)
            elif answer.status_code != httpx.codes.CONFLICT:
                raise ServerError(f"kernel {kernel} can't be deleted: {answer.text}")
    return gone


class Notes:
    """What the hub's database notes, by a trigger, of every result that it accepts for a kernel."""

    def __init__(self, cluster: RealCluster) -> None:
        self._cluster = cluster

    def begin(self) -> None:
        """Begin to note.

        Raises:
            ServerError: the hub has no SQLite on a volume.
        """
        self.end()
        self._executed(
            "CREATE TABLE accepted_results (id text, lease text);"
            "CREATE TRIGGER note_result AFTER UPDATE OF state ON compiled_kernels "
            "WHEN NEW.state = 'characterized' BEGIN "
            "INSERT INTO accepted_results VALUES (NEW.id, NEW.lease_token); END;"
        )

    def end(self) -> None:
        """Note no more, and leave nothing."""
        self._executed("DROP TRIGGER IF EXISTS note_result; DROP TABLE IF EXISTS accepted_results;")

    def check(self, kernels: Sequence[str], outcome: Outcome) -> None:
        """One accepted result a kernel, also of those that were deleted since, and of its lease."""
        rows = json.loads(
            self._asked(
                "SELECT a.id, count(*), k.kernel, k.lease_token = a.lease FROM accepted_results a "
                "LEFT JOIN compiled_kernels k ON k.id = a.id GROUP BY a.id"
            )
        )
        outcome.figures["acceptedResults"] = len(rows)
        for row, times, kernel, of_lease in rows:
            outcome.check(times == 1, f"kernel {kernel or row}: {times} results were accepted")
            outcome.check(of_lease != 0, f"kernel {kernel}: the result of another lease")
        missing = set(kernels) - {kernel for _, _, kernel, _ in rows}
        outcome.check(not missing, f"no result was accepted for kernels {', '.join(missing)}")

    def _executed(self, statements: str) -> None:
        self._run(f"db.executescript({statements!r})")

    def _asked(self, query: str) -> str:
        return self._run(f"print(json.dumps(db.execute({query!r}).fetchall()))")

    def _run(self, code: str) -> str:
        """What Python prints in the hub's pod, beside the hub, over its database."""
        program = (
            "import json, sqlite3\n"
            f"db = sqlite3.connect('file:{DATABASE}?mode=rw', uri=True, timeout=30)\n"
            f"{code}\ndb.close()\n"
        )
        words = ("exec", f"statefulset/{HUB}", "--", "python", "-c", program)
        return self._cluster.kubectl("-n", helm.NAMESPACE, *words)
