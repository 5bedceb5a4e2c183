"""What a trainer's health endpoints count, told by a real trainer."""

import asyncio

from esper.services.health import ServiceHealth
from esper.services.tolaria.health import HealthObserver
from esper.services.tolaria.main import TolariaService
from tests.unit.esper.services.tolaria.test_main import trainer


def test_numbers_follow_the_training():
    health = ServiceHealth("tolaria")
    observer = HealthObserver(health)
    assert "esper_tolaria_decisions_total 0\n" in health.metrics()
    service = TolariaService()
    asyncio.run(service.run(trainer(service, observer, epochs=3)))
    told = health.metrics()
    assert "esper_tolaria_epoch 3\n" in told
    assert "# TYPE esper_tolaria_decisions_total counter\nesper_tolaria_decisions_total 2\n" in told
    assert "esper_tolaria_checkpoints_total 1\n" in told
    assert "esper_tolaria_validation_loss" in told


def test_transitions_and_events_are_counted():
    health = ServiceHealth("tolaria")
    observer = HealthObserver(health)
    observer.transition(None)
    observer.event(1, "RolledBack", "why")
    observer.event(2, "RolledBack", "why")
    told = health.metrics()
    assert "esper_tolaria_transitions_total 1\n" in told
    assert "esper_tolaria_events_total 2\n" in told
