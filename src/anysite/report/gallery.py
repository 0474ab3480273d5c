"""The pictures of one prediction folder, each drawn once, and volumes for the viewer of the first ones drawn."""

from __future__ import annotations

from anysite.report.images import read_images
from anysite.report.pictures import Picture, draw_case, draw_images
from anysite.report.previews import Preview, read_preview
from anysite.report.read import PredictedCase, Predictions, Source
from anysite.report.volumes import SmallVolume, embed


class Gallery:
    """Draws cases on demand.

    Attributes:
        volumes: By case, those that the page holds for its viewer; at most as many as asked for.
        left_out: How many volumes were drawn without one, because there were enough.
    """

    def __init__(self, source: Source, volumes: int) -> None:
        self.predictions = source.predictions or Predictions()
        self.volumes: dict[str, SmallVolume] = {}
        self.left_out = 0
        self._folder = source.path
        self._limit = volumes
        self._pictures: dict[str, Picture] = {}

    def draw(self, case_id: str) -> Picture:
        """Return the picture of a case."""
        if case_id not in self._pictures:
            self._pictures[case_id] = self._draw(case_id)
        return self._pictures[case_id]

    def draw_other(self, case_id: str, case: PredictedCase) -> Picture:
        """Return the picture of a case with another mask than the one that counts."""
        return draw_case(self._folder, case_id, case, self.predictions.dataset)

    def read_drawings(self, case: PredictedCase) -> Preview | None:
        """Return what was drawn from a case's masks before and after adaptation, where anything was."""
        return read_preview(self._folder / case.drawings) if case.drawings else None

    def _draw(self, case_id: str) -> Picture:
        images = read_images(self._folder, self.predictions.cases[case_id], self.predictions.dataset)
        if isinstance(images, str):
            return Picture(problem=images)
        if images.image.dimension == 3 and len(self.volumes) >= self._limit:
            self.left_out += 1
        elif (volume := embed(images)) is not None:
            self.volumes[case_id] = volume
        return draw_images(case_id, images)
