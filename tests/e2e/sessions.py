"""Sessions on a real cluster: short ones of the zoo, and what a test asks of any."""

import copy
import random

import yaml

from esper.contracts.blueprints import KernelTarget, LayerGeometry, builtin, kernel_id
from tests.e2e.clusters import until
from tools import helm
from tools.chaos_cluster import Plan

SECONDS = 900.0
"""For a session to end."""
EXAMPLE = helm.ROOT / "examples" / "02-digits-cnn" / "session.yaml"
CHAOS = Plan(faults=5, seed=1, longest=4.0)
"""`make chaos-cluster` in its quick form."""
SHORT = {
    "apiVersion": "esper.dev/v1alpha1",
    "kind": "TrainingSession",
    "metadata": {"name": "digits"},
    "spec": {
        "model": {
            "entrypoint": "esper.zoo.models:MLP",
            "arguments": {"inputs": 64, "hidden": [16], "outputs": 10},
        },
        "data": {"entrypoint": "esper.zoo.data:digits", "arguments": {"image": False}},
        "training": {"epochs": 8, "checkpoint": {"everyEpochs": 1}},
        "workers": {"replicas": 2},
    },
}
"""Eight epochs of seconds each, which any image of the runtime can train."""


def example():
    """The manifest of example 02."""
    return yaml.safe_load(EXAMPLE.read_text())


def short(name="digits", **spec):
    """A short session with sections of its spec replaced."""
    manifest = copy.deepcopy(SHORT)
    manifest["metadata"]["name"] = name
    manifest["spec"] |= spec
    return manifest


def target_of_nobody():
    inputs = random.randrange(17, 9999)
    layer = LayerGeometry(kind="Linear", inputs=inputs, outputs=10)
    return KernelTarget(layer=layer, input_shape=(inputs,), output_shape=(10,))


def compiled_here(pods):
    """A kernel that nobody has, asked for by an object: its compile Job begins at once."""
    target = target_of_nobody()
    kernel = kernel_id(builtin("low-rank", {}).digest, target)
    version = "esper.dev/v1alpha1"
    pods.apply(
        {
            "apiVersion": version,
            "kind": "Blueprint",
            "metadata": {"name": "low-rank"},
            "spec": {"builtin": "low-rank"},
        },
        {
            "apiVersion": version,
            "kind": "CompiledKernel",
            "metadata": {"name": kernel},
            "spec": {"blueprint": "low-rank", "target": target.to_wire()},
        },
    )
    return kernel


class Session:
    """A session of a test's namespace.

    Args:
        pods: those of the namespace.
        manifest: what is applied, at once.
    """

    def __init__(self, pods, manifest):
        self.pods = pods
        self.name = manifest["metadata"]["name"]
        pods.apply(manifest)

    def get(self, *words):
        """What `kubectl get WORDS` finds in the namespace."""
        return self.pods.cluster.get("-n", self.pods.namespace, *words)

    @property
    def status(self):
        return self.get("trainingsession", self.name).get("status", {})

    def condition(self, kind):
        """A condition; empty where it has none of that kind."""
        conditions = self.status.get("conditions", ())
        return next((item for item in conditions if item["type"] == kind), {})

    def is_(self, kind, status="True"):
        return self.condition(kind).get("status") == status

    def workers(self):
        """The worker pods of all its attempts."""
        labels = f"esper.dev/session={self.name},esper.dev/role=worker"
        return self.get("pods", "-l", labels)["items"]

    def ends(self):
        """Wait for its end; returns the condition that says how."""
        ended = {"True", "False"}
        until(lambda: self.condition("Succeeded").get("status") in ended, seconds=SECONDS)
        return self.condition("Succeeded")

    def succeeds(self):
        """Wait for its end, which has to be a good one; returns its status."""
        end = self.ends()
        assert end["status"] == "True", end
        return self.status

    def fails(self):
        """Wait for its end, which has to be a bad one; returns the condition that says so."""
        end = self.ends()
        assert end["status"] == "False", end
        return end
