"""Training patches drawn as a pure function of (seed, step)."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from anysite.augment import augment
from anysite.data.case import Case, Dataset
from anysite.errors import AnysiteError, ConfigError, DataError, GeometryError
from anysite.plan import Plan
from anysite.settings import AugmentSettings, TrainSettings
from anysite.windows import cut_patch

FOREGROUND_VOXELS = 4096


@dataclass(frozen=True, eq=False)
class Batch:
    """Patches on their way into the network; `known` tells which classes each one's label is about."""

    image: Float[Tensor, "b c *s"]
    label: Int[Tensor, "b *s"]
    domain: Int[Tensor, " b"]
    known: Bool[Tensor, "b k"]
    case_ids: tuple[str, ...]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        image, label, domain = (t.to(device) for t in (self.image, self.label, self.domain))
        return Batch(image, label, domain, self.known.to(device), self.case_ids)


@dataclass(frozen=True, eq=False)
class PreparedCase:
    """A training case on the plan's grid.

    Attributes:
        image: `(C, *S)`, where normalised in half precision: half the memory, finer than any scanner's noise.
        foreground: For each class present, up to `FOREGROUND_VOXELS` of its voxel indices `(n, D)`.
        known: The class indices that its label tells of; none where it has no label.
    """

    case: Case
    domain: int
    image: Tensor
    label: Tensor
    foreground: tuple[np.ndarray, ...]
    known: tuple[int, ...]


class PreparedCases:
    """Training cases on the plan's grid, in memory, or mapped from temporary files above a limit."""

    def __init__(
        self,
        dataset: Dataset,
        plan: Plan,
        domains: Sequence[str],
        memory_gb: float,
        unlabelled: Sequence[Case] = (),
    ) -> None:
        self.folder: Path | None = None
        self.cases: list[PreparedCase] = []
        held = 0
        images = dataset.without_labels()
        everything = [*((case, dataset) for case in dataset.usable), *((case, images) for case in unlabelled)]
        for index, (case, source) in enumerate(everything):
            prepared = prepare(case, source, plan, domains.index(case.domain))
            size = prepared.image.nbytes + prepared.label.nbytes
            if held + size > memory_gb * 2**30:
                prepared = self._move_to_disk(prepared, index)
            else:
                held += size
            self.cases.append(prepared)

    def fingerprint(self) -> str:
        """Return a digest of what training sees of the cases, to recognise them when resuming."""
        digest = hashlib.sha256()
        for case in self.cases:
            digest.update(f"{case.case.domain}/{case.case.id}".encode())
            for tensor in (case.image, case.label):
                digest.update(np.ascontiguousarray(tensor.numpy()).data.cast("B"))
        return digest.hexdigest()[:16]

    def _move_to_disk(self, prepared: PreparedCase, index: int) -> PreparedCase:
        try:
            if self.folder is None:
                self.folder = Path(tempfile.mkdtemp(prefix="anysite-"))
                # At exit at the latest.
                weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
            image = _map(prepared.image, self.folder / f"{index}.npy")
            label = _map(prepared.label, self.folder / f"{index}_label.npy")
        except OSError as error:
            raise DataError(
                f"prepared cases cannot be written ({error.strerror or error})",
                where=self.folder or "the folder for temporary files",
                fix="free space, let TMPDIR name a larger disk, or raise train.cache_memory_gb",
            ) from error
        return replace(prepared, image=image, label=label)


def _map(tensor: Tensor, path: Path) -> Tensor:
    """Return a tensor that lies in a file without a name: a killed process leaves nothing behind."""
    np.save(path, tensor.numpy(), allow_pickle=False)
    mapped = torch.from_numpy(np.load(path, mmap_mode="c", allow_pickle=False))
    with suppress(OSError):  # Windows keeps a file that is open
        path.unlink()
    return mapped


def prepare(case: Case, dataset: Dataset, plan: Plan, domain: int) -> PreparedCase:
    """Read one case and bring it onto the plan's grid; where labels are disregarded all is background.

    Raises:
        DataError: the case cannot be read or does not fit the plan; the text names the case.
    """
    try:
        volume = case.image()
        image = plan.to_grid(volume)
        if dataset.unlabelled:
            label = torch.zeros(image.shape[1:], dtype=torch.uint8)
        else:
            label = plan.label_to_grid(dataset.label_of(case), volume)
        if image.shape[1:] != label.shape:
            raise GeometryError(
                f"a label of shape {tuple(label.shape)}", expected=f"{tuple(image.shape[1:])}"
            )
    except AnysiteError as error:
        raise DataError(str(error), where=case.id, fix="run anysite check to list every problem") from error
    chooser = np.random.default_rng(0)
    foreground: list[np.ndarray] = []
    for index in range(1, len(plan.classes)):
        voxels = np.argwhere(label.numpy() == index)
        if len(voxels):
            keep = min(len(voxels), FOREGROUND_VOXELS)
            foreground.append(voxels[chooser.choice(len(voxels), keep, replace=False)].astype(np.int32))
    # Values as they are in the file may lie beyond half precision.
    raw = any(normalisation.kind == "none" for normalisation in plan.normalisation)
    known = () if dataset.unlabelled else dataset.known_to(case)
    return PreparedCase(case, domain, image if raw else image.half(), label, tuple(foreground), known)


class _Pool:
    """Cases to draw from: alike, or in turns of their sites or datasets."""

    def __init__(self, cases: Sequence[PreparedCase], sampling: str) -> None:
        key = {"case": lambda c: "", "domain": lambda c: c.domain, "task": lambda c: c.case.task}[sampling]
        self.groups = [[c for c in cases if key(c) == one] for one in sorted({key(c) for c in cases})]
        self.by_patient = sampling == "task"

    def choose(self, chooser: np.random.Generator, turn: int) -> PreparedCase:
        """Return a case; taking turns makes every batch as balanced as its size allows."""
        cases = self.groups[turn % len(self.groups)]
        if self.by_patient:
            patients = sorted({c.case.patient for c in cases})
            patient = patients[int(chooser.integers(len(patients)))]
            cases = [c for c in cases if c.case.patient == patient]
        return cases[int(chooser.integers(len(cases)))]


def choose_batch_size(train: TrainSettings, plan: Plan) -> int:
    """Return how many patches a batch has.

    Raises:
        ConfigError: too few to share between labelled images and others.
    """
    size = train.batch_size or (8 if plan.dimension == 2 else 2)
    if size == 1 and train.unlabelled_share:
        raise ConfigError("1", where="train.batch_size", expected="2 or more with unlabelled_share")
    return size


class PatchSampler:
    """Draws augmented training batches; `batch(step)` depends on (seed, rank, step) and nothing else.

    That is what makes an interrupted training resume bit by bit: there is no sampler state to save, and a
    batch prepared ahead in a thread is the same batch.
    """

    def __init__(
        self,
        cases: Sequence[PreparedCase],
        plan: Plan,
        train: TrainSettings,
        augmentation: AugmentSettings,
        seed: int,
        rank: int = 0,
        processes: int = 1,
    ) -> None:
        if not cases:
            raise DataError("no training cases are left", expected="at least one labelled source case")
        # Neighbouring slices are one image: what happens to one of them happens to all.
        channelwise = augmentation.channelwise and not plan.context_slices
        self.cases, self.plan = cases, plan
        self.augmentation = augmentation.model_copy(update={"channelwise": channelwise})
        self.batch_size = choose_batch_size(train, plan)
        self.foreground_fraction, self.sampling = train.foreground_fraction, train.sampling
        self.seed, self.rank, self.processes = seed, rank, processes
        self.pools = [(_Pool(cases, train.sampling), self.batch_size)]
        if train.unlabelled_share and len({bool(case.known) for case in cases}) == 2:
            without = min(self.batch_size - 1, max(1, round(train.unlabelled_share * self.batch_size)))
            self.pools = [
                (_Pool([case for case in cases if case.known], train.sampling), self.batch_size - without),
                (_Pool([case for case in cases if not case.known], train.sampling), without),
            ]

    def batch(self, step: int) -> Batch:
        """Return the batch of one step."""
        chooser = np.random.default_rng([self.seed, self.rank, step])
        images, labels, chosen = [], [], []
        drawn = [
            # Of several processes each takes its turn, so that together they go through the sites.
            pool.choose(chooser, (step * self.processes + self.rank) * count + position)
            for pool, count in self.pools
            for position in range(count)
        ]
        for case in drawn:
            image, label = self._cut(case, chooser)
            images.append(image)
            labels.append(label)
            chosen.append(case)
        generator = torch.Generator().manual_seed(int(chooser.integers(2**62)))
        domain = torch.tensor([case.domain for case in chosen])
        image, label = augment(
            torch.stack(images).float(), torch.stack(labels).long(), self.augmentation, generator, domain
        )
        known = torch.zeros(len(chosen), len(self.plan.classes), dtype=torch.bool)
        for row, case in zip(known, chosen, strict=True):
            row[list(case.known)] = True
        return Batch(image, label, domain, known, tuple(case.case.id for case in chosen))

    def batches(self, steps: range, ahead: bool = True) -> Iterator[Batch]:
        """Yield the batch of every step; with `ahead` a thread prepares the next while one is worked on."""
        if not ahead:
            yield from map(self.batch, steps)
            return
        with ThreadPoolExecutor(1) as pool:
            upcoming = pool.submit(self.batch, steps.start) if steps else None
            for step in steps:
                assert upcoming is not None
                batch = upcoming.result()
                upcoming = pool.submit(self.batch, step + 1) if step + 1 in steps else None
                yield batch

    def _cut(self, case: PreparedCase, chooser: np.random.Generator) -> tuple[Tensor, Tensor]:
        size = (1, *self.plan.patch_size) if self.plan.slice_wise else self.plan.patch_size
        shape = case.label.shape
        if case.foreground and chooser.random() < self.foreground_fraction:
            voxels = case.foreground[int(chooser.integers(len(case.foreground)))]
            centre = voxels[chooser.integers(len(voxels))]
            # The voxel may lie anywhere in the patch's middle half, or the network would learn "centre = organ".
            start = [
                int(c - s // 2 + chooser.integers(-(s // 4), s // 4 + 1))
                for c, s in zip(centre, size, strict=True)
            ]
        else:
            start = [
                int(chooser.integers(min(0, n - s), max(0, n - s) + 1))
                for n, s in zip(shape, size, strict=True)
            ]
        start = [_clamp(b, n, s) for b, n, s in zip(start, shape, size, strict=True)]
        image = cut_patch(case.image, start, size, self.plan.context_slices if self.plan.slice_wise else None)
        label = cut_patch(case.label[None], start, size, 0 if self.plan.slice_wise else None)[0]
        return image, label


def _clamp(start: int, length: int, size: int) -> int:
    """Keep a patch inside the image; where the patch is larger, keep the image inside the patch."""
    return int(np.clip(start, min(0, length - size), max(0, length - size)))
