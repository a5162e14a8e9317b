"""`emu2`: the command line. Parses and calls, nothing else.

Bad input ends with one line on stderr and exit code 2; a run that SIGTERM stopped (its state is saved) with 143.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from emu2_jax.errors import UserError

Command = Callable[[argparse.Namespace, list[str]], None]

EXIT_BAD_INPUT = 2
EXIT_STOPPED = 128 + 15  # what a shell reports for SIGTERM; schedulers restart on it

TRAIN_EPILOG = """\
Any setting can be changed, by dotted path:
  --gin.optimizer.learning_rate=3e-5         one setting (needs the equals sign)
  --gin_file=experiments/ablations/x.gin     a file of lines `path = value`; may be given several times
A flag beats a file, a later file an earlier one. docs/config.md has the rules; --dry_run shows the outcome.

The same command goes on where the run stopped. Examples:
  emu2 train openmoji_tiny_stage1 --workdir runs/mine --gin.train.num_steps=100
  emu2 train emu2_37b_stage2 --workdir runs/big --dry_run
"""

DATA_INDEX_EPILOG = """\
An index that is there and fits its shard is left alone; a build that was stopped goes on where it was. Examples:
  emu2 data index openmoji_tiny_stage2
  emu2 data index 'data/pairs-*.tar' --kind image_text --tokenizer data/tokenizer.model
"""

#: As `SourceConfig.kind` has them; named here, so that --help needs no import.
KINDS = ("image_text", "video_text", "interleaved", "grounded", "text")


CONVERT_EPILOG = """\
Forms (found from the names unless given): emu2, emu2_hf, llama_hf, eva_timm, eva_open_clip, eva_clip,
vit_timm, clip_hf, clip_open_clip, unet.
Parts that no file holds are drawn at random. Examples:
  emu2 convert --from /data/Emu2 --to runs/emu2
  emu2 convert --from /data/llama-33b --from eva_open_clip=/data/eva --to runs/start
  emu2 convert --from gs://bucket/Emu2-Chat --to runs/chat --gin.model.language.vocab_size=32274 \\
      --gin.model.num_visual_tokens=256 --gin.data.special_tokens=chat
"""

#: As `emu2_jax.weights.names.FORMS`, which `--help` need not wait for.
FORMS = (
    "emu2", "emu2_hf", "llama_hf", "eva_timm", "eva_open_clip", "eva_clip",
    "vit_timm", "clip_hf", "clip_open_clip", "unet", "vae",
)  # fmt: skip

EVALUATE_EPILOG = """\
A decoder's work directory is measured by itself: PSNR, SSIM and embedding cosine of redrawn held-out pictures, and a
contact sheet. With other settings or shards the numbers are printed alone, unless --out names a directory. Examples:
  emu2 evaluate runs/demo
  emu2 evaluate runs/openmoji_64/decoder
  emu2 evaluate runs/openmoji_64/decoder --gin.decoder.guidance_scale=2.0 --gin.decoder.num_sampling_steps=50
  emu2 evaluate runs/openmoji_64/decoder --shards 'data/photos/*.tar' --out runs/photos
"""

ENCODE_EPILOG = """\
The same command goes on where it was stopped: shards that are in the store are kept. --gin.mesh.fsdp=8 and the like
are as for `emu2 train`. Then, to train from it:  --gin.data.sources.NAME.embeddings=DIR
  emu2 encode runs/big/stage1b --shards 'data/laion/*.tar' --out data/laion.embeddings
  emu2 encode runs/big/stage1b --crops emu2_37b_decoder --source laion_coco --out data/laion_coco.crops
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not hasattr(arguments, "gin_file"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    command: Command = arguments.command
    try:
        command(arguments, rest)
    except UserError as error:
        print(f"emu2: {error}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("emu2: interrupted; the same command starts again, training from its last checkpoint", file=sys.stderr)
        sys.exit(128 + 2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="emu2", description="Train Emu2, use it, measure it.", allow_abbrev=False, epilog="docs/ has a page each."
    )
    add = _adder(parser)

    demo = add("demo", _demo, "the whole way on the embedded corpus: data, three stages, evaluation, report")
    demo.add_argument("--run", type=Path, default=Path("runs/demo"), help="directory of the run (runs/demo)")
    demo.add_argument("--minimal", action="store_true", help="a few steps of everything, to see that it works")

    add("recipes", _recipes, "list the recipes")

    _add_data_commands(add("data", None, "build, convert, index, check and look through corpora"))

    train = add("train", _train, "train a recipe, or go on with it")
    train.epilog = TRAIN_EPILOG
    train.add_argument("recipe", help="a name that `emu2 recipes` lists")
    train.add_argument("--workdir", type=Path, help="where checkpoints, metrics and the operative config go")
    train.add_argument("--gin_file", type=Path, action="append", default=[], metavar="FILE", help="override file")
    train.add_argument("--dry_run", action="store_true", help="show settings, shapes and counts; train nothing")
    train.add_argument(
        "--allow_config_change",
        action="append",
        default=[],
        metavar="PATH",
        help="setting (or section) that may differ from the one the work directory was trained with",
    )

    encode = add("encode", _encode, "store what a frozen encoder makes of images, so that training need not")
    encode.epilog = ENCODE_EPILOG
    encode.add_argument("run", type=Path, help="work directory whose encoder is used, or a run directory with stage1/")
    encode.add_argument("--out", type=Path, required=True, help="directory of the store")
    encode.add_argument("--shards", help="shards of whole pictures, for pretraining")
    encode.add_argument(
        "--kind", choices=["image_text", "interleaved", "grounded"], default="image_text", help="(image_text)"
    )
    encode.add_argument("--caption", default="txt", help="where the text of a pair is, as in the source's config (txt)")
    encode.add_argument("--crops", metavar="RECIPE", help="a visual decoder's recipe: its crops, with latents")
    encode.add_argument("--source", metavar="NAME", help="with --crops: which of the recipe's sources")
    encode.add_argument("--batch", type=int, default=64, metavar="N", help="images at a time, over all devices (64)")
    encode.add_argument("--part", default="1/1", metavar="I/N", help="do every N-th shard from the I-th on (1/1)")
    encode.add_argument("--gin_file", type=Path, action="append", default=[], metavar="FILE", help="override file")

    sweep = add("sweep", _sweep, "print the commands of a recipe's ablations")
    sweep.add_argument("recipe")
    sweep.add_argument("--workdir", type=Path, required=True, help="each variant gets a directory in it")

    evaluate = add("evaluate", _evaluate, "measure a trained model on held-out pairs and draw pictures")
    evaluate.epilog = EVALUATE_EPILOG
    evaluate.add_argument(
        "run",
        type=Path,
        help="run directory: holds stage2/ and decoder/, gets evaluation/; or a decoder's work directory",
    )
    evaluate.add_argument("--shards", help="of a decoder: shards of pictures to redraw, in place of the run's own")
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="of a decoder: where to write (RUN/evaluation)")
    evaluate.add_argument("--gin_file", type=Path, action="append", default=[], metavar="FILE", help="override file")

    generate = add("generate", _generate, "continue a prompt of texts and images")
    generate.add_argument(
        "run", type=Path, help="run directory (holds stage2/ and, for --image, decoder/) or a work directory"
    )
    generate.add_argument(
        "--prompt", nargs="+", required=True, metavar="LINK", help="texts and image files, in their order"
    )
    generate.add_argument("--image", type=Path, metavar="FILE.png", help="draw an image after the prompt, into FILE")
    generate.add_argument("--max_tokens", type=int, default=48, help="longest text, tokens (48)")

    reconstruct = add("reconstruct", _reconstruct, "encode images and draw them again from their embeddings")
    reconstruct.add_argument("run", type=Path, help="run directory: holds decoder/")
    reconstruct.add_argument("images", nargs="+", type=Path)
    reconstruct.add_argument("--out", type=Path, required=True, help="picture to write: originals above, redrawn below")

    convert = add("convert", _convert, "make a work directory from released weights (docs/weights.md)")
    convert.epilog = CONVERT_EPILOG
    convert.add_argument(
        "--from",
        dest="sources",
        action="append",
        required=True,
        metavar="[FORM=]PATH",
        help="a weight file, an index or a directory that holds one; several times to combine parts",
    )
    convert.add_argument("--to", type=Path, required=True, metavar="WORKDIR", help="work directory to make")
    convert.add_argument("--recipe", default="emu2_37b_stage2", help="whose model it is (emu2_37b_stage2)")
    convert.add_argument("--gin_file", type=Path, action="append", default=[], metavar="FILE", help="override file")
    convert.add_argument(
        "--dtype", choices=["stored", "float32", "bfloat16"], default="stored", help="of the work directory (stored)"
    )

    export = add("export", _export, "write the weights of a work directory as safetensors files of a released form")
    export.add_argument("workdir", type=Path)
    export.add_argument("--form", choices=FORMS, required=True, help="whose names: see docs/weights.md")
    export.add_argument("--to", type=Path, required=True, metavar="DIR", help="directory to make")
    export.add_argument(
        "--dtype", choices=["stored", "float32", "bfloat16"], default="stored", help="of the files (stored)"
    )
    export.add_argument("--shard_gb", type=float, default=5.0, help="largest file, GB (5)")

    inspect = add("inspect", _inspect, "show what a work directory or weight files hold")
    inspect.add_argument("path", help="work directory, weight file, index, or directory that holds one")
    inspect.add_argument("--recipe", help="resolve the names at its size, and say what would train")
    inspect.add_argument("--gin_file", type=Path, action="append", default=[], metavar="FILE", help="override file")
    inspect.add_argument("--mesh", metavar="data=1,fsdp=8,...", help="say what a device of this mesh takes")
    inspect.add_argument("--tensors", action="store_true", help="list every tensor")

    report = add("report", _report, "write report.html of a run")
    report.add_argument("run", type=Path)
    return parser


def _adder(parser: argparse.ArgumentParser) -> Callable[..., argparse.ArgumentParser]:
    """A function that adds a command to `parser`: its name, what it calls (None for a group of commands), its help."""
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, function: Command | None, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text[0].upper() + text[1:] + ".",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if function is not None:
            command.set_defaults(command=function)
        return command

    return add


def _add_data_commands(data: argparse.ArgumentParser) -> None:
    from experiments.sources import CONVERT_EPILOG, add_sources, add_validate

    add = _adder(data)
    openmoji = add("openmoji", _openmoji, "build the embedded corpus (docs/corpora.md)")
    openmoji.add_argument("--out", type=Path, required=True, help="directory to make")
    openmoji.add_argument("--preset", choices=["tiny", "minimal", "full"], default="full", help="how much of it (full)")

    index = add("index", _data_index, "build the indexes of shards, so that a run begins at once")
    index.epilog = DATA_INDEX_EPILOG
    index.add_argument("target", metavar="RECIPE_OR_SHARDS", help="a recipe, or with --kind a pattern of shards")
    index.add_argument("--kind", choices=KINDS, help="layout of the samples (docs/data.md)")
    index.add_argument("--tokenizer", type=Path, metavar="MODEL", help="with --kind: a SentencePiece model")
    index.add_argument("--caption", help="with --kind: where the text of a pair is, txt or json.FIELD (txt)")
    index.add_argument("--index_dir", help="with --kind: path or URL for indexes (beside the shards)")
    index.add_argument("--salvage", action="store_true", help="with --kind: use what is left of damaged shards")
    index.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="shards at a time (all cores)")
    index.add_argument("--gin_file", type=Path, action="append", default=[], metavar="FILE", help="override file")

    convert = add("convert", None, "write a corpus as it is distributed into shards that training reads")
    convert.epilog = CONVERT_EPILOG
    add_sources(_adder(convert))
    add_validate(add)

    check = add("check", _data_check, "count what a recipe's data holds: bad samples, padding, steps in an epoch")
    _add_recipe(check)
    check.add_argument("--read", type=int, default=256, metavar="N", help="samples of each source to decode (256)")

    show = add("show", _data_show, "draw packed rows as the model sees them, as a page")
    _add_recipe(show)
    show.add_argument("--out", type=Path, required=True, metavar="FILE.html", help="page to write")
    show.add_argument("--rows", type=int, default=8, metavar="N", help="rows (or decoder images) to draw (8)")
    show.add_argument("--first", type=int, default=0, metavar="N", help="number of the first one in the run (0)")


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.epilog = "Any setting can be changed, as for `emu2 train`: --gin.data.image_slots=23, --gin_file=FILE."
    command.add_argument("recipe", help="a name that `emu2 recipes` lists")
    command.add_argument("--gin_file", type=Path, action="append", default=[], metavar="FILE", help="override file")


# The imports stand inside the commands: `emu2 --help` and errors in the arguments answer at once.


def _demo(arguments: argparse.Namespace, rest: list[str]) -> None:
    from experiments.demo import run_demo

    run_demo(arguments.run, minimal=arguments.minimal)


def _recipes(arguments: argparse.Namespace, rest: list[str]) -> None:
    from experiments.recipes import RECIPES

    for name, recipe in RECIPES.items():
        print(f"{name:<24} {(recipe.__doc__ or '').splitlines()[0]}")


def _openmoji(arguments: argparse.Namespace, rest: list[str]) -> None:
    from data_pipelines.corpora.openmoji import build
    from experiments.openmoji_tiny import CORPORA

    build(arguments.out, CORPORA[arguments.preset], processes=os.cpu_count() or 1)


def _data_check(arguments: argparse.Namespace, rest: list[str]) -> None:
    from experiments.data_check import check, refuse_unusable
    from experiments.runs import resolve

    config, _ = resolve(arguments.recipe, arguments.gin_file, rest)
    text, checks = check(config, arguments.read)
    print(text)
    refuse_unusable(config, checks)


def _data_show(arguments: argparse.Namespace, rest: list[str]) -> None:
    from experiments.data_show import show
    from experiments.runs import resolve

    config, _ = resolve(arguments.recipe, arguments.gin_file, rest)
    print(show(config, arguments.out, num_rows=arguments.rows, first=arguments.first))


def _data_index(arguments: argparse.Namespace, rest: list[str]) -> None:
    from emu2_jax.errors import ConfigError
    from experiments.data import index_recipe, index_shards

    if arguments.kind is None:
        for name in ("tokenizer", "caption", "index_dir", "salvage"):
            if getattr(arguments, name):
                raise ConfigError(f"--{name}: is for shards of a --kind; a recipe has its own: --gin.data...")
        index_recipe(arguments.target, arguments.gin_file, rest, processes=arguments.processes)
        return
    if rest or arguments.gin_file:
        raise ConfigError("--gin: settings are for a recipe; with --kind, give shards and --tokenizer")
    if arguments.tokenizer is None:
        raise ConfigError("--tokenizer: needed with --kind, because texts are counted in tokens")
    index_shards(
        arguments.target,
        arguments.kind,
        arguments.tokenizer,
        caption=arguments.caption or "txt",
        index_dir=arguments.index_dir,
        salvage=arguments.salvage,
        processes=arguments.processes,
    )


def _train(arguments: argparse.Namespace, rest: list[str]) -> None:
    from emu2_jax.errors import ConfigError
    from emu2_jax.train import Stopped
    from experiments.describe import describe
    from experiments.runs import resolve, run_training

    config, provenance = resolve(arguments.recipe, arguments.gin_file, rest)
    if arguments.dry_run:
        print(describe(config, provenance))
        return
    if arguments.workdir is None:
        raise ConfigError("--workdir: needed to train; --dry_run does without")
    try:
        run_training(config, provenance, arguments.workdir, allowed_changes=arguments.allow_config_change)
    except Stopped as stopped:
        print(f"emu2: {stopped}", file=sys.stderr)
        sys.exit(EXIT_STOPPED)


def _encode(arguments: argparse.Namespace, rest: list[str]) -> None:
    from emu2_jax.errors import ConfigError
    from experiments.encode import Part, encode_crops, encode_pictures, encoder_workdir
    from experiments.runs import load_config, override, resolve

    workdir, part = encoder_workdir(arguments.run), Part.parse(arguments.part)
    if arguments.crops is not None:
        if arguments.source is None or arguments.shards is not None:
            raise ConfigError("--crops: takes --source, one of the recipe's, and no --shards")
        config, _ = resolve(arguments.crops, arguments.gin_file, rest)
        encode_crops(config, workdir, arguments.source, arguments.out, batch=arguments.batch, part=part)
        return
    if arguments.shards is None:
        raise ConfigError("--shards: needed, unless --crops names a decoder's recipe")
    config = override(load_config(workdir), arguments.gin_file, rest)
    encode_pictures(
        config,
        workdir,
        arguments.shards,
        arguments.kind,
        arguments.out,
        batch=arguments.batch,
        part=part,
        caption=arguments.caption,
    )


def _sweep(arguments: argparse.Namespace, rest: list[str]) -> None:
    from emu2_jax.errors import ConfigError
    from experiments.recipes import SWEEPS, get

    get(arguments.recipe)
    if arguments.recipe not in SWEEPS:
        raise ConfigError(f"{arguments.recipe}: has no sweep; those that have: {', '.join(SWEEPS)}")
    for variant, settings in SWEEPS[arguments.recipe]():
        flags = " ".join(f"--gin.{path}={value}" for path, value in settings.items())
        print(f"emu2 train {arguments.recipe} --workdir {arguments.workdir / variant} {flags}")


def _evaluate(arguments: argparse.Namespace, rest: list[str]) -> None:
    from emu2_jax.errors import ConfigError
    from experiments.autoencode import FOLDER, evaluate_decoder
    from experiments.evaluate import evaluate_run
    from experiments.runs import CONFIG, load_config, load_params, override

    changed = bool(rest or arguments.gin_file or arguments.shards)
    if (arguments.run / CONFIG).exists():
        config = override(load_config(arguments.run), arguments.gin_file, rest)
        if config.train.task != "decoder":
            raise ConfigError(f"{arguments.run}: is no visual decoder's; give the run directory that holds it")
        out = None if changed else arguments.run / FOLDER
        params = load_params(arguments.run, config)
        numbers = evaluate_decoder(config, params, shards=arguments.shards, out=arguments.out or out)
    elif changed or arguments.out:
        raise ConfigError(
            f"{arguments.run}: --shards, --out and settings are for a decoder's work directory (it has no {CONFIG})"
        )
    else:
        numbers = evaluate_run(arguments.run)
    for name, value in numbers.items():
        print(f"{name:<32} {value:.4f}")


def _generate(arguments: argparse.Namespace, rest: list[str]) -> None:
    from experiments.use import generate

    generate(arguments.run, arguments.prompt, image_file=arguments.image, max_tokens=arguments.max_tokens)


def _reconstruct(arguments: argparse.Namespace, rest: list[str]) -> None:
    from experiments.use import reconstruct

    reconstruct(arguments.run, arguments.images, arguments.out)


def _convert(arguments: argparse.Namespace, rest: list[str]) -> None:
    from experiments.weights import convert

    convert(arguments.sources, arguments.to, arguments.recipe, arguments.gin_file, rest, dtype=arguments.dtype)


def _export(arguments: argparse.Namespace, rest: list[str]) -> None:
    from experiments.weights import export_weights

    export_weights(arguments.workdir, arguments.form, arguments.to, dtype=arguments.dtype, shard_gb=arguments.shard_gb)


def _inspect(arguments: argparse.Namespace, rest: list[str]) -> None:
    from experiments.inspection import inspect

    print(
        inspect(
            arguments.path,
            arguments.recipe,
            arguments.gin_file,
            rest,
            mesh=arguments.mesh,
            tensors=arguments.tensors,
        )
    )


def _report(arguments: argparse.Namespace, rest: list[str]) -> None:
    from emu2_jax.report import write_report

    print(write_report(arguments.run))


if __name__ == "__main__":
    main()
