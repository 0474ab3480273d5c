"""What a case was to the runs that segment it: trained on, held out, of a site they never saw."""

from __future__ import annotations

from collections.abc import Sequence

from anysite.data.case import Case
from anysite.runs import Run
from anysite.transfer import cases_pretrained_on


def split_of(case: Case, run_folders: Sequence[Run], sites_known: bool = True) -> str:
    """Return what a case was to the runs: "training", "in_domain" (held out), "unseen" (site) or "unknown".

    A case of a site that was not trained on is unseen whatever its id, since other datasets use the same ids; unless
    the weights come from a pretraining on images of its id, of which nobody knows whether they are of its dataset.
    Of several runs the one that may have seen most counts.
    """
    if not sites_known:
        return "unknown"
    found = {_role_of(case, run) for run in run_folders}
    return next(split for split in ("training", "unknown", "in_domain", "unseen") if split in found)


def patients_judged_from(run_folders: Sequence[Run], cases: Sequence[Case]) -> set[tuple[str, str]]:
    """Return the held-out patients whom a judge learned its limits from, and on whom it cannot be tested."""
    ids = {name for run in run_folders for name in run.manifest.get("judge_learned_from", ())}
    tasks = {variant.task for run in run_folders for variant in run.plan.variants}
    return {
        (case.domain, case.patient)
        for case in cases
        if not ids.isdisjoint({case.id, *(f"{task}_{case.id}" for task in tasks)})
    }


def _role_of(case: Case, run: Run) -> str:
    # A run of several datasets knows its cases and sites by names that begin with the dataset's.
    tasks = [variant.task for variant in run.plan.variants] if not case.task else []
    domains = {case.domain, *(f"{task}/{case.domain}" for task in tasks)}
    ids = {case.id, *(f"{task}_{case.id}" for task in tasks)}
    pretrained_on = not ids.isdisjoint(cases_pretrained_on(run))
    if domains.isdisjoint(run.manifest.get("train_domains", domains)):
        return "unknown" if pretrained_on else "unseen"
    roles = {"training": "training", "unlabelled": "training", "held_out": "in_domain"}
    found = (split for role, split in roles.items() if not ids.isdisjoint(run.splits.get(role, ())))
    return next(found, "training" if pretrained_on else "unknown")
