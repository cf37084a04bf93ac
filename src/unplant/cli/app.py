"""The commands and their options; each imports what it needs only when it runs, so that --help is quick."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="unplant",
    help="Finds and erases backdoors planted in image classifiers, without clean data and without the trigger.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="Exit codes: 0 done, 2 usage, 3 bad model file, 4 bad data, 5 can't write, 6 numerical failure, "
    "7 out of memory, 130 interrupted. --debug shows tracebacks.",
)

Model = Annotated[Path, typer.Argument(help="File of weights (.safetensors or .pth), or a folder that unplant wrote.")]
Arch = Annotated[
    str | None,
    typer.Option(help="Architecture: preact_resnet18, preact_resnet18:width=16, small_cnn, file.py:factory."),
]
Out = Annotated[
    Path, typer.Option("--out", "-o", help="Folder to write; must not exist. A run that was cut off goes on.")
]
Test = Annotated[str | None, typer.Option(help="Clean test images, to measure ACC (and, with --attack, ASR and RA).")]
SaveEvery = Annotated[
    float, typer.Option("--save-every", min=0, help="Seconds after which a run writes down how far it is.")
]
Force = Annotated[bool, typer.Option("--force", help="Replace a folder that unplant wrote before.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Seed = Annotated[int, typer.Option(help="Seed of all that is random.")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="NAME=VALUE, a setting of the method; repeatable.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Precision = Annotated[str, typer.Option(help="auto, float32 or bfloat16.")]
Limit = Annotated[
    list[str] | None,
    typer.Option("--limit", help="NAME=VALUE, a limit on untrusted files (`unplant methods` lists them); repeatable."),
]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores.")]
Mean = Annotated[
    str | None, typer.Option(help="The model's normalisation: mean per channel in [0,1], comma-separated.")
]
Std = Annotated[str | None, typer.Option(help="The model's normalisation: standard deviation per channel.")]
ImageSize = Annotated[str | None, typer.Option(help="WIDTHxHEIGHT: resize every image.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad-images", help="Go on without broken images, if at most 1 %.")]
MaxImages = Annotated[int | None, typer.Option(min=2, help="Use a random part of the data, each class in proportion.")]
TestAttack = Annotated[
    str | None,
    typer.Option("--attack", help="For measuring only: attack.json of `plant`, or badnets:size=4,pattern=white."),
]
Target = Annotated[int, typer.Option(min=0, help="Target label of --attack.")]
AllToAll = Annotated[bool, typer.Option("--all-to-all", help="--attack maps label k to k+1 instead of to one target.")]


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Finds and erases backdoors planted in image classifiers."""
    if version:
        from unplant import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def demo(
    attack: Annotated[str, typer.Option(help="Attack of `unplant methods`.")] = "badnets",
    seed: Seed = 0,
    out: Out = Path("unplant-demo"),
    force: Force = False,
    json: Json = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads; the net is so small that more would fight.")] = 1,
) -> None:
    """Plants a backdoor in a small net on real digits, erases it without clean data, shows before and after."""
    from unplant.cli.demo import run

    run(attack=attack, seed=seed, out=out, force=force, json=json, threads=threads)


@app.command()
def erase(
    model: Model,
    out: Out,
    suspect: Annotated[str | None, typer.Option(help="Training data that may be poisoned: PBE.")] = None,
    clean: Annotated[str | None, typer.Option(help="Data that you trust: AFT.")] = None,
    arch: Arch = None,
    method: Annotated[str | None, typer.Option(help="Eraser; default: pbe with --suspect, aft with --clean.")] = None,
    preset: Annotated[str, typer.Option(help="Settings of a source: default, released.")] = "default",
    settings: Settings = None,
    eps: Annotated[str | None, typer.Option(help="Radius of the adversarial ball, such as 8/255.")] = None,
    test: Test = None,
    attack: TestAttack = None,
    target: Target = 0,
    all_to_all: AllToAll = False,
    max_images: MaxImages = None,
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    skip_bad_images: SkipBad = False,
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
    save_every: SaveEvery = 60,
    limit: Limit = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Erases the backdoor of a model, with its suspect training data (PBE) or with clean data (AFT)."""
    from unplant.cli.erase import run

    run(**{name: value for name, value in locals().items() if name != "run"})


@app.command()
def inspect(
    model: Annotated[Path, typer.Argument(help="Any file that may hold weights.")],
    weights: Annotated[
        Path | None, typer.Option(help="Write its tensors to this new .safetensors file, whatever else it names.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="Where the weights are, if the file holds several models.")] = None,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Shows what is in a model file without running anything in it; exit code 3 if `erase` would refuse it."""
    from unplant.cli.inspect import run

    run(model=model, weights=weights, key=key, limit=limit, json=json)


@app.command()
def evaluate(
    model: Model,
    test: Annotated[str, typer.Option(help="Clean test images.")],
    arch: Arch = None,
    attack: TestAttack = None,
    target: Target = 0,
    all_to_all: AllToAll = False,
    max_images: MaxImages = None,
    seed: Seed = 0,
    mean: Mean = None,
    std: Std = None,
    image_size: ImageSize = None,
    skip_bad_images: SkipBad = False,
    device: Device = "auto",
    threads: Threads = None,
    limit: Limit = None,
    json: Json = False,
) -> None:
    """Measures ACC and, if the attack is known, ASR, RA and the natural target rate."""
    from unplant.cli.evaluate import run

    run(**{name: value for name, value in locals().items() if name != "run"})


@app.command()
def plant(
    data: Annotated[str, typer.Argument(help="Clean training images: folder, zip, .npz or digits:train.")],
    out: Out,
    attack: Annotated[str, typer.Option(help="Attack of `unplant methods`, with settings: badnets:size=4,margin=1.")],
    arch: Annotated[str, typer.Option(help="Architecture.")] = "small_cnn",
    target: Annotated[int, typer.Option(min=0, help="Target label of an all-to-one attack.")] = 0,
    all_to_all: Annotated[bool, typer.Option("--all-to-all", help="Label k becomes k+1.")] = False,
    clean_label: Annotated[
        bool | None,
        typer.Option("--clean-label/--dirty-label", help="Only target images, labels kept; default: as in its paper."),
    ] = None,
    rate: Annotated[
        str | None, typer.Option(help="Share of the training set that is poisoned; default: as in its paper, or 0.1.")
    ] = None,
    cover_rate: Annotated[
        str | None, typer.Option(help="Share that is changed and keeps its labels; default: as in its paper.")
    ] = None,
    sources: Annotated[
        str | None, typer.Option(help="Labels on which the trigger shall work, such as 1,2; default: all.")
    ] = None,
    poison_only: Annotated[
        bool, typer.Option("--poison-only", help="Write the poisoned images, train nothing.")
    ] = False,
    reuse: Annotated[
        bool,
        typer.Option("--reuse", help="Take the model from the cache if the same was planted before; keep it there."),
    ] = False,
    test: Test = None,
    max_images: MaxImages = None,
    seed: Seed = 0,
    settings: Settings = None,
    image_size: ImageSize = None,
    skip_bad_images: SkipBad = False,
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
    save_every: SaveEvery = 60,
    limit: Limit = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """For research: poisons a data set and trains an infected model on it."""
    from unplant.cli.plant import run

    run(**{name: value for name, value in locals().items() if name != "run"})


@app.command()
def gallery(
    data: Annotated[str, typer.Argument(help="Images: folder, zip, .npz or digits.")],
    out: Out,
    attack: Annotated[
        list[str] | None, typer.Option(help="Attack, with settings, or an attack.json; repeatable. Default: all.")
    ] = None,
    target: Annotated[int, typer.Option(min=0, help="Target label.")] = 0,
    max_images: MaxImages = None,
    seed: Seed = 0,
    image_size: ImageSize = None,
    threads: Threads = None,
    limit: Limit = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Shows triggers: clean and triggered images and ten times their difference, with PSNR and SSIM."""
    from unplant.cli.gallery import run

    run(**{name: value for name, value in locals().items() if name != "run"})


@app.command()
def methods(json: Json = False) -> None:
    """Lists erasers, attacks, architectures and limits with their settings, defaults and presets."""
    from unplant.cli.methods import run

    run(json=json)
