"""The commands: parse, call one public function, print; PyTorch is imported only by those that compute."""

from __future__ import annotations

import math
import re
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, cast

import typer

from anysite import __version__
from anysite.errors import AnysiteError, BatchError, ConfigError, DataError, FileFormatError, RejectedMasks

if TYPE_CHECKING:
    from anysite.config import Config
    from anysite.data.case import Dataset
    from anysite.predict import CaseOutcome

# Click's UsageError, which Typer brings along under a name of its own.
UsageError = cast("type[Exception]", typer.BadParameter.__mro__[1])

app = typer.Typer(
    name="anysite",
    help="Segmentation trained on the hospitals you have, tested on those you don't.",
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 done but some cases failed, 2 misuse or bad input, 3 interrupted and saved.",
)

DatasetPath = Annotated[
    Path, typer.Argument(metavar="DATASET", help="CSV manifest, nnU-Net or <site>/{images,masks} folder")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="change a setting, such as train.steps=500"),
]
Plugins = Annotated[
    list[str] | None, typer.Option("--plugin", metavar="MODULE:CLASS", help="trust a class outside anysite")
]
RunOutput = Annotated[Path, typer.Option("--output", help="the run folder to write")]
Preset = Annotated[str, typer.Option(help="a preset's name or a .toml file")]
TestDomains = Annotated[list[str] | None, typer.Option(help="a site to keep out of training altogether")]
Seed = Annotated[int | None, typer.Option(help="of everything random")]
Budget = Annotated[
    str | None, typer.Option(help="wall-clock time, such as 90s, 10m or 2h; chooses the steps")
]
Resume = Annotated[bool, typer.Option("--resume", help="continue an interrupted run with its own settings")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs")]


def main() -> None:
    """Run the command line and exit with its documented code."""
    try:
        sys.exit(app(sys.argv[1:] or ["--help"], prog_name="anysite", standalone_mode=False))
    except AnysiteError as error:
        _fail(error)
    except UsageError as error:
        _fail(_explain(error))
    except OSError as error:
        _fail(
            FileFormatError(
                error.strerror or str(error),
                where=error.filename or "",
                fix="check the path, its permissions and the space left",
            )
        )


def _fail(error: AnysiteError) -> NoReturn:
    from anysite import console

    console.complain(error)
    sys.exit(error.exit_code)


def _explain(error: Any) -> ConfigError:
    text = " ".join(error.format_message().split())
    return ConfigError(text, fix=f"see {error.ctx.command_path} --help" if error.ctx else "")


def _show_version(value: bool) -> bool:
    if value:
        typer.echo(f"anysite {__version__}")
        raise typer.Exit
    return value


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    output: Annotated[
        Path | None, typer.Option(help="folder for everything; default: demo, or demo_3d")
    ] = None,
    dimension: Annotated[int, typer.Option(help="2 for pictures, 3 for volumes")] = 2,
    budget: Annotated[str, typer.Option(help="time for training")] = "150s",
    seed: int = 0,
) -> None:
    """The whole chain on a made-up dataset: train on three sites, test on a fourth, end in an HTML report."""
    from anysite import console
    from anysite.data.phantom import write_phantom

    if dimension not in (2, 3):
        raise ConfigError(f"--dimension {dimension}", expected="2 or 3")
    output = output or Path("demo" if dimension == 2 else "demo_3d")
    began = time.monotonic()
    data, run, masks, page = (
        output / f"phantom_{dimension}d",
        output / "run",
        output / "masks",
        output / "report.html",
    )
    if not (data / "index.csv").is_file():
        write_phantom(data, dimension=dimension, patients_per_site=20, seed=seed)
    console.say(f"1. anysite check {data}")
    check(data)
    console.say(f"\n2. anysite train {data} --output {run} --test-domain west --budget {budget} --resume")
    train(data, run, test_domain=["west"], budget=budget, seed=seed, resume=True)
    console.say(f"\n3. anysite predict {run} {data} --output {masks}")
    try:
        predict([run, data], masks)
    except RejectedMasks as error:  # as it should be, at a site that was never seen
        console.say(str(error))
    console.say(f"\n4. anysite evaluate {masks} {data}")
    evaluate(masks, data)
    console.say(f"\n5. anysite report {masks} --output {page}")
    report([masks], page)
    console.say(f"\nDone in {console.format_seconds(time.monotonic() - began)}. Open {page} in a browser.")


@app.command()
def check(dataset: DatasetPath, json: AsJson = False) -> None:
    """List every problem of a dataset at once, with the file, what was found and what to do."""
    from anysite import console
    from anysite.data.check import inspect_dataset

    inspection = inspect_dataset(dataset)
    console.as_json(inspection) if json else console.show_inspection(inspection)
    if any(problem.severity == "error" for problem in inspection.problems):
        raise typer.Exit(1)


@app.command()
def train(
    dataset: DatasetPath,
    output: RunOutput,
    preset: Preset = "baseline",
    set_: Overrides = None,
    test_domain: TestDomains = None,
    seed: Seed = None,
    budget: Budget = None,
    resume: Resume = False,
    plugin: Plugins = None,
) -> None:
    """Train on every site but the test sites, and write a run folder."""
    _trust(plugin)
    from anysite import config
    from anysite.data.layouts import open_dataset

    settings = config.load(preset, _overrides(set_, test_domain, seed))
    _train(open_dataset(dataset, unseen=settings.test_domains), settings, preset, output, budget, resume)


@app.command()
def pretrain(
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="a dataset, labelled or not, or a folder of images")
    ],
    output: RunOutput,
    method: Annotated[str, typer.Option(help="an objective that needs no labels")] = "tile_autoencoder",
    preset: Preset = "baseline",
    set_: Overrides = None,
    test_domain: TestDomains = None,
    seed: Seed = None,
    budget: Budget = None,
    resume: Resume = False,
    plugin: Plugins = None,
) -> None:
    """Learn an encoder from images alone; anysite train --set pretrained=RUN starts from it."""
    _trust(plugin)
    from anysite import config, registry
    from anysite.data.case import Dataset
    from anysite.data.layouts import find_cases, open_images

    if registry.find("objective", method).needs_label:
        raise ConfigError(f"--method {method}, which needs labels", fix="use anysite train")
    settings = config.load(preset, _overrides(set_, test_domain, seed))
    chosen = settings.objectives | settings.pretrain.objectives
    settings = settings.model_copy(
        update={"objectives": {method: chosen.get(method, {})}, "pretrain": config.PretrainSettings()}
    )
    try:
        dataset = find_cases(images)
    except DataError:
        cases = open_images(images)  # says again what is wrong where it is a dataset after all
        dataset = Dataset(images.resolve().name, cases, (), ())
    _train(dataset, settings, preset, output, budget, resume)


def _overrides(set_: list[str] | None, test_domain: list[str] | None, seed: int | None) -> list[str]:
    overrides = list(set_ or [])
    if test_domain:
        overrides.append("test_domains=[" + ", ".join(f'"{name}"' for name in test_domain) + "]")
    if seed is not None:
        overrides.append(f"seed={seed}")
    return overrides


def _train(
    dataset: Dataset, settings: Config, preset: str, output: Path, budget: str | None, resume: bool
) -> None:
    budget_s = None if budget is None else parse_duration(budget)
    from anysite import console
    from anysite import train as training

    with console.training_bar() as advance:
        run = training.train(
            dataset,
            settings,
            output,
            budget_s=budget_s,
            resume=resume,
            on_progress=advance,
            facts={"preset": Path(preset).stem},
        )
    console.show_run(run)


@app.command()
def predict(
    runs_and_input: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN... INPUT", help="run folders, then a dataset, a folder of images or one file"
        ),
    ],
    output: Annotated[Path, typer.Option(help="folder for the masks")],
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="write CASE.npz beside each mask")
    ] = False,
    part: Annotated[
        str, typer.Option(help="the I-th of N shares of the cases, for several machines")
    ] = "1/1",
    flips: Annotated[
        bool | None, typer.Option(help="test-time augmentation by mirroring; default: the run's setting")
    ] = None,
    calibrate: Annotated[
        bool | None, typer.Option(help="probabilities by the run's temperature; default: the run's setting")
    ] = None,
    include_training: Annotated[
        bool, typer.Option("--include-training", help="also cases the run was trained on")
    ] = False,
    referral: Annotated[
        float | None,
        typer.Option(
            help="share of the images that a person can look at, such as 0.2; default: as verdicts say"
        ),
    ] = None,
    accelerator: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    plugin: Plugins = None,
) -> None:
    """Segment images with one run, or with several whose probabilities are averaged."""
    if len(runs_and_input) < 2:
        raise ConfigError("one path", expected="one or more run folders, then the input")
    _trust(plugin)
    from anysite import console, runs
    from anysite import predict as prediction
    from anysite.verdicts import VERDICTS, read_verdicts

    *folders, source = runs_and_input
    opened = [runs.open_run(folder) for folder in folders]
    dataset, sites_known = prediction.open_input(source, opened[0].plan)
    cases = dataset.cases
    if not include_training:
        cases = tuple(c for c in cases if prediction.split_of(c, opened, sites_known) != "training")
        if left_out := len(dataset.cases) - len(cases):
            console.say(f"{left_out} cases were trained on and are left out (--include-training keeps them)")
    share = prediction.select_part(cases, part)
    outcomes: list[CaseOutcome] = []
    with console.case_bar(len(share), "predicting") as advance:
        for outcome in prediction.predict(
            opened, cases, output, flips=flips, calibrate=calibrate, save_probabilities=save_probabilities, part=part,
            referral=referral, dataset=dataset, sites_known=sites_known, accelerator=accelerator,
        ):  # fmt: skip
            outcomes.append(outcome)
            advance(outcome)
    count = Counter(outcome.status for outcome in outcomes)
    console.say(
        f"{count['done']} masks written to {output}, {count['skipped']} were there already, "
        f"{count['failed']} cases failed"
    )
    verdicts = read_verdicts(output)
    judged = {case.id: verdicts[case.id]["verdict"] for case in share if case.id in verdicts}
    console.show_verdicts(judged, len(share), output)
    if count["failed"]:
        raise BatchError(
            f"{count['failed']} of {len(share)} cases failed",
            fix=f"the reasons are above and in {prediction.manifest_path(output, part)}",
        )
    if rejected := list(judged.values()).count("reject"):
        raise RejectedMasks(
            f"{rejected} of {len(share)} masks were rejected",
            fix=f"the reasons are in {output / VERDICTS}; all masks are written",
        )


@app.command()
def judge(
    masks_and_images: Annotated[
        list[Path],
        typer.Argument(
            metavar="MASKS... IMAGES",
            help="folders of masks, one a model, then their images; or a prediction folder alone",
        ),
    ],
    reference: Annotated[
        Path | None, typer.Option(help="a dataset of images and labels like those the models were trained on")
    ] = None,
    reference_masks: Annotated[
        list[Path] | None,
        typer.Option(
            help="the models' masks of the reference images, a folder for each of MASKS (repeatable)"
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="folder for the verdicts on masks of other programs")
    ] = None,
    false_alarms: Annotated[
        float, typer.Option(help="share of images like the reference that is sent to review")
    ] = 0.05,
    referral: Annotated[
        float | None, typer.Option(help="share of the images that a person can look at, such as 0.2")
    ] = None,
    json: AsJson = False,
) -> None:
    """Say which masks of other programs to trust, or refer another share of one's own."""
    from anysite import console
    from anysite.verdicts import VERDICTS, write_verdicts

    failed: dict[str, str] = {}
    if reference is None:
        folder, judged = _judged_before(masks_and_images)
    else:
        folder, (judged, failed) = (
            _require_output(output),
            _judge_masks(masks_and_images, reference, reference_masks or [], false_alarms),
        )
        folder.mkdir(parents=True, exist_ok=True)
    verdicts = write_verdicts(folder, judged, referral)
    if json:
        console.as_json({"cases": verdicts, "failed": failed})
    else:
        console.show_verdicts({case: v["verdict"] for case, v in verdicts.items()}, len(verdicts), folder)
    if failed:
        name, error = next(iter(failed.items()))
        raise BatchError(f"{len(failed)} cases could not be judged, such as {name}: {error}")
    if rejected := sum(verdict["verdict"] == "reject" for verdict in verdicts.values()):
        raise RejectedMasks(
            f"{rejected} of {len(verdicts)} masks were rejected", fix=f"see {folder / VERDICTS}"
        )


def _judged_before(paths: list[Path]) -> tuple[Path, dict[str, Any]]:
    from anysite.manifest import read_manifests

    if len(paths) != 1:
        raise ConfigError(
            f"{len(paths)} paths without --reference",
            expected="one folder of anysite predict, or masks and images with --reference DATASET",
        )
    cases = read_manifests(paths[0])["cases"]
    return paths[0], {name: entry["verdict"] for name, entry in cases.items() if entry.get("verdict")}


def _judge_masks(
    paths: list[Path], reference: Path, reference_masks: list[Path], false_alarms: float
) -> tuple[dict[str, Any], dict[str, str]]:
    from anysite import console
    from anysite.data.layouts import open_dataset, open_images
    from anysite.foreign import MaskJudge

    *folders, images = paths
    if not folders:
        raise ConfigError("one path with --reference", expected="folders of masks, then their images")
    cases = open_images(images)
    console.say("learning what is usual from the reference")
    mask_judge = MaskJudge(open_dataset(reference), reference_masks, len(folders), false_alarms)
    console.say(f"judging by {', '.join(mask_judge.judge.detectors)}")
    judged: dict[str, Any] = {}
    failed: dict[str, str] = {}
    with console.case_bar(len(cases), "judging") as advance:
        for outcome in mask_judge.judge_folders(folders, cases):
            if outcome.verdict is None:
                failed[outcome.case.id] = outcome.error
            else:
                judged[outcome.case.id] = outcome.verdict
            advance()
    return judged, failed


def _require_output(output: Path | None) -> Path:
    if output is None:
        raise ConfigError("no --output", expected="a folder for the verdicts")
    return output


@app.command()
def evaluate(
    predictions: Annotated[
        Path, typer.Argument(metavar="PREDICTIONS", help="folder of masks named after cases")
    ],
    dataset: DatasetPath,
    tolerance: Annotated[float, typer.Option(help="of the surface Dice, in mm or px")] = 2.0,
    json: AsJson = False,
) -> None:
    """Score masks against labels on the native grid; writes rows.jsonl and summary.json beside the masks."""
    from anysite import atomic, console
    from anysite import evaluate as evaluation
    from anysite.data.layouts import open_dataset

    result = evaluation.evaluate(predictions, open_dataset(dataset), tolerance=tolerance)
    console.as_json(atomic.read_json(predictions / evaluation.SUMMARY)) if json else console.show_evaluation(
        result
    )
    if result.failed:
        raise BatchError(
            f"{len(result.failed)} cases could not be scored",
            fix=f"the reasons are in {predictions / evaluation.SUMMARY}",
        )


@app.command()
def report(
    paths: Annotated[
        list[Path], typer.Argument(metavar="PATH...", help="prediction folders and files of rows (.jsonl)")
    ],
    output: Annotated[Path, typer.Option(help="the page to write")] = Path("report.html"),
    title: str = "",
) -> None:
    """Turn rows and predictions into one self-contained HTML page."""
    from anysite import console
    from anysite.report import write_report

    write_report(paths, output, title)
    console.say(f"report written to {output}")


@app.command()
def benchmark(
    dataset: DatasetPath,
    output: Annotated[Path, typer.Option(help="rows as JSON lines; jobs whose rows are there are skipped")],
    methods: Annotated[str, typer.Option(help="presets, separated by commas")] = "baseline",
    seeds: Annotated[str, typer.Option(help="separated by commas")] = "0,1,2",
    protocol: Annotated[str, typer.Option(help="leave-one-out, train-on-one or pooled")] = "leave-one-out",
    test_domain: Annotated[
        list[str] | None, typer.Option(help="leave out only this site (repeatable)")
    ] = None,
    metrics: Annotated[
        str, typer.Option(help="metrics to keep rows of, separated by commas; verdict keeps every score")
    ] = "dice",
    labels: Annotated[
        str,
        typer.Option(
            help="learn from so many labelled patients, such as 1,2,5,all; fewer are a subset of more"
        ),
    ] = "all",
    corruptions: Annotated[
        str,
        typer.Option(
            help="also score corrupted copies of held-out images: all, or names separated by commas"
        ),
    ] = "",
    severities: Annotated[str, typer.Option(help="of the corruptions, 1 to 5")] = "1,2,3,4,5",
    others: Annotated[
        list[Path] | None,
        typer.Option(help="also judge images of this other dataset, which should be rejected (repeatable)"),
    ] = None,
    set_: Overrides = None,
    normalisation: Annotated[
        str,
        typer.Option(help="eval, or batch: batch normalisation by test statistics, named with every result"),
    ] = "eval",
    budget: Annotated[str | None, typer.Option(help="wall-clock time of each training")] = None,
    parallel: Annotated[int, typer.Option(help="jobs at once, sharing the cores")] = 1,
    keep_runs: Annotated[Path | None, typer.Option(help="keep run folders and masks here")] = None,
) -> None:
    """Train and score methods over sites and seeds; one row a case, class and metric."""
    from anysite import benchmark as benchmarking
    from anysite import console
    from anysite.data.layouts import open_dataset

    numbers = _whole_numbers("--seeds", seeds)
    counts = [None if part == "all" else _whole_numbers("--labels", part)[0] for part in labels.split(",")]
    overrides = [
        *(set_ or []),
        *([f"predict.normalisation={normalisation}"] if normalisation != "eval" else []),
    ]
    jobs = benchmarking.list_jobs(
        open_dataset(dataset), dataset, methods.split(","), numbers, protocol,
        overrides, None if budget is None else parse_duration(budget), test_domain or [], metrics.split(","),
        counts, corruptions.split(",") if corruptions else [], _whole_numbers("--severities", severities),
        others or [],
    )  # fmt: skip
    began, failed = time.monotonic(), 0
    waiting = benchmarking.unfinished(jobs, output)
    console.say(f"{len(jobs)} jobs, {len(jobs) - len(waiting)} of them done before")
    outcomes = benchmarking.benchmark(waiting, output, parallel=parallel, keep_runs=keep_runs)
    for finished, outcome in enumerate(outcomes, start=1):
        failed += bool(outcome.error)
        left = (time.monotonic() - began) / finished * (len(waiting) - finished)
        console.show_job(outcome, finished, len(waiting), left)
    if failed:
        raise BatchError(
            f"{failed} of {len(waiting)} jobs failed",
            fix="run the same command again after mending the cause",
        )


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}", expected="whole numbers separated by commas") from None


@app.command()
def methods(json: AsJson = False) -> None:
    """List networks, objectives and presets with their settings."""
    from anysite import config, console, registry

    listed = [registry.describe(kind, name) for kind, names in registry.TABLES.items() for name in names]
    if json:
        console.as_json({"methods": listed, "presets": config.preset_names()})
        return
    for kind, names in registry.TABLES.items():
        console.say(f"{kind}s")
        for method in (m for m in listed if m.kind == kind and m.name in names):
            console.say(f"  {method.name:16}{method.headline}")
            if method.settings:
                console.say(f"  {'':16}" + ", ".join(f"{k}={v}" for k, v in method.settings.items()))
    console.say("presets\n  " + ", ".join(config.preset_names()))


@app.command()
def info(
    path: Annotated[
        Path, typer.Argument(metavar="PATH", help="a run folder, a prediction folder, a dataset or an image")
    ],
    json: AsJson = False,
) -> None:
    """Tell what a path holds."""
    from anysite import console
    from anysite.describe import describe

    content = describe(path)
    if json:
        console.as_json(content)
        return
    for name, value in content.items():
        console.say(f"{name:16}{value}")


def parse_duration(text: str) -> float:
    """Return seconds from "90", "90s", "10m" or "2h".

    Raises:
        ConfigError: another form, or no time at all.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h)?", text.strip())
    seconds = float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2] or "s"] if match else 0.0
    if not 0 < seconds < math.inf:
        raise ConfigError(f"--budget {text}", expected="a time such as 90s, 10m or 2h")
    return seconds


def _trust(plugins: list[str] | None) -> None:
    from anysite import registry

    for plugin in plugins or []:
        registry.trust(plugin)
