"""The groups of settings, each with its defaults and what may be chosen."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

Probability = Annotated[float, Field(ge=0, le=1)]
Range = tuple[float, float]


class Settings(BaseModel):
    """A group of settings; an unknown name is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MethodSettings(BaseModel):
    """A registered method by name, with the keyword arguments of its constructor beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def arguments(self) -> dict[str, Any]:
        """The settings beside the name."""
        return dict(self.__pydantic_extra__ or {})


class PlanSettings(Settings):
    """What the plan would otherwise learn from the training cases."""

    dimension: Literal["auto", "2d", "2.5d", "3d"] = "auto"
    slice_axis: Literal["auto", "R", "A", "S"] = Field(
        default="auto",
        description="the patient's axis that volumes are cut along: from right, from the front, or from below",
    )
    spacing: tuple[float, ...] | None = Field(
        default=None, description="voxel size in mm (or px), slice axis first"
    )
    patch_size: tuple[int, ...] | None = Field(
        default=None, description="voxels on the plan's grid, slice axis first"
    )
    max_patch_voxels: int | None = Field(
        default=None, gt=0, description="upper limit for a chosen patch size; none: 2^16 in 2-D, 2^18 in 3-D"
    )
    context_slices: int = Field(default=1, ge=0, description="neighbours on each side, as channels, of 2.5d")
    normalisation: Literal["auto", "case", "local", "dataset", "none"] = Field(
        default="auto",
        description="auto: Hounsfield units by the training images, others by the image itself (case); "
        "local: in place of case, by each voxel's surroundings too",
    )
    least_contrast: float = Field(
        default=0.1,
        gt=0,
        description="of local: added to every voxel's surroundings' deviation, in deviations of the image; the larger, "
        "the less noise in the dark is taken for anatomy, and the more is left of what scanners differ in",
    )
    noise_contrast: float = Field(
        default=0.0,
        ge=0,
        description="of local: how many times an image's noise is added to it as well, so that noisy images are "
        "compared to their surroundings the less",
    )

    @field_validator("spacing", "patch_size")
    @classmethod
    def _check_positive(cls, numbers: tuple[float, ...] | None) -> tuple[float, ...] | None:
        if numbers is not None and (not numbers or min(numbers) <= 0):
            raise PydanticCustomError("positive", "positive numbers")
        return numbers


class AugmentSettings(Settings):
    """The standard augmentation: probabilities a sample, and ranges of strength."""

    enabled: bool = True
    channelwise: bool = Field(
        default=True, description="draw brightness, contrast and gamma for each channel by itself"
    )
    affine: Probability = Field(default=0.5, description="rotation and scaling together")
    rotation_degrees: float = Field(default=30.0, ge=0, le=180, description="largest angle to either side")
    scale: Range = Field(default=(0.7, 1.4), description="above 1 enlarges")
    elastic: Probability = 0.2
    elastic_strength: Range = Field(
        default=(0.1, 0.4), description="displacement in control-point spacings; up to 0.4 nothing folds"
    )
    flip: Probability = Field(default=0.5, description="for each axis")
    flip_axes: tuple[int, ...] | None = Field(
        default=None,
        description="axes to mirror, the plan's, slice axis first; none: all",
    )
    brightness: Probability = 0.3
    brightness_factor: Range = (0.7, 1.3)
    contrast: Probability = 0.3
    contrast_factor: Range = (0.65, 1.5)
    gamma: Probability = 0.3
    gamma_exponent: Range = (0.7, 1.5)
    noise: Probability = 0.15
    noise_sigma: Range = Field(default=(0.0, 0.2), description="in standard deviations of the channel")
    blur: Probability = 0.2
    blur_sigma_voxels: Range = (0.5, 1.2)
    low_resolution: Probability = 0.25
    low_resolution_factor: Range = Field(default=(0.5, 1.0), description="share of voxels kept on an axis")
    bias_field: Probability = 0.2
    bias_field_strength: float = Field(default=0.4, ge=0, description="largest logarithm of the factor")
    amplitude_mixing: Probability = Field(
        default=0.0, description="mix low-frequency amplitudes with a sample of another site, as in RAM-DSIR"
    )
    amplitude_own_share: Range = Field(
        default=(0.0, 1.0), description="weight of the sample's own amplitude, drawn uniformly"
    )
    amplitude_window: float = Field(
        default=0.1,
        ge=0,
        le=0.5,
        description="frequencies mixed on either side, as a share of the shortest axis",
    )
    random_convolution: Probability = Field(
        default=0.0, description="blend with what a random shallow network makes of the image"
    )
    random_convolution_share: Range = Field(
        default=(0.0, 1.0), description="weight of what the network makes, drawn uniformly"
    )

    @field_validator("scale", "brightness_factor", "contrast_factor", "gamma_exponent", "blur_sigma_voxels",
                     "low_resolution_factor")  # fmt: skip
    @classmethod
    def _check_positive_range(cls, limits: Range) -> Range:
        if not 0 < limits[0] <= limits[1]:
            raise PydanticCustomError("range", "two positive numbers, the smaller one first")
        return limits

    @field_validator("flip_axes")
    @classmethod
    def _check_axes(cls, axes: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if axes is not None and (len(set(axes)) < len(axes) or min(axes, default=0) < 0):
            raise PydanticCustomError("axes", "each spatial axis at most once, counted from 0")
        return axes

    @field_validator("amplitude_own_share", "random_convolution_share")
    @classmethod
    def _check_share(cls, limits: Range) -> Range:
        if not 0 <= limits[0] <= limits[1] <= 1:
            raise PydanticCustomError("range", "two numbers from 0 to 1, the smaller one first")
        return limits

    @field_validator("noise_sigma", "elastic_strength")
    @classmethod
    def _check_range(cls, limits: Range) -> Range:
        if not 0 <= limits[0] <= limits[1]:
            raise PydanticCustomError("range", "two numbers from 0, the smaller one first")
        return limits


class TrainSettings(Settings):
    """The training loop."""

    steps: int = Field(default=1000, gt=0, description="of the optimiser; --budget chooses them instead")
    batch_size: int | None = Field(default=None, gt=0, description="none: 8 in 2-D, 2 in 3-D")
    learning_rate: float = Field(default=3e-3, gt=0)
    weight_decay: float = Field(default=1e-2, ge=0)
    schedule: Literal["cosine", "polynomial", "constant"] = Field(
        default="constant", description="of the learning rate, after the warm-up"
    )
    warmup_steps: int = Field(default=50, ge=0)
    average_share: Probability = Field(
        default=0.25,
        description="share of the training, at its end, over whose steps the weights are averaged",
    )
    gradient_clip: float = Field(default=12.0, gt=0)
    precision: Literal["auto", "32-true", "bf16-mixed"] = Field(
        default="auto", description="auto: bfloat16 where this device is faster with it, float32 elsewhere"
    )
    devices: int = Field(default=1, gt=0)
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    foreground_fraction: Probability = Field(
        default=0.33, description="patches centred on a foreground voxel"
    )
    sampling: Literal["case", "domain", "task"] = Field(
        default="case",
        description="draw cases uniformly, sites first, or of a joint training datasets first and then patients",
    )
    unlabelled_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of every batch that is images of the training sites without a label, or whose label "
        "labelled_patients leaves out, for objectives that need none",
    )
    labelled_patients: int | None = Field(
        default=None, gt=0, description="learn from so many patients, the sites taking turns; none: all"
    )
    encoder_rate_factor: float = Field(
        default=1.0, gt=0, description="learning rate of the encoder over that of the rest"
    )
    encoder_rate_steps: int | None = Field(
        default=None, ge=0, description="the factor holds for so many steps; none: for all"
    )
    validation_fraction: float = Field(
        default=0.2, ge=0, lt=1, description="source patients held out, of every site"
    )
    validate_every: int = Field(
        default=250, gt=0, description="steps between validations on held-out source patients"
    )
    validation_cases: int = Field(default=8, ge=0, description="at most so many cases a validation")
    checkpoint_every: int = Field(default=250, gt=0)
    diagnose_every: int = Field(
        default=100,
        ge=0,
        description="steps between logs of each loss's pull at the weights and of the effective rank; 0: never",
    )
    cache_memory_gb: float = Field(default=8.0, ge=0, description="above this, prepared cases wait on disk")
    prefetch: bool | None = Field(
        default=None, description="prepare batches in a thread beside the network; none: only beside a GPU"
    )
    threads: int = Field(default=0, ge=0, description="CPU threads; 0: all cores")


class AdaptSettings(Settings):
    """Test-time adaptation of a copy of the network to one image, and what keeps it from doing harm."""

    method: str = Field(
        default="none",
        description="adapter; none: no adaptation; auto: standard_views",
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="of the adapter")
    windows: int = Field(
        default=4, gt=0, description="of the image that it is adapted by, evenly from the fuller ones"
    )
    first_share: float = Field(
        default=0.5,
        ge=0,
        lt=1,
        description="of the probabilities before adapting in those after it, which are averaged",
    )
    only_shifted: bool = Field(
        default=True,
        description="adapt to images alone that the judge finds unlike those known, or whose mask it doubts",
    )
    least_doubt: float = Field(
        default=1.0,
        gt=0,
        description="the judge's score `quality` above which a mask is in doubt: 0 is usual, 1 its limit; 1e9: never",
    )
    guard: bool = Field(default=True, description="undo what fails the checks below")
    volume_ratio: Range = Field(default=(0.5, 2.0), description="of what is found after and before")
    least_agreement: float = Field(default=0.7, ge=0, le=1, description="Dice of the masks before and after")
    most_changed: float = Field(default=0.5, ge=0, description="voxels that changed over those found before")
    agreement_fall: float = Field(
        default=0.02, ge=0, description="views of the image may agree less by so much Dice"
    )


MaskFormat = Literal["auto", "nifti", "dicom_seg", "dicom_seg_labelmap"]


class PredictSettings(Settings):
    """Sliding-window inference."""

    overlap: float = Field(default=0.5, ge=0, lt=1)
    flips: bool = Field(
        default=True, description="test-time augmentation by mirroring, where trained with it"
    )
    batch_size: int = Field(default=8, gt=0)
    precision: Literal["auto", "32-true", "bf16-mixed"] = Field(
        default="auto", description="auto: bfloat16 where this device is faster with it, float32 elsewhere"
    )
    format: MaskFormat = Field(
        default="auto", description="of masks; auto: the image's own kind, NIfTI for DICOM images"
    )
    calibrate: bool = Field(default=True, description="scale probabilities by the run's temperature")
    postprocess: bool = Field(
        default=True, description="take fragments out of masks, where the run has learned it"
    )
    least_dice: float = Field(
        default=0.7,
        ge=0,
        le=1,
        description="a mask is sent to review where only a lower Dice can be counted on (judge.risk)",
    )
    task: str | None = Field(
        default=None,
        description="of a run trained on several datasets the one that images are like; none: nobody says which",
    )
    adapt: AdaptSettings = AdaptSettings()
    normalisation: Literal["eval", "batch"] = Field(
        default="eval",
        description="batch: batch normalisation by the statistics of each batch of test windows",
    )


class CalibrationSettings(Settings):
    """Temperature scaling on held-out source patients, at the end of a training."""

    kind: Literal["auto", "global", "per_class", "none"] = Field(
        default="auto",
        description="one temperature, one for each class, or none; auto: one, or one for each class where several "
        "datasets label different classes",
    )
    cases: int = Field(
        default=10, gt=0, description="held-out cases, of each of several datasets, it is fitted on at most"
    )


class PostprocessingSettings(Settings):
    """Taking fragments out of the masks of structures that are in one piece; decided at the end of a training."""

    fragments: Literal["learned", "kept"] = Field(
        default="learned",
        description="learned: they are taken out of classes that have none in the labels of training, unless that "
        "lowers the Dice of held-out source cases",
    )
    smaller_than: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="what a fragment is, as a share of the largest piece's voxels; 0: a tenth, or a quarter or half "
        "where that gains clearly more on held-out source cases",
    )
    labels: int = Field(
        default=30, gt=0, description="training labels, of each of several datasets, looked at at most"
    )
    cases: int = Field(
        default=10, gt=0, description="held-out cases, of each of several datasets, it is tried on at most"
    )


class JudgeSettings(Settings):
    """What the verdict on a mask rests on; learned at the end of a training from source patients alone."""

    detectors: dict[str, dict[str, Any]] = Field(
        default_factory=lambda: {
            name: {}
            for name in (
                *("histogram", "power_spectrum", "shading", "spectral"),
                *("entropy", "soft_dice", "pairwise_dice", "shape"),
            )
        },
        description="detector name to its settings; empty: no verdicts",
    )
    cases: int = Field(
        default=30,
        gt=1,
        le=200,
        description="training cases, of each of several datasets, kept as references at most",
    )
    held_out_cases: int = Field(
        default=20, ge=0, description="held-out cases, of each of several datasets, that set limits at most"
    )
    false_alarms: float = Field(
        default=0.1, gt=0, lt=1, description="share of images like those of training that is sent to review"
    )
    shifted_copies: int = Field(
        default=30,
        ge=0,
        description="of held-out images under synthetic shifts, to learn what signs mean together; "
        "0: no combined score and no predicted Dice",
    )
    coverage: float = Field(
        default=0.9, gt=0, lt=1, description="share of images whose Dice lies within the predicted interval"
    )
    risk: float = Field(
        default=0.2,
        gt=0,
        le=0.5,
        description="share of masks that may fall below the Dice that can be counted on, of which "
        "predict.least_dice is the least",
    )


class PretrainSettings(Settings):
    """A pretraining on the images of the training sites, before the training and by the same plan."""

    objectives: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="objective name to its settings, none that needs labels; empty: no pretraining",
    )
    steps: int = Field(default=500, gt=0)
    learning_rate: float = Field(default=1e-3, gt=0)
    batch_size: int | None = Field(default=None, gt=0, description="none: as in training")
