"""Seeds, blueprints, kernels and sessions as services exchange them."""

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.contracts.assets import MAX_SEEDS, Blueprint, CompiledKernel, Seed, TrainingSession
from esper.contracts.blueprints import KernelTarget, LayerGeometry, builtin
from esper.contracts.enums import BlueprintState, SeedState, SessionOutcome

KERNEL = "0" * 40
DIGEST = "a" * 64
TARGET = KernelTarget(
    layer=LayerGeometry(kind="Linear", inputs=4, outputs=3), input_shape=(4,), output_shape=(3,)
)


def kernel(**fields: object) -> CompiledKernel:
    return CompiledKernel.model_validate(
        {
            "kernel": KERNEL,
            "blueprint_digest": DIGEST,
            "blueprint": "noop",
            "target": TARGET,
            **fields,
        }
    )


def session(**fields: object) -> TrainingSession:
    return TrainingSession.model_validate(
        {"name": "s", "epochs": 10, "num_layers": 2, "num_slots": 2, **fields}
    )


def samples() -> list[Seed | Blueprint | CompiledKernel | TrainingSession]:
    seed = Seed(
        seed_id=(1, 0),
        layer="fc1",
        state=SeedState.GRAFTING,
        alpha=0.5,
        blueprint="noop",
        kernel=KERNEL,
    )
    compiled = {"artifact_digest": DIGEST, "artifact_bytes": 10}
    return [
        seed,
        Blueprint.proposed(builtin("noop", {})),
        kernel(state=BlueprintState.CHARACTERIZED, **compiled),
        session(seeds=(seed,), outcome=SessionOutcome.SUCCEEDED, epoch=10),
    ]


@pytest.mark.parametrize("asset", samples(), ids=lambda asset: type(asset).__name__)
def test_assets_cross_the_wire_unchanged(asset):
    assert type(asset).model_validate_json(asset.model_dump_json(by_alias=True)) == asset
    assert type(asset).model_validate(asset.to_wire()) == asset


@pytest.mark.parametrize("asset", samples(), ids=lambda asset: type(asset).__name__)
def test_assets_have_an_identity_and_aware_times(asset):
    other = type(asset).model_validate(
        {key: value for key, value in asset.to_wire().items() if key != "id"}
    )

    assert asset.id != other.id
    assert asset.created_at.utcoffset() == timedelta(0)
    assert asset.created_at <= asset.updated_at


@pytest.mark.parametrize("asset", samples(), ids=lambda asset: type(asset).__name__)
def test_assets_are_frozen_and_closed(asset):
    with pytest.raises(ValidationError, match="frozen"):
        asset.id = None
    with pytest.raises(ValidationError, match="Extra inputs"):
        type(asset).model_validate({**asset.to_wire(), "colour": "green"})
    with pytest.raises(ValidationError, match="timezone"):
        type(asset).model_validate({**asset.to_wire(), "createdAt": datetime(2026, 1, 1)})


def test_the_next_snapshot_keeps_the_identity_and_is_validated():
    first = session(updated_at=datetime(2026, 1, 1, tzinfo=UTC))
    second = first.changed(epoch=3)

    assert (second.id, second.created_at) == (first.id, first.created_at)
    assert second.updated_at > first.updated_at
    assert (first.epoch, second.epoch) == (0, 3)
    with pytest.raises(ValidationError, match="got 11; allowed: 0 to 10"):
        first.changed(epoch=11)
    with pytest.raises(ValidationError, match="Extra inputs"):
        first.changed(colour="green")


@pytest.mark.parametrize(
    "state", [s for s in SeedState if s not in {SeedState.DORMANT, SeedState.CULLED}]
)
def test_a_live_seed_names_its_blueprint_and_kernel(state):
    with pytest.raises(ValidationError, match="without blueprint and kernel"):
        Seed(seed_id=(0, 0), layer="l", state=state, blueprint="noop")
    assert Seed(seed_id=(0, 0), layer="l", state=state, blueprint="noop", kernel=KERNEL)


@pytest.mark.parametrize("state", [SeedState.DORMANT, SeedState.CULLED])
def test_a_seed_at_rest_needs_none(state):
    assert Seed(seed_id=(0, 0), layer="l", state=state).kernel is None


@pytest.mark.parametrize("seed_id", [(True, 0), (0, 1.0), ("0", 0), (0,), (0, 0, 0)])
def test_a_seed_id_is_two_integers(seed_id):
    with pytest.raises(ValidationError, match="seedId"):
        Seed.model_validate({"seedId": seed_id, "layer": "l"})


def test_a_blueprints_digest_is_its_documents():
    document = builtin("low-rank", {"rank": 2})

    assert Blueprint.proposed(document).digest == document.digest
    with pytest.raises(ValidationError, match=f"allowed: {document.digest}"):
        Blueprint(document=document, digest=DIGEST)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"state": "characterized"}, "artifactDigest"),
        ({"state": "characterized", "artifactDigest": DIGEST}, "artifactDigest"),
        ({"artifactDigest": DIGEST, "artifactBytes": 1}, "artifactDigest"),
        ({"state": "failed"}, "error"),
        ({"error": "shapes"}, "error"),
        ({"kernel": "../" + "0" * 37}, "kernel"),
        ({"kernel": KERNEL + "0"}, "kernel"),
    ],
)
def test_a_kernels_fields_agree_with_its_state(fields, message):
    with pytest.raises(ValidationError, match=message):
        CompiledKernel.model_validate({**kernel().to_wire(), **fields})


@given(st.integers(0, 3), st.integers(0, 3))
def test_a_sessions_seeds_lie_within_its_model(layer, slot):
    seed = Seed(seed_id=(layer, slot), layer="l")

    if layer < 2 and slot < 2:
        assert session(seeds=(seed,)).seeds == (seed,)
    else:
        with pytest.raises(ValidationError, match="an integer from 0 to 1"):
            session(seeds=(seed,))


def test_a_session_has_so_many_seeds_at_most():
    seeds = tuple(Seed(seed_id=(0, slot), layer="l") for slot in range(MAX_SEEDS + 1))

    assert len(session(num_slots=100, seeds=seeds[1:]).seeds) == MAX_SEEDS == 64
    with pytest.raises(ValidationError, match="at most 64"):
        session(num_slots=100, seeds=seeds)


def test_a_slot_holds_one_seed():
    seeds = (Seed(seed_id=(0, 1), layer="l"), Seed(seed_id=(0, 1), layer="l"))

    with pytest.raises(ValidationError, match=r"seeds\[1\]\.seedId: got \(0, 1\) again"):
        session(seeds=seeds)
