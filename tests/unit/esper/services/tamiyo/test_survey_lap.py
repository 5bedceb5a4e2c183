"""Whole surveys, packet by packet, their decisions carried out by the rules of the lifecycle.

At each boundary the session is asked again until it waits, as a trainer does.
"""

from __future__ import annotations

from collections import Counter

import pytest

from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.operational import LayerDescription
from esper.services.tamiyo.analyzer import ModelGraphAnalyzer
from esper.services.tamiyo.heuristics import decide

DWELL, AGE, PASSES, RAMP, HOLD, EMBARGO = 5, 10, 2, 3, 2, 5
NAMES = ("fc1", "fc2", "fc3")


class Session:
    """One session's seeds and trials, aged and judged as the lifecycle has it.

    `gains` are what (layer, blueprint) contributes, else 0; a seed whose site is in `relapsing`
    fails its recovery trial. `fossils` and `starts` keep (epoch, layer, blueprint).
    """

    def __init__(self, build, gains, *, slots=1, active=1, epochs=100, remaining=5000, **options):
        self.build, self.gains, self.slots, self.epochs = build, gains, slots, epochs
        self.remaining = remaining
        self.relapsing = options.pop("relapsing", ())
        self.candidates = options.pop("candidates", build.packet().candidates)
        self.interval = options.get("interval_epochs", 1)
        self.settings = {"active_seeds": active, "age_epochs": AGE, **options}
        self.seeds, self.cycles, self.opens, self.trials = {}, Counter(), {}, []
        self.fossils, self.starts, self.decisions = [], [], []
        self.analyzer, self.sequence, self.epoch = ModelGraphAnalyzer(), 0, 0

    def run(self):
        while self.epoch + self.interval < self.epochs:
            self.epoch += self.interval
            for site in list(self.seeds):
                self._grow_older(site)
            while self._decide():
                pass
            learning = sum(map(self._learning, self.seeds.values()))
            for site, seed in self.seeds.items():
                if seed.state is SeedState.GERMINATED and learning < self.settings["active_seeds"]:
                    learning += 1
                    self._set(site, state=SeedState.TRAINING, age_epochs=0)
        return self

    @staticmethod
    def _learning(seed):
        return seed.state is SeedState.TRAINING and not seed.ready

    def _set(self, site, **update):
        self.seeds[site] = self.seeds[site].model_copy(update=update)

    def _end(self, site, state):
        seed = self.seeds[site]
        self._set(site, state=state, ready=False, age_epochs=0)
        self.opens[site] = self.epoch + EMBARGO * 2 ** self.cycles[site]
        index = max(
            index
            for index, trial in enumerate(self.trials)
            if (trial.layer, trial.slot) == (seed.layer, seed.slot)
        )
        self.trials[index] = self.trials[index].model_copy(
            update={"state": state, "ended_epoch": self.epoch}
        )

    def _grow_older(self, site):
        self._set(site, age_epochs=(age := self.seeds[site].age_epochs + self.interval))
        seed = self.seeds[site]
        if self._learning(seed):
            share = min(age, DWELL) / DWELL
            measured = self.build.measured(share * self.gains.get((site[0], seed.blueprint), 0.0))
            passes = seed.passes + 1 if measured.passes() else 0
            ready = passes >= PASSES and age >= DWELL
            self._set(site, measurement=measured, passes=passes, ready=ready)
            if age >= self.settings["age_epochs"] and not ready:
                self._end(site, SeedState.CULLED)
        elif seed.state is SeedState.GRAFTING and age >= RAMP + HOLD + self.interval:
            if (seed.layer, seed.blueprint) in self.relapsing:
                self.remaining += seed.parameters
                self._end(site, SeedState.CULLED)
            else:
                self.fossils.append((self.epoch, seed.layer, seed.blueprint))
                self._end(site, SeedState.FOSSILIZED)
        elif seed.state is SeedState.CULLED and self.epoch >= self.opens[site]:
            self.cycles[site] += 1
            self._set(site, state=SeedState.DORMANT, passes=0, measurement=None)

    def _packet(self):
        self.sequence += 1
        return self.build.packet(
            self.settings,
            epochs=self.epochs,
            epoch=self.epoch,
            sequence=self.sequence,
            remaining_epochs=self.epochs - self.epoch,
            remaining_parameters=self.remaining,
            layers=tuple(
                LayerDescription(name=name, kind="Linear", parameters=366, slots=self.slots)
                for name in NAMES
            ),
            seeds=tuple(self.seeds.values()),
            candidates=self.candidates,
            trials=tuple(self.trials),
        )

    def _decide(self):
        packet = self._packet()
        decision = decide(packet, self.analyzer.analyze(packet))
        self.decisions.append(decision)
        site = (decision.layer, decision.slot)
        if decision.action is DecisionAction.GERMINATE:
            assert site not in self.seeds or self.seeds[site].state is SeedState.DORMANT
            place = {"slot": decision.slot, "cycle": self.cycles[site]}
            place["state"] = SeedState.GERMINATED
            self.seeds[site] = self.build.seed(
                decision.layer, decision.blueprint, age_epochs=0, **place
            )
            self.trials.append(
                self.build.trial(
                    decision.layer,
                    decision.blueprint,
                    started_epoch=self.epoch,
                    ended_epoch=None,
                    **place,
                )
            )
            self.starts.append((self.epoch, decision.layer, decision.blueprint))
        elif decision.action is DecisionAction.GRAFT:
            seed = self.seeds[site]
            assert seed.ready
            self.remaining -= seed.parameters
            assert self.remaining >= 0
            self._set(site, state=SeedState.GRAFTING, ready=False, age_epochs=0)
        elif decision.action is DecisionAction.CULL:
            assert self.seeds[site].state is SeedState.TRAINING
            self._end(site, SeedState.CULLED)
        return decision.action is not DecisionAction.WAIT

    def grafts(self):
        return [(d.epoch, d.layer, d.blueprint) for d in self.decisions if d.action == "graft"]


def everywhere(gain, blueprint="bottleneck-mlp"):
    return {(layer, blueprint): gain for layer in NAMES}


@pytest.mark.parametrize("slots", [1, 2])
@pytest.mark.parametrize("active", [1, 2, 8])
@pytest.mark.parametrize("best", NAMES)
def test_the_best_site_is_grown_first_wherever_it_is(build, best, active, slots):
    gains = everywhere(0.1) | {(best, "bottleneck-mlp"): 0.4}
    session = Session(build, gains, active=active, slots=slots).run()
    assert session.fossils[0][1:] == (best, "bottleneck-mlp")


@pytest.mark.parametrize("best", NAMES)
def test_one_slot_and_one_seat_reach_the_best_site_one_trial_at_a_time(build, best):
    session = Session(build, everywhere(0.1) | {(best, "bottleneck-mlp"): 0.4}).run()
    assert session.starts[:3] == [
        (50, "fc1", "bottleneck-mlp"),
        (55, "fc2", "bottleneck-mlp"),
        (60, "fc3", "bottleneck-mlp"),
    ]
    assert session.grafts()[0] == (65, best, "bottleneck-mlp")
    assert session.fossils[0] == (71, best, "bottleneck-mlp")


def test_enough_seats_try_all_at_one_boundary_and_race(build):
    gains = {
        (f"fc{number}", "bottleneck-mlp"): gain for number, gain in [(1, 0.1), (2, 0.4), (3, 0.2)]
    }
    session = Session(build, gains, slots=4, active=16).run()
    assert session.starts[:6] == [
        (50, layer, blueprint) for blueprint in ("bottleneck-mlp", "noop") for layer in NAMES
    ]
    culled = [d for d in session.decisions if d.action is DecisionAction.CULL and d.epoch <= 55]
    # After two epochs the gains are 0.04, 0.16 and 0.08, each known to 0.02.
    assert [(d.epoch, d.layer, d.blueprint) for d in culled] == [
        *((52, layer, "noop") for layer in NAMES),
        (52, "fc1", "bottleneck-mlp"),
        (52, "fc3", "bottleneck-mlp"),
    ]
    assert session.grafts()[0] == (55, "fc2", "bottleneck-mlp")


def test_what_waits_behind_an_embargo_is_tried_before_anything_is_grafted(build):
    kinds = (("fc1", "bottleneck-mlp"), ("fc1", "widen"), ("fc2", "bottleneck-mlp"))
    candidates = tuple(build.candidate(*kind) for kind in kinds)
    gains = {("fc1", "bottleneck-mlp"): 0.4, ("fc2", "bottleneck-mlp"): 0.1}
    session = Session(build, gains, candidates=candidates).run()
    # `widen` is smaller, goes first, and fails at its age limit: fc1 is closed until 65.
    assert session.starts[:3] == [
        (50, "fc1", "widen"),
        (60, "fc2", "bottleneck-mlp"),
        (65, "fc1", "bottleneck-mlp"),
    ]
    assert session.fossils[0] == (76, "fc1", "bottleneck-mlp")


def test_a_survey_that_found_nothing_starts_again_after_its_embargoes(build):
    candidates = tuple(build.candidate(layer) for layer in NAMES)
    session = Session(build, {}, active=3, candidates=candidates).run()
    # The first cycle's embargo is 5 epochs, the second's 10: it ends too late for a third survey.
    expected = [(epoch, layer, "bottleneck-mlp") for epoch in (50, 65) for layer in NAMES]
    assert session.starts == expected
    assert (session.fossils, session.grafts()) == ([], [])
    waited = {d.epoch: d.reason for d in session.decisions if 60 <= d.epoch < 65}
    assert waited[60].startswith("The survey is over after 3 trials")
    assert {waited[epoch] for epoch in (61, 62, 63, 64)} == {
        "No layer of 3 untried candidates has a free slot."
    }


def test_a_site_that_did_not_pay_yet_gets_its_chance_in_the_next_survey(build):
    candidates = tuple(build.candidate(layer) for layer in NAMES)
    session = Session(build, {}, active=3, candidates=candidates)

    class Later(dict):
        def get(self, site, default=None):
            return 0.3 if session.epoch > 60 and site[0] == "fc2" else default

    session.gains = Later()
    session.run()
    assert session.fossils == [(76, "fc2", "bottleneck-mlp")]


def test_a_failed_recovery_ends_no_survey_before_all_were_tried_and_the_next_one_follows(build):
    session = Session(
        build,
        everywhere(0.1) | {("fc1", "bottleneck-mlp"): 0.4},
        active=3,
        slots=2,
        candidates=tuple(build.candidate(layer) for layer in NAMES),
        relapsing={("fc1", "bottleneck-mlp")},
    ).run()
    assert session.grafts()[:2] == [
        (55, "fc1", "bottleneck-mlp"),
        (67, "fc1", "bottleneck-mlp"),
    ]
    assert [epoch for epoch, layer, _ in session.starts if layer == "fc2"] == [50, 62, 74]
    assert session.fossils == []


def test_a_layer_full_of_fossils_is_passed_over_by_later_surveys(build):
    gains = {("fc1", "bottleneck-mlp"): 0.4}
    candidates = tuple(build.candidate(layer, parameters=10) for layer in NAMES)
    session = Session(build, gains, active=3, candidates=candidates).run()
    assert session.fossils == [(61, "fc1", "bottleneck-mlp")]
    # fc2 and fc3 lost the race at 52, opened at 57 and were surveyed anew from 61 on, then again
    # after their second embargo of 10 epochs.
    assert [epoch for epoch, layer, _ in session.starts if layer == "fc3"] == [50, 61, 81]


def test_the_budget_ends_growth_and_what_folds_stays_out(build):
    gains = everywhere(0.2) | everywhere(0.2, "low-rank")
    session = Session(build, gains, active=3, slots=2, remaining=2100).run()
    assert [fossil[1:] for fossil in session.fossils] == [("fc1", "bottleneck-mlp")]
    assert {blueprint for _, _, blueprint in session.starts} == {"bottleneck-mlp", "noop"}
    assert all(epoch <= 61 for epoch, _, _ in session.starts)


def test_what_folds_grows_where_the_session_offers_nothing_else(build):
    candidates = tuple(build.candidate(name, "low-rank") for name in NAMES)
    session = Session(build, everywhere(0.2, "low-rank"), active=3, candidates=candidates).run()
    assert session.fossils[0][2] == "low-rank"


def test_a_sound_host_grows_nothing_and_its_placebos_are_tried(build):
    session = Session(build, {}, active=2, slots=2).run()
    assert (session.fossils, session.grafts()) == ([], [])
    assert {(layer, blueprint) for _, layer, blueprint in session.starts} == {
        (layer, blueprint) for layer in NAMES for blueprint in ("bottleneck-mlp", "noop")
    }


@pytest.mark.parametrize(
    ("epochs", "interval", "start"),
    [(10, 1, None), (16, 1, None), (17, 1, 1), (30, 1, 14), (100, 1, 50), (30, 4, 4), (100, 4, 52)],
)
def test_sessions_of_any_length_begin_when_it_pays_or_never(build, epochs, interval, start):
    session = Session(
        build, everywhere(0.3), active=8, epochs=epochs, interval_epochs=interval
    ).run()
    assert bool(session.starts) is bool(session.fossils) is (start is not None)
    if start is not None:
        assert min(session.starts)[0] == start


def test_a_hopeless_trial_does_not_cost_the_session_its_graft(build):
    gains = {("fc1", "bottleneck-mlp"): 0.3}
    session = Session(build, gains, active=1, age_epochs=60).run()
    assert session.starts == [(50, "fc1", "bottleneck-mlp"), (55, "fc2", "bottleneck-mlp")]
    assert session.grafts() == [(94, "fc1", "bottleneck-mlp")]


def test_a_seed_below_the_confidence_asked_for_does_not_block_the_search(build):
    # The gains are known to 0.02 at 95 %: 0.024 passes a rent of 0.002, but not at 99 %.
    gains = everywhere(0.024) | {("fc3", "bottleneck-mlp"): 0.3}
    candidates = tuple(build.candidate(layer) for layer in NAMES)
    session = Session(build, gains, minimum_confidence=0.99, candidates=candidates).run()
    # At full share, from the fifth epoch on, 0.024 passes: twice in a row after six.
    assert session.starts[:3] == [
        (epoch, layer, "bottleneck-mlp") for epoch, layer in zip((50, 56, 62), NAMES, strict=True)
    ]
    assert session.fossils == [(73, "fc3", "bottleneck-mlp")]
