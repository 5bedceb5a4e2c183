"""A whole survey, packet by packet, its decisions carried out by the rules of the lifecycle."""

from __future__ import annotations

import pytest

from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.operational import LayerDescription
from esper.services.tamiyo.analyzer import ModelGraphAnalyzer
from esper.services.tamiyo.heuristics import decide

TRIAL, GRAFT, EMBARGO = 5, 6, 3

# Two slots: one for what is ready or under embargo, one for the next trial in the same layer.
LAYERS = tuple(
    LayerDescription(name=name, kind="Linear", parameters=366, slots=2)
    for name in ("fc1", "fc2", "fc3")
)


def grow(build, gains, *, active_seeds, remaining=5000, epochs=100):
    """Run the lifecycle for `epochs`; `gains` are what (layer, blueprint) contributes, else 0.

    Returns what was fossilized, in order, and every decision.
    """
    seeds, trials, decisions, fossils, ends = {}, {}, [], [], {}
    analyzer = ModelGraphAnalyzer()
    for epoch in range(1, epochs):
        for site, seed in list(seeds.items()):
            age = seed.age_epochs + 1
            gain = gains.get((seed.layer, seed.blueprint), 0.0)
            update = {"age_epochs": age}
            if seed.state is SeedState.GERMINATED:
                update = {"state": SeedState.TRAINING, "age_epochs": 0}
            elif seed.state is SeedState.TRAINING and not seed.ready:
                measured = build.measured(gain * min(age, TRIAL) / TRIAL)
                update |= {"measurement": measured, "ready": age >= TRIAL and measured.passes()}
                if age >= 2 * TRIAL:
                    update["state"] = SeedState.CULLED
            elif seed.state is SeedState.GRAFTING and age >= GRAFT:
                update["state"] = SeedState.FOSSILIZED
                remaining -= seed.parameters
                fossils.append((seed.layer, seed.blueprint))
            seeds[site] = seed.model_copy(update=update)
            if update.get("state") in (SeedState.CULLED, SeedState.FOSSILIZED):
                ends[site] = epoch
                trials[site, seed.cycle] = trials[site, seed.cycle].model_copy(
                    update={"state": update["state"], "ended_epoch": epoch}
                )
            if seed.state is SeedState.CULLED and epoch - ends[site] >= EMBARGO:
                del seeds[site]
        packet = build.packet(
            {"active_seeds": active_seeds},
            epoch=epoch,
            remaining_parameters=remaining,
            layers=LAYERS,
            seeds=tuple(seeds.values()),
            trials=tuple(trials.values()),
        )
        decision = decide(packet, analyzer.analyze(packet))
        decisions.append(decision)
        site = (decision.layer, decision.slot)
        if decision.action is DecisionAction.GERMINATE:
            cycle = len(trials)
            seeds[site] = build.seed(
                decision.layer,
                decision.blueprint,
                slot=decision.slot,
                state=SeedState.GERMINATED,
                age_epochs=0,
                cycle=cycle,
            )
            trials[site, cycle] = build.trial(
                decision.layer,
                decision.blueprint,
                slot=decision.slot,
                cycle=cycle,
                started_epoch=epoch,
                ended_epoch=None,
                state=SeedState.GERMINATED,
            )
        elif decision.action is DecisionAction.GRAFT:
            seeds[site] = seeds[site].model_copy(
                update={"state": SeedState.GRAFTING, "age_epochs": 0}
            )
        elif decision.action is DecisionAction.CULL:
            ends[site] = epoch
            seed = seeds[site] = seeds[site].model_copy(update={"state": SeedState.CULLED})
            trials[site, seed.cycle] = trials[site, seed.cycle].model_copy(
                update={"state": SeedState.CULLED, "ended_epoch": epoch}
            )
    return fossils, decisions


@pytest.mark.parametrize("active_seeds", [1, 2, 3])
@pytest.mark.parametrize("best", ["fc1", "fc2", "fc3"])
def test_the_best_site_is_grown_first_wherever_it_is(build, best, active_seeds):
    gains = {(layer, "bottleneck-mlp"): 0.1 for layer in ("fc1", "fc2", "fc3")}
    gains[best, "bottleneck-mlp"] = 0.4
    fossils, _ = grow(build, gains, active_seeds=active_seeds)
    assert fossils[0] == (best, "bottleneck-mlp")


def test_the_budget_ends_growth_and_what_folds_stays_out(build):
    gains = {
        (layer, name): 0.2
        for layer in ("fc1", "fc2", "fc3")
        for name in ("bottleneck-mlp", "low-rank")
    }
    fossils, _ = grow(build, gains, active_seeds=3, remaining=2100)
    assert fossils == [("fc1", "bottleneck-mlp")]


def test_a_sound_host_grows_nothing(build):
    fossils, decisions = grow(build, {}, active_seeds=2)
    assert fossils == []
    assert DecisionAction.GRAFT not in {decision.action for decision in decisions}
    tried = {(d.layer, d.blueprint) for d in decisions if d.action is DecisionAction.GERMINATE}
    assert len(tried) == 6
