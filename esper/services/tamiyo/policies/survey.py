"""The policy `heuristic`: try every candidate in the shadow, then grow the best.

Three measurements shaped it. Waiting for a plateau hurts, so it goes by the clock. The gradient
that a new module would be born with ranks the sites backwards, so nothing is read off before a
trial. A short trial of each blueprint at each site, in the shadow of its host, ranks them right,
so it pays for those trials and lets their lower bounds decide.

A survey is one round of trials against one host. It ends with a fossil: the host is another one
then, and whatever was measured against the old one is void. It also ends when every candidate
was tried. Within a survey, losers are raced out early as in Hoeffding races (Maron & Moore,
"Hoeffding Races: Accelerating Model Selection Search for Classification and Function
Approximation", NIPS 1994): a trial ends once its upper bound lies below the lower bound of
another one of its age.

Kernels that fold into their host's own layer add no function class. They may grow only where
nothing else could, and the placebo never: it is tried because a search that would pick it is
measuring noise.
"""

from __future__ import annotations

import math
from collections import Counter

from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.operational import (
    AdaptationDecision,
    Candidate,
    ModelGraphState,
    SeedObservation,
    SystemStatePacket,
    TrialRecord,
)
from esper.services.tamiyo.policies.evidence import confidence, least_gain, most_gain
from esper.services.tamiyo.policies.room import (
    affordable,
    change,
    counted,
    describe,
    free_slot,
    germinate,
    graft_epochs,
    growth_epochs,
    outgrown,
    ready_seeds,
    trial_epochs,
    wait,
)

RACING_SHARE = 0.5
"""The share of a trial before a seed can win or lose a race: the first steps say little."""

FIRST_SURVEY = 0.6
"""The share of a session's epochs after which the first survey begins.

On MNIST-1D the time of birth moved accuracy by about a point, within the noise from half to two
thirds of the training (docs/adr/0004); every epoch before the birth saves the part's FLOPs.
"""


def decide(packet: SystemStatePacket, state: ModelGraphState) -> AdaptationDecision:
    """Clear up after a graft, race, try the next candidate, graft the best, or wait.

    The first rule that applies decides.
    """
    if packet.epoch < (start := first_survey_epoch(packet)):
        return wait(packet, f"The first survey begins at epoch {start}.")
    grafting = [seed for seed in packet.seeds if seed.state is SeedState.GRAFTING]
    if grafting:
        return _clear_up(packet, grafting[0])
    return (
        _race(packet)
        or _try_next(packet, state)
        or _graft_best(packet)
        or wait(packet, _waiting_for(packet))
    )


def first_survey_epoch(packet: SystemStatePacket) -> int:
    """When the first survey begins: at its share of the epochs, or while a graft still pays."""
    latest = packet.epochs - growth_epochs(packet.settings)
    # Nothing begins between two boundaries, so the last one that leaves the time counts.
    latest -= latest % packet.settings.interval_epochs
    return max(1, min(int(FIRST_SURVEY * packet.epochs), latest))


def racing_age(packet: SystemStatePacket) -> int:
    """The epochs of a trial before it may be raced out: its share of a trial, at least 2."""
    return max(2, math.ceil(RACING_SHARE * trial_epochs(packet.settings)))


def survey_trials(packet: SystemStatePacket) -> list[TrialRecord]:
    """The trials of this survey.

    A survey ends when one of its seeds fossilizes, or when every candidate was tried and none is
    left: what was measured then is old, and the next survey tries them all again.
    """
    start = max(
        (
            trial.started_epoch if trial.ended_epoch is None else trial.ended_epoch
            for trial in packet.trials
            if trial.state is SeedState.FOSSILIZED
        ),
        default=0,
    )
    wanted = {(candidate.layer, candidate.blueprint) for candidate in _eligible(packet)}
    survey: list[TrialRecord] = []
    for trial in packet.trials:
        if trial.state is SeedState.FOSSILIZED or trial.started_epoch < start:
            continue
        if _exhausted(survey, wanted, trial.started_epoch):
            survey = []
        survey.append(trial)
    return [] if _exhausted(survey, wanted, packet.epoch) else survey


def _exhausted(survey: list[TrialRecord], wanted: set[tuple[str, str]], epoch: int) -> bool:
    """Whether all of `wanted` were tried, and every trial was over before `epoch`."""
    tried = {(trial.layer, trial.blueprint) for trial in survey}
    over = all(t.ended_epoch is not None and t.ended_epoch < epoch for t in survey)
    return bool(survey) and wanted <= tried and over


def _plantable(packet: SystemStatePacket) -> list[Candidate]:
    """The affordable candidates at layers that have, or will have, a slot for them.

    A fossil keeps its slot for good: a survey that waited for it would never be over.
    """
    fossils = Counter(seed.layer for seed in packet.seeds if seed.state is SeedState.FOSSILIZED)
    layers = {layer.name for layer in packet.layers if fossils[layer.name] < layer.slots}
    return [
        candidate
        for candidate in packet.candidates
        if candidate.layer in layers and affordable(packet, candidate)
    ]


def _eligible(packet: SystemStatePacket) -> list[Candidate]:
    """The plantable candidates that could be grafted: never the placebo.

    Kernels that fold are among them only where the session's blueprints offer nothing else.
    """
    only_folds = all(candidate.folds for candidate in packet.candidates)
    return [
        candidate
        for candidate in _plantable(packet)
        if candidate.parameters > 0 and (only_folds or not candidate.folds)
    ]


def _may_grow(packet: SystemStatePacket, seed: SeedObservation) -> bool:
    """Whether a graft of `seed` could count as growth.

    The placebo never can. A seed whose candidate the packet does not list is taken for one that
    adds a function class.
    """
    if seed.parameters == 0:
        return False
    folds = any(
        candidate.folds
        for candidate in packet.candidates
        if (candidate.layer, candidate.blueprint) == (seed.layer, seed.blueprint)
    )
    return not folds or all(candidate.folds for candidate in packet.candidates)


def _clear_up(packet: SystemStatePacket, grafting: SeedObservation) -> AdaptationDecision:
    """While a seed is blended in, cull what its survey left over."""
    for seed in (*ready_seeds(packet), *_in_trial(packet)):
        return change(
            packet,
            DecisionAction.CULL,
            seed,
            f"{describe(seed)} was planted in the host as it was before {describe(grafting)} was"
            f" grafted, so its trial, with {_gain(seed)}, no longer counts.",
        )
    return wait(
        packet,
        f"{describe(grafting)} is being blended in, now at {grafting.alpha:.0%}; its recovery"
        " trial decides.",
    )


def _race(packet: SystemStatePacket) -> AdaptationDecision | None:
    """Cull a seed that can't win this survey any more.

    Ready seeds that may not or can't be grafted go first: their trials are over, so they would
    hold their slots and the survey for good. Then goes the trial whose upper bound, rent taken
    off, lies furthest below the best lower bound of its age, rent taken off.
    """
    for seed in ready_seeds(packet):
        if not _may_grow(packet, seed):
            return change(
                packet,
                DecisionAction.CULL,
                seed,
                f"{describe(seed)} passed its gate with {_gain(seed)}, but it adds no function"
                " class and never counts as growth.",
            )
        if seed.parameters > packet.remaining_parameters:
            return change(packet, DecisionAction.CULL, seed, outgrown(packet, seed))
        if shortfall := _shortfall(packet, seed):
            return change(packet, DecisionAction.CULL, seed, shortfall)
    racing = [
        seed
        for seed in packet.seeds
        if seed.state is SeedState.TRAINING and seed.age_epochs >= racing_age(packet)
    ]
    behind = [
        (seed, leader)
        for seed in racing
        if (leader := _leader(packet, racing, seed)) is not seed
        and most_gain(seed) < least_gain(leader)
    ]
    if not behind:
        return None
    loser, leader = min(behind, key=lambda pair: most_gain(pair[0]) - least_gain(pair[1]))
    return change(
        packet,
        DecisionAction.CULL,
        loser,
        f"{describe(loser)} gains at most {most_gain(loser):.3f} nats after rent, and"
        f" {describe(leader)} at least {least_gain(leader):.3f}, so it can't win this survey.",
    )


def _leader(
    packet: SystemStatePacket, racing: list[SeedObservation], seed: SeedObservation
) -> SeedObservation:
    """The seed of `racing` with the best lower bound among those of `seed`'s age, or `seed`.

    Only trials of one age compare: early in training everything helps, and a seed that has learnt
    for longer helps more. Only a seed that may grow and has earned its rent can lead: a new part
    first costs a little, and being the least bad in its first epochs shows nothing.
    """
    return max(
        (
            rival
            for rival in racing
            if rival.age_epochs == seed.age_epochs
            and _may_grow(packet, rival)
            and least_gain(rival) > 0
        ),
        key=least_gain,
        default=seed,
    )


def _shortfall(packet: SystemStatePacket, seed: SeedObservation) -> str | None:
    """What a ready seed's evidence lacks for a graft, as a sentence, or None."""
    ended = f"{describe(seed)} ended its trial with {_gain(seed)}"
    if seed.measurement is None or not seed.measurement.passes():
        return f"{ended}, which does not show that it earns its rent."
    sure, asked = confidence(seed), packet.settings.minimum_confidence
    if sure < asked:
        return f"{ended} and earns its rent with a confidence of {sure:.3f}, below {asked:.3f}."
    return None


def _untried(packet: SystemStatePacket) -> list[Candidate]:
    """The candidates this survey has yet to try, in the order it tries them.

    Earliest layer first, then by ascending parameters; the placebo comes last, as the control of
    a search that has something to find.
    """
    eligible = _eligible(packet)
    if not eligible:
        return []
    placebos = [candidate for candidate in _plantable(packet) if candidate.parameters == 0]
    tried = {(trial.layer, trial.blueprint) for trial in survey_trials(packet)}
    position = {layer.name: index for index, layer in enumerate(packet.layers)}
    return sorted(
        (
            candidate
            for candidate in (*eligible, *placebos)
            if (candidate.layer, candidate.blueprint) not in tried
        ),
        key=lambda candidate: (
            candidate.parameters == 0,
            position[candidate.layer],
            candidate.parameters,
            candidate.blueprint,
        ),
    )


def _in_trial(packet: SystemStatePacket) -> list[SeedObservation]:
    """The seeds whose trial is ahead of them or under way."""
    return [
        seed
        for seed in packet.seeds
        if seed.state is SeedState.GERMINATED
        or (seed.state is SeedState.TRAINING and not seed.ready)
    ]


def _try_next(packet: SystemStatePacket, state: ModelGraphState) -> AdaptationDecision | None:
    """Germinate the next untried candidate if a seat, a slot and the time for it are there."""
    if len(_in_trial(packet)) >= packet.settings.active_seeds:
        return None
    if packet.remaining_epochs < growth_epochs(packet.settings):
        return None
    waiting = [
        candidate
        for candidate in _untried(packet)
        if free_slot(packet, candidate.layer) is not None
    ]
    # A placebo is tried beside the others; nothing that is ready to grow waits for one.
    if not waiting or (waiting[0].parameters == 0 and _contenders(packet)):
        return None
    candidate = waiting[0]
    problem = next(
        (problem.reason for problem in state.problems if problem.layer == candidate.layer), None
    )
    return germinate(
        packet,
        candidate,
        f"Trial {len(survey_trials(packet)) + 1} of this survey: {candidate.blueprint} at"
        f" {candidate.layer} for {candidate.parameters} of the {packet.remaining_parameters}"
        f" parameters left{f' ({candidate.layer} {problem})' if problem else ''}.",
    )


def _contenders(packet: SystemStatePacket) -> list[SeedObservation]:
    """The ready seeds that may grow, the best lower bound after rent first."""
    contenders = [seed for seed in ready_seeds(packet) if _may_grow(packet, seed)]
    return sorted(contenders, key=least_gain, reverse=True)


def _graft_best(packet: SystemStatePacket) -> AdaptationDecision | None:
    """Graft the best ready seed once every candidate has had its trial.

    A trial that has lasted as long as one must, and has not opened its gate, is not waited for.
    At the last boundary at which a graft fits, it waits for no trial and no candidate any more.
    """
    contenders = _contenders(packet)
    left, needed = packet.remaining_epochs, graft_epochs(packet.settings)
    if not contenders or left < needed:
        return None
    best = contenders[0]
    measured = best.measurement
    last_call = left - packet.settings.interval_epochs < needed
    if measured is None or (not last_call and (_too_young(packet) or _to_come(packet))):
        return None
    return change(
        packet,
        DecisionAction.GRAFT,
        best,
        f"{describe(best)} gains {measured.mean:.3f} nats (at least {measured.lower:.3f}) for a"
        f" rent of {measured.rent:.3f}; best of {len(survey_trials(packet))} tried.",
        confidence=confidence(best),
    )


def _too_young(packet: SystemStatePacket) -> list[SeedObservation]:
    """The trials that have not lasted as long as one must."""
    least = trial_epochs(packet.settings)
    return [
        seed
        for seed in _in_trial(packet)
        if seed.state is SeedState.GERMINATED or seed.age_epochs < least
    ]


def _to_come(packet: SystemStatePacket) -> list[Candidate]:
    """Untried candidates that could grow, once a trial frees its seat or an embargo a slot.

    Worth waiting for while there is time: a survey that grafts before it has tried the best site
    grows in the wrong place. Only ready seeds and fossils hold their slots until the graft.
    """
    if packet.remaining_epochs < growth_epochs(packet.settings):
        return []
    fossils = [seed for seed in packet.seeds if seed.state is SeedState.FOSSILIZED]
    held = Counter(seed.layer for seed in (*ready_seeds(packet), *fossils))
    layers = {layer.name for layer in packet.layers if held[layer.name] < layer.slots}
    return [
        candidate
        for candidate in _untried(packet)
        if candidate.parameters > 0 and candidate.layer in layers
    ]


def _waiting_for(packet: SystemStatePacket) -> str:
    """What the survey waits for, as a sentence."""
    trials = _in_trial(packet)
    if trials:
        names = ", ".join(describe(seed) for seed in trials)
        return f"The survey goes on with {counted(len(trials), 'trial')} under way: {names}."
    contenders = _contenders(packet)
    left, needed = packet.remaining_epochs, graft_epochs(packet.settings)
    if contenders and left < needed:
        return (
            f"{describe(contenders[0])} leads with {_gain(contenders[0])}, but a graft takes"
            f" {counted(needed, 'epoch')} and {left} are left."
        )
    untried = _untried(packet)
    tried = len(survey_trials(packet))
    if not untried:
        return (
            f"The survey is over after {counted(tried, 'trial')}: nothing else fits the"
            f" {counted(packet.remaining_parameters, 'parameter')} left."
        )
    needed = growth_epochs(packet.settings)
    if left < needed:
        return (
            f"A trial with its graft and payback takes {counted(needed, 'epoch')} and {left} are"
            f" left, so {counted(len(untried), 'candidate')} stay untried."
        )
    return f"No layer of {counted(len(untried), 'untried candidate')} has a free slot."


def _gain(seed: SeedObservation) -> str:
    if seed.measurement is None:
        return "no measurement"
    return f"{seed.measurement.mean:.3f} nats (at least {seed.measurement.lower:.3f})"
