"""Every name that the audit of the earlier system gives exists under its module, and works.

`USED` lists them; each has one test that uses it once on real data. `LATER` lists those that come
with a capability that is not here yet; once one is, it must move to `USED`.
"""

import asyncio
import json
import logging
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from sqlalchemy import select
from torch import nn

from esper.contracts.blueprints import builtin, kernel_id
from esper.contracts.enums import ControllerPolicy, DecisionAction
from esper.contracts.operational import Candidate, ControllerSettings, LayerDescription
from esper.zoo.data import digits

LATER = {
    "esper.services.tamiyo.policy.TamiyoPolicyGNN": "the learned policy",
    "esper.services.tamiyo.policy.PolicyConfig": "the learned policy",
    "esper.services.tamiyo.training.TamiyoTrainer": "the learned policy",
}

USED = {
    "esper": ("wrap", "MorphableModel", "KasminaLayer", "SeedLifecycleState", "EsperConfig"),
    "esper.configs": (
        "DatabaseConfig",
        "RedisConfig",
        "StorageConfig",
        "ComponentConfig",
        "EsperConfig",
    ),
    "esper.contracts.enums": ("SeedState", "BlueprintState", "SystemHealth", "ComponentType"),
    "esper.contracts.assets": ("Seed", "Blueprint", "TrainingSession"),
    "esper.contracts.operational": (
        "HealthSignal",
        "SystemStatePacket",
        "AdaptationDecision",
        "ModelGraphState",
    ),
    "esper.contracts.messages": ("OonaMessage", "TopicNames", "BlueprintSubmitted"),
    "esper.contracts.validators": ("validate_seed_id",),
    "esper.core.model_wrapper": ("MorphableModel", "wrap", "unwrap"),
    "esper.execution": ("KasminaLayer", "KasminaStateLayout", "SeedLifecycleState", "KernelCache"),
    "esper.execution.state_layout": ("SeedLifecycleState", "KasminaStateLayout"),
    "esper.execution.kernel_cache": ("KernelCache",),
    "esper.execution.kasmina_layer": ("KasminaLayer",),
    "esper.services.contracts": ("SimpleBlueprintContract", "SimpleCompiledKernelContract"),
    "esper.services.urza.database": ("DatabaseConfig",),
    "esper.services.urza.main": ("create_app", "serve"),
    "esper.services.urza.models": ("Blueprint", "CompiledKernel"),
    "esper.services.oona_client": ("OonaClient",),
    "esper.services.tezzeret.worker": ("TezzeretWorker",),
    "esper.services.tamiyo.analyzer": ("ModelGraphAnalyzer", "LayerNode", "GraphTopology"),
    "esper.services.tamiyo.main": ("TamiyoService",),
    "esper.services.tolaria.trainer": ("TolariaTrainer",),
    "esper.services.tolaria.main": ("TolariaService",),
    "esper.utils.logging": ("AsyncEsperLogger", "OptimizedStructuredFormatter"),
    "esper.utils.s3_client": ("OptimizedS3Client",),
}

MODULES = (*USED, "esper.services.tezzeret.main", "esper.services.tolaria.config")


def named(module, name):
    return getattr(import_module(module), name)


def exists(dotted):
    module, _, name = dotted.rpartition(".")
    try:
        if find_spec(dotted) is not None:
            return True
    except ModuleNotFoundError:
        return False
    return hasattr(import_module(module), name)


@pytest.mark.parametrize("module", MODULES)
def test_every_name_stands_under_its_module(module):
    found = import_module(module)
    for name in USED.get(module, ()):
        assert getattr(found, name), name


@pytest.mark.parametrize("dotted", LATER)
def test_what_comes_later_is_not_here_yet(dotted):
    assert not exists(dotted), f"{dotted} exists: move it from LATER to USED, and use it once"


@pytest.mark.parametrize("method", ["forward", "load_kernel", "unload_kernel"])
def test_the_methods_that_the_audit_gives_kasmina_exist(method):
    assert callable(getattr(named("esper.execution", "KasminaLayer"), method, None))


# What the tests below work on: scikit-learn's digits and a small model that reads them.


@pytest.fixture(scope="module")
def images():
    return digits(train=64, validation=32, test=32)["train"].tensors[0].flatten(1).float()


@pytest.fixture
def model(images):
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    return named("esper", "wrap")(host, images)


@pytest.fixture
def document():
    return builtin("low-rank", {"rank": 2})


def packet_of(model, policy=ControllerPolicy.HEURISTIC):
    signal = named("esper.contracts.operational", "HealthSignal")
    names = list(model.morphology.layers)
    signals = tuple(
        signal(
            session="digits",
            epoch=2,
            layer=name,
            gradient_norm=0.5,
            gradient_variance=0.01,
            gradient_to_weight_ratio=0.1,
            activation_rank=0.6,
            dead_fraction=0.2,
        )
        for name in names
    )
    settings = ControllerSettings(
        policy=policy,
        seed=0,
        interval_epochs=1,
        minimum_confidence=0.5,
        active_seeds=1,
        passes=2,
        dwell_epochs=2,
        age_epochs=10,
        ramp_epochs=2,
        hold_epochs=2,
    )
    return named("esper.contracts.operational", "SystemStatePacket")(
        session="digits",
        sequence=1,
        epoch=2,
        epochs=20,
        train_loss=1.0,
        validation_loss=1.1,
        parameters_base=1210,
        parameters=1210,
        remaining_parameters=1000,
        remaining_epochs=18,
        settings=settings,
        layers=tuple(
            LayerDescription(name=name, kind="Linear", parameters=1, slots=1) for name in names
        ),
        edges=model.morphology.edges,
        signals=signals,
        candidates=tuple(
            Candidate(layer=name, blueprint="noop", parameters=0, flops=0, folds=True)
            for name in names
        ),
        health=named("esper.contracts.enums", "SystemHealth").of(signals[0].health_score()),
    )


async def compiled(model, document, directory):
    """The document compiled for the model's first layer by a worker, over the real bus and hub."""
    from esper.contracts.messages import KernelReady, KernelRequested
    from esper.services.oona_client import InProcessOona
    from esper.services.urza.client import in_process_urza

    config = named("esper.configs", "EsperConfig")().inside(directory)
    topics = named("esper.contracts.messages", "TopicNames")
    component = named("esper.contracts.enums", "ComponentType")
    target = model.morphology.target(next(iter(model.morphology.layers)))
    name = kernel_id(document.digest, target)
    Path(config.storage.folder).parent.mkdir(parents=True)
    async with in_process_urza(config.database, config.storage) as hub:
        await hub.put_blueprint(document)
        bus = InProcessOona()
        worker = named("esper.services.tezzeret.worker", "TezzeretWorker")(bus, hub)
        answers = await bus.subscribe({topics.KERNEL_READY}, "test")
        work = asyncio.create_task(worker.run(await worker.subscribe()))
        request = KernelRequested(
            session="digits",
            kernel=name,
            blueprint=document.name,
            blueprint_digest=document.digest,
            target=target,
        )
        envelope = named("esper.contracts.messages", "OonaMessage").carrying(
            topics.KERNEL_REQUESTED, request, component.TOLARIA
        )
        await bus.publish(envelope)
        answer = (await answers.receive()).open()
        assert isinstance(answer, KernelReady)
        assert answer.error is None
        await answers.close()
        cache = named("esper.execution", "KernelCache")(hub)
        template = await cache.load(name)
        assert await cache.load(name) is template
        kernel = await hub.kernel(name)
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)
        await bus.close()
    return kernel, template, cache.statistics()


def test_esper(model, images):
    assert isinstance(model, named("esper", "MorphableModel"))
    layers = model.morphology.layers
    assert all(isinstance(layer, named("esper", "KasminaLayer")) for layer in layers.values())
    states = {model.morphology.state(name, 0) for name in layers}
    assert states == {named("esper", "SeedLifecycleState").DORMANT}
    assert model(images).shape == (64, 10)
    assert named("esper", "EsperConfig")().component.kernel_cache_bytes == 512 * 2**20


def test_configs():
    config = named("esper.configs", "EsperConfig").load({"database.pool_size": "3"}, environment={})
    for section in ("Database", "Redis", "Storage", "Component"):
        part = getattr(config, section.lower())
        assert type(part) is named("esper.configs", f"{section}Config")
    assert config.database.pool_size == 3
    assert named("esper.services.urza.database", "DatabaseConfig") is type(config.database)


def test_enums():
    assert len(named("esper.contracts.enums", "SeedState")) == 6
    assert len(named("esper.contracts.enums", "BlueprintState")) == 7
    assert len(named("esper.contracts.enums", "SystemHealth")) == 4
    assert len(named("esper.contracts.enums", "ComponentType")) == 11
    assert json.dumps(named("esper.contracts.enums", "SeedState").DORMANT) == '"dormant"'
    twin = named("esper.execution.state_layout", "SeedLifecycleState")
    assert {state.seed_state for state in twin} == set(named("esper.contracts.enums", "SeedState"))


def test_assets(document):
    seed = named("esper.contracts.assets", "Seed")(seed_id=(0, 0), layer="0")
    blueprint = named("esper.contracts.assets", "Blueprint").proposed(document)
    session = named("esper.contracts.assets", "TrainingSession")(
        name="digits", epochs=3, num_layers=2, num_slots=1, seeds=(seed,)
    )
    assert len({seed.id, blueprint.id, session.id}) == 3
    assert session.changed(epoch=2).updated_at >= session.updated_at


def test_operational_and_messages(model, document):
    packet = packet_of(model)
    decision = named("esper.contracts.operational", "AdaptationDecision").make(
        packet, DecisionAction.WAIT, "nothing to do"
    )
    topics = named("esper.contracts.messages", "TopicNames")
    message = named("esper.contracts.messages", "OonaMessage")
    sender = named("esper.contracts.enums", "ComponentType")
    submitted = named("esper.contracts.messages", "BlueprintSubmitted")(
        blueprint=document.name, digest=document.digest
    )
    for topic, payload in (
        (topics.PACKETS, packet),
        (topics.DECISIONS, decision),
        (topics.BLUEPRINT_SUBMITTED, submitted),
    ):
        sent = message.carrying(topic, payload, sender.TAMIYO)
        assert message.model_validate_json(sent.model_dump_json(by_alias=True)).open() == payload


def test_validators(model):
    validate = named("esper.contracts.validators", "validate_seed_id")
    num_layers = len(model.morphology.layers)
    assert validate((num_layers - 1, 0), num_layers, 1) == (num_layers - 1, 0)
    with pytest.raises(ValueError, match="integer from 0"):
        validate((num_layers, 0), num_layers, 1)


def test_model_wrapper(images):
    host = nn.Sequential(nn.Linear(64, 4), nn.ReLU())
    before = {name: tensor.clone() for name, tensor in host.state_dict().items()}
    model = named("esper.core.model_wrapper", "wrap")(host, images)
    assert isinstance(model, named("esper.core.model_wrapper", "MorphableModel"))
    plain = named("esper.core.model_wrapper", "unwrap")(model)
    assert type(plain) is nn.Sequential
    assert type(plain[0]) is nn.Linear
    assert all(torch.equal(before[name], tensor) for name, tensor in plain.state_dict().items())


def test_state_layout():
    states = named("esper.execution.state_layout", "SeedLifecycleState")
    layout = named("esper.execution.state_layout", "KasminaStateLayout")(2, 1)
    assert len(layout.tensors()) == 8
    layout.transition(1, 0, states.GERMINATED)
    assert layout.record(1, 0).state is states.GERMINATED


def test_from_blueprint_to_seed(model, document, images, tmp_path):
    from esper.execution.kernel_cache import instantiate

    kernel, template, statistics = asyncio.run(compiled(model, document, tmp_path / "run"))
    assert (statistics.hits, statistics.misses) == (1, 1)
    contract = named("esper.services.contracts", "SimpleCompiledKernelContract").of(kernel)
    assert contract.metadata().artifact_digest == kernel.artifact_digest
    name, layer = next(iter(model.morphology.layers.items()))
    assert isinstance(layer, named("esper.execution.kasmina_layer", "KasminaLayer"))
    before = model(images)
    model.morphology.germinate(name, 0, instantiate(template, 0), kernel=kernel.kernel)
    assert torch.equal(model(images), before)


def test_urza_models_and_outlines(document, tmp_path):
    from esper.services.urza.database import Database

    blueprint = named("esper.contracts.assets", "Blueprint").proposed(document)
    outline = named("esper.services.contracts", "SimpleBlueprintContract").of(blueprint)
    assert outline.digest == document.digest
    rows = named("esper.services.urza.models", "Blueprint")
    kernels = named("esper.services.urza.models", "CompiledKernel")

    async def stored():
        config = named("esper.services.urza.database", "DatabaseConfig")(
            url=f"sqlite+aiosqlite:///{tmp_path}/urza.sqlite"
        )
        async with Database(config) as database:
            async with database.transaction() as session:
                session.add(rows.of(blueprint))
            async with database.transaction() as session:
                found = (await session.scalars(select(rows))).one().as_asset()
                return found, (await session.scalars(select(kernels))).all()

    assert asyncio.run(stored()) == (blueprint, [])


def test_urza_serves(document, tmp_path):
    from httpx import ASGITransport, AsyncClient
    from pydantic import SecretStr

    from esper.configs import EsperConfig, UrzaConfig
    from esper.services.urza.auth import Role, Tokens

    key = SecretStr("a key of more than thirty-two characters")
    config = EsperConfig(urza=UrzaConfig(signing_key=key)).inside(tmp_path)
    token = Tokens(key).mint(Role.SESSION, "audit")

    async def put():
        app = named("esper.services.urza.main", "create_app")(config)
        async with (
            app.router.lifespan_context(app),
            AsyncClient(transport=ASGITransport(app), base_url="http://urza") as client,
        ):
            client.headers["Authorization"] = f"Bearer {token}"
            made = await client.post("/api/v1/blueprints/", json=document.to_wire())
            found = await client.get(made.headers["Location"])
            return made.status_code, found.json()["digest"]

    assert asyncio.run(put()) == (201, document.digest)
    # What `esper serve urza` waits on; tests of its own start it.
    assert callable(named("esper.services.urza.main", "serve"))


def test_tamiyo(model):
    from esper.services.oona_client import InProcessOona

    packet = packet_of(model)
    state = named("esper.services.tamiyo.analyzer", "ModelGraphAnalyzer")().analyze(packet)
    assert isinstance(state, named("esper.contracts.operational", "ModelGraphState"))
    assert isinstance(state.topology, named("esper.services.tamiyo.analyzer", "GraphTopology"))
    node_type = named("esper.services.tamiyo.analyzer", "LayerNode")
    assert all(isinstance(node, node_type) for node in state.topology.nodes)
    topics = named("esper.contracts.messages", "TopicNames")
    message = named("esper.contracts.messages", "OonaMessage").carrying(
        topics.PACKETS, packet, named("esper.contracts.enums", "ComponentType").TOLARIA
    )

    async def answered():
        bus = InProcessOona()
        service = named("esper.services.tamiyo.main", "TamiyoService")(bus)
        decisions = await bus.subscribe({topics.DECISIONS}, "test")
        await service.start()
        await bus.publish(message)
        answer = await decisions.receive()
        await service.stop()
        await bus.close()
        return answer

    answer = asyncio.run(answered())
    assert answer.trace_id == message.trace_id
    assert answer.open().session == packet.session


def test_tolaria(tmp_path):
    from esper.contracts.manifests import parse_manifest
    from esper.services.tolaria import entrypoints
    from esper.services.tolaria.config import TolariaConfig
    from esper.services.tolaria.distribution import Alone

    manifest = parse_manifest(
        json.dumps(
            {
                "apiVersion": "esper.dev/v1alpha1",
                "kind": "TrainingSession",
                "metadata": {"name": "digits"},
                "spec": {
                    "model": {
                        "entrypoint": "esper.zoo.models:MLP",
                        "arguments": {"inputs": 64, "hidden": [8], "outputs": 10},
                    },
                    "data": {
                        "entrypoint": "esper.zoo.data:digits",
                        "arguments": {"train": 64, "validation": 64, "test": 32},
                    },
                    "training": {"epochs": 2},
                    "growth": {"controller": {"policy": "none"}},
                },
            }
        ),
        "session.yaml",
    )
    config = TolariaConfig.from_resource(manifest.session)
    assert TolariaConfig.from_yaml(config.to_yaml()) == config
    datasets = entrypoints.build_datasets(config)
    objective = entrypoints.build_objective(config, datasets)
    host = entrypoints.build_model(config)
    inputs, _ = entrypoints.check_fit(host, datasets, objective)
    service = named("esper.services.tolaria.main", "TolariaService")()
    analyze = named("esper.services.tamiyo.analyzer", "ModelGraphAnalyzer")().analyze

    class Tamiyo:
        async def tell(self, news):
            """Nobody listens."""

        async def decide(self, packet):
            from esper.services.tamiyo.heuristics import POLICIES

            return POLICIES[packet.settings.policy](packet, analyze(packet))

    trainer = named("esper.services.tolaria.trainer", "TolariaTrainer")(
        config,
        named("esper", "wrap")(host, inputs),
        datasets,
        objective,
        (),
        controller=Tamiyo(),
        kernels=None,
        ranks=Alone(service.stopping),
    )
    result = asyncio.run(service.run(trainer))
    assert result.epochs == 2
    assert result.parameters == result.parameters_base
    assert result.flops > 0


def test_logging(tmp_path):
    path = tmp_path / "log"
    with named("esper.utils.logging", "AsyncEsperLogger")("tolaria", level="info", file=path):
        logging.getLogger("esper.services.tolaria").info("run %s", trace := uuid4().hex)
    record = logging.makeLogRecord({"name": "esper", "msg": "run %s", "args": (trace,)})
    formatter = named("esper.utils.logging", "OptimizedStructuredFormatter")("tolaria")
    written, formatted = json.loads(path.read_text()), json.loads(formatter.format(record))
    assert written["message"] == formatted["message"] == f"run {trace}"


def test_oona_client(redis_server, redis_namespace, model):
    topics = named("esper.contracts.messages", "TopicNames")
    settings = named("esper.configs", "RedisConfig")(
        url=redis_server.url, namespace=redis_namespace
    )
    message = named("esper.contracts.messages", "OonaMessage").carrying(
        topics.PACKETS, packet_of(model), named("esper.contracts.enums", "ComponentType").TOLARIA
    )

    async def there_and_back():
        client = named("esper.services.oona_client", "OonaClient")
        tolaria, tamiyo = client(settings, scope="session"), client(settings, scope=None)
        await tolaria.publish(message)
        packets = await tamiyo.subscribe({topics.PACKETS}, "tamiyo")
        came = await packets.receive()
        await packets.acknowledge(came)
        await tolaria.close()
        await tamiyo.close()
        return came

    came = asyncio.run(there_and_back())
    assert came.scope == "session"
    assert came.open() == message.open()


def test_s3_client(s3_bucket, model, document):
    from esper.services.tezzeret.compiler import compile_kernel

    settings = named("esper.configs", "StorageConfig")(
        bucket=s3_bucket.name,
        endpoint_url=s3_bucket.endpoint_url,
        region=s3_bucket.region,
        access_key_id=s3_bucket.access_key_id,
        secret_access_key=s3_bucket.secret_access_key,
    )
    target = model.morphology.target(next(iter(model.morphology.layers)))
    artifact = compile_kernel(document, target)
    digest = artifact.metadata.artifact_digest

    async def there_and_back():
        store = named("esper.utils.s3_client", "OptimizedS3Client")(settings)
        assert await store.put(f"kernels/{digest}", artifact.data)
        assert not await store.put(f"kernels/{digest}", artifact.data)
        came = await store.get(f"kernels/{digest}", sha256=digest)
        await store.close()
        return came

    assert asyncio.run(there_and_back()) == artifact.data
