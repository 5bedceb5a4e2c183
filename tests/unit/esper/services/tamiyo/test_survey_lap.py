"""Whole surveys, packet by packet, their decisions carried out by the rules of the lifecycle.

At each boundary the session is asked again until it waits, as a trainer does. Epochs are counted
from the first survey on, which leaves a session its last 50, unless a test says otherwise.
"""

from __future__ import annotations

from collections import Counter

import pytest

from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.operational import LayerDescription
from esper.services.tamiyo.analyzer import ModelGraphAnalyzer
from esper.services.tamiyo.heuristics import decide
from esper.services.tamiyo.policies import survey

DWELL, AGE, PASSES, RAMP, HOLD, EMBARGO = 5, 10, 2, 3, 2, 5
NAMES = ("fc1", "fc2", "fc3")


class Session:
    """One session's seeds and trials, aged and judged as the lifecycle has it.

    `gains` are what (layer, blueprint) contributes, else 0; a seed whose site is in `relapsing`
    fails its recovery trial. `fossils`, `starts` and `grafts()` keep (epoch since the first survey
    began, layer, blueprint).
    """

    def __init__(self, build, gains, *, slots=1, active=1, epochs=None, remaining=5000, **options):
        self.build, self.gains, self.slots = build, gains, slots
        self.epochs = epochs or build.epochs()
        self.remaining = remaining
        self.relapsing = options.pop("relapsing", ())
        self.candidates = options.pop("candidates", build.packet().candidates)
        self.interval = options.get("interval_epochs", 1)
        self.settings = {"active_seeds": active, "age_epochs": AGE, **options}
        self.seeds, self.cycles, self.opens, self.trials = {}, Counter(), {}, []
        self.fossils, self.starts, self.decisions = [], [], []
        self.analyzer, self.sequence, self.epoch = ModelGraphAnalyzer(), 0, 0
        self.first = survey.first_survey_epoch(self._packet())
        self.racing = survey.racing_age(self._packet())

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

    @property
    def now(self):
        return self.epoch - self.first

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
                self.fossils.append((self.now, seed.layer, seed.blueprint))
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
            self.starts.append((self.now, decision.layer, decision.blueprint))
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
        return self.decided(DecisionAction.GRAFT)

    def decided(self, action):
        return [
            (d.epoch - self.first, d.layer, d.blueprint)
            for d in self.decisions
            if d.action is action
        ]


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
        (0, "fc1", "bottleneck-mlp"),
        (5, "fc2", "bottleneck-mlp"),
        (10, "fc3", "bottleneck-mlp"),
    ]
    assert session.grafts()[0] == (15, best, "bottleneck-mlp")
    assert session.fossils[0] == (21, best, "bottleneck-mlp")


@pytest.mark.parametrize("best", NAMES)
def test_with_one_seat_no_placebo_delays_a_graft_that_is_ready(build, best):
    # The second slots are free for the placebos all along.
    session = Session(build, everywhere(0.1) | {(best, "bottleneck-mlp"): 0.4}, slots=2).run()
    assert session.grafts()[0] == (15, best, "bottleneck-mlp")
    before = [blueprint for epoch, _, blueprint in session.starts if epoch <= 15]
    assert before == ["bottleneck-mlp"] * 3


def test_enough_seats_try_all_at_one_boundary_and_race(build):
    gains = {
        (f"fc{number}", "bottleneck-mlp"): gain for number, gain in [(1, 0.1), (2, 0.4), (3, 0.2)]
    }
    session = Session(build, gains, slots=4, active=16).run()
    assert session.starts[:6] == [
        (0, layer, blueprint) for blueprint in ("bottleneck-mlp", "noop") for layer in NAMES
    ]
    # From the second epoch on the gains are at least 0.04, 0.16 and 0.08, each known to 0.02.
    assert session.decided(DecisionAction.CULL)[:5] == [
        *((session.racing, layer, "noop") for layer in NAMES),
        (session.racing, "fc1", "bottleneck-mlp"),
        (session.racing, "fc3", "bottleneck-mlp"),
    ]
    assert session.grafts()[0] == (5, "fc2", "bottleneck-mlp")


def test_what_waits_behind_an_embargo_is_tried_before_anything_is_grafted(build):
    kinds = (("fc1", "bottleneck-mlp"), ("fc1", "widen"), ("fc2", "bottleneck-mlp"))
    candidates = tuple(build.candidate(*kind) for kind in kinds)
    gains = {("fc1", "bottleneck-mlp"): 0.4, ("fc2", "bottleneck-mlp"): 0.1}
    session = Session(build, gains, candidates=candidates).run()
    # `widen` is smaller, goes first, and fails at its age limit: fc1 is closed until 15.
    assert session.starts[:3] == [
        (0, "fc1", "widen"),
        (10, "fc2", "bottleneck-mlp"),
        (15, "fc1", "bottleneck-mlp"),
    ]
    assert session.fossils[0] == (26, "fc1", "bottleneck-mlp")


def test_a_survey_that_found_nothing_starts_again_after_its_embargoes(build):
    candidates = tuple(build.candidate(layer) for layer in NAMES)
    session = Session(build, {}, active=3, candidates=candidates).run()
    # The first cycle's embargo is 5 epochs, the second's 10: it ends too late for a third survey.
    expected = [(epoch, layer, "bottleneck-mlp") for epoch in (0, 15) for layer in NAMES]
    assert session.starts == expected
    assert (session.fossils, session.grafts()) == ([], [])
    waited = {d.epoch - session.first: d.reason for d in session.decisions}
    assert waited[10].startswith("The survey is over after 3 trials")
    assert {waited[epoch] for epoch in (11, 12, 13, 14)} == {
        "No layer of 3 untried candidates has a free slot."
    }


def test_a_site_that_did_not_pay_yet_gets_its_chance_in_the_next_survey(build):
    candidates = tuple(build.candidate(layer) for layer in NAMES)
    session = Session(build, {}, active=3, candidates=candidates)

    class Later(dict):
        def get(self, site, default=None):
            return 0.3 if session.now > 10 and site[0] == "fc2" else default

    session.gains = Later()
    session.run()
    assert session.fossils == [(26, "fc2", "bottleneck-mlp")]


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
        (5, "fc1", "bottleneck-mlp"),
        (17, "fc1", "bottleneck-mlp"),
    ]
    assert [epoch for epoch, layer, _ in session.starts if layer == "fc2"] == [0, 12, 24]
    assert session.fossils == []


def test_a_layer_full_of_fossils_is_passed_over_by_later_surveys(build):
    gains = {("fc1", "bottleneck-mlp"): 0.4}
    candidates = tuple(build.candidate(layer, parameters=10) for layer in NAMES)
    session = Session(build, gains, active=3, candidates=candidates).run()
    assert session.fossils == [(11, "fc1", "bottleneck-mlp")]
    # fc2 and fc3 lost the race, opened 5 epochs later and were surveyed anew from 11 on, to their
    # age limit at 21, and again after their second embargo of 10 epochs.
    assert session.racing + EMBARGO < 11
    assert [epoch for epoch, layer, _ in session.starts if layer == "fc3"] == [0, 11, 31]


def test_the_budget_ends_growth_and_what_folds_stays_out(build):
    gains = everywhere(0.2) | everywhere(0.2, "low-rank")
    # Six seats: the placebos are tried beside the rest.
    session = Session(build, gains, active=6, slots=2, remaining=2100).run()
    assert [fossil[1:] for fossil in session.fossils] == [("fc1", "bottleneck-mlp")]
    assert {blueprint for _, _, blueprint in session.starts} == {"bottleneck-mlp", "noop"}
    assert all(epoch <= 11 for epoch, _, _ in session.starts)


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
    ("epochs", "interval", "pays"),
    [
        *((epochs, 1, epochs > 16) for epochs in (10, 16, 17, 30, 100)),
        *((epochs, 4, epochs > 28) for epochs in (28, 30, 100)),
    ],
)
def test_sessions_of_any_length_begin_when_it_pays_or_never(build, epochs, interval, pays):
    session = Session(
        build, everywhere(0.3), active=8, epochs=epochs, interval_epochs=interval
    ).run()
    assert bool(session.starts) is bool(session.fossils) is pays
    if pays:
        # At the first survey's epoch, or at the boundary that follows it.
        assert min(session.starts)[0] == -session.first % interval


def test_a_hopeless_trial_does_not_cost_the_session_its_graft(build):
    gains = {("fc1", "bottleneck-mlp"): 0.3}
    session = Session(build, gains, active=1, age_epochs=60).run()
    assert session.starts == [(0, "fc1", "bottleneck-mlp"), (5, "fc2", "bottleneck-mlp")]
    # It holds the only seat; from 35 on a trial of fc3 would come too late.
    assert session.grafts() == [(35, "fc1", "bottleneck-mlp")]


def test_a_hopeless_trial_that_keeps_no_other_waiting_is_not_waited_for(build):
    gains = {("fc1", "bottleneck-mlp"): 0.3}
    candidates = tuple(build.candidate(layer) for layer in ("fc1", "fc2"))
    session = Session(build, gains, candidates=candidates, age_epochs=60).run()
    assert session.grafts()[0] == (10, "fc1", "bottleneck-mlp")
    assert session.decided(DecisionAction.CULL)[0] == (10, "fc2", "bottleneck-mlp")


def test_a_hopeless_trial_in_the_only_seat_does_not_keep_the_best_site_from_its_trial(build):
    gains = {("fc1", "bottleneck-mlp"): 0.1, ("fc3", "bottleneck-mlp"): 0.4}
    session = Session(build, gains).run()
    # fc2 holds the seat to its age limit.
    assert session.starts[:3] == [
        (epoch, layer, "bottleneck-mlp") for epoch, layer in zip((0, 5, 15), NAMES, strict=True)
    ]
    assert session.fossils[0] == (26, "fc3", "bottleneck-mlp")


def test_what_is_still_below_its_rent_after_its_trial_goes_with_the_survey(build):
    # The gains are known to 0.02: 0.03 passes a rent of 0.002, and 0.015 neither passes nor loses.
    gains = {("fc1", "bottleneck-mlp"): 0.03, ("fc2", "bottleneck-mlp"): 0.015}
    candidates = tuple(build.candidate(layer) for layer in ("fc1", "fc2"))
    session = Session(build, gains, active=2, candidates=candidates).run()
    assert session.grafts()[0] == (5, "fc1", "bottleneck-mlp")
    assert session.decided(DecisionAction.CULL)[0] == (5, "fc2", "bottleneck-mlp")
    # The next survey tries fc2 anew once fc1 is a fossil.
    assert session.starts[2] == (11, "fc2", "bottleneck-mlp")


@pytest.mark.parametrize("winner", NAMES)
def test_the_least_bad_seed_of_a_slow_start_ends_no_trial_and_the_later_winner_grows(build, winner):
    others = [name for name in NAMES if name != winner]
    early = dict(zip((winner, *others), (-0.9, -0.5, -0.1), strict=True))
    turn = 6
    session = Session(build, {}, active=3, candidates=tuple(map(build.candidate, NAMES)))

    class Late(dict):
        def get(self, site, default=None):
            return 0.4 if site[0] == winner and session.now >= turn else early[site[0]]

    session.gains = Late()
    session.run()
    assert session.racing < turn
    # Only the winner's first pass ends the others' trials.
    assert session.decided(DecisionAction.CULL)[:2] == [
        (turn, layer, "bottleneck-mlp") for layer in others
    ]
    assert session.grafts()[0] == (turn + PASSES - 1, winner, "bottleneck-mlp")
    assert session.fossils[0][1:] == (winner, "bottleneck-mlp")


def test_a_seed_below_the_confidence_asked_for_does_not_block_the_search(build):
    # The gains are known to 0.02 at 95 %: 0.024 passes a rent of 0.002, but not at 99 %.
    gains = everywhere(0.024) | {("fc3", "bottleneck-mlp"): 0.3}
    candidates = tuple(build.candidate(layer) for layer in NAMES)
    session = Session(build, gains, minimum_confidence=0.99, candidates=candidates).run()
    # At full share, from the fifth epoch on, 0.024 passes: twice in a row after six.
    assert session.starts[:3] == [
        (epoch, layer, "bottleneck-mlp") for epoch, layer in zip((0, 6, 12), NAMES, strict=True)
    ]
    assert session.fossils == [(23, "fc3", "bottleneck-mlp")]
