"""`emu2`: the command line. Parses and calls, nothing else.

Bad input ends with one line on stderr and exit code 2; a run that SIGTERM stopped (its state is saved) with 143.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from emu2_jax.errors import UserError

if TYPE_CHECKING:
    from emu2_jax.generation.answer import Wanted

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

GENERATE_EPILOG = """\
A link is the path of a picture or a video, box:LEFT,TOP,RIGHT,BOTTOM (shares of the sides; drawn as an image),
place:... (the same as location tokens), or a text. docs/generate.md has the form of prompt files. Several devices:
--gin.mesh.tensor=8 and the like. Examples:
  emu2 generate runs/demo --prompt photo.png
  emu2 generate runs/demo --prompt "a large dog on a blue background" --image dog.png
  emu2 generate runs/demo --prompt "A story." --images 4 --max_tokens 200 --out story
  emu2 generate runs/demo --prompt {path} "how many?" --values questions.csv --beams 5 --length_penalty -1
"""

CHAIN_EPILOG = """\
What comes before the link that varies is computed once, the variants in one batch. Example:
  emu2 chain runs/demo --prompt "one large dog" " on a blue background" --replace 2 \\
      --by " on a red background" " on a green background" --draw --out dogs.png
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
  emu2 evaluate runs/demo --suite few_shot --gin_file=experiments/evaluations/openmoji_captions.gin
  emu2 evaluate runs/emu2 --suite few_shot --gin_file=okvqa.gin --part 3/8
"""

ENCODE_EPILOG = """\
The same command goes on where it was stopped: shards that are in the store are kept. --gin.mesh.fsdp=8 and the like
are as for `emu2 train`. Then, to train from it:  --gin.data.sources.NAME.embeddings=DIR
  emu2 encode runs/big/stage1b --shards 'data/laion/*.tar' --out data/laion.embeddings
  emu2 encode runs/from_sdxl --crops emu2_37b_decoder --source laion_coco --out data/laion_coco.crops --epochs 2
"""


PLAN_EPILOG = """\
The number in v4-512 and v5p-128 counts TensorCores, two to a chip; in v5e-256 and v6e-256, chips. Without --gin_file
and --search, the settings of experiments/meshes for the recipe and the slice are used, where there are any. Examples:
  emu2 plan emu2_37b_stage2 --topology v5p-128
  emu2 plan emu2_37b_stage2 --topology v5p-128 --search --json found.json
  emu2 plan emu2_37b_stage1a --topology v5e-256 --slices 2
  emu2 plan emu2_37b_stage2 --topology v5p-128 --source all --save compiled     # for emu2 train --compiled compiled
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and exit."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not hasattr(arguments, "gin_file") and not _are_settings(rest, arguments):
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


def _are_settings(rest: list[str], arguments: argparse.Namespace) -> bool:
    """Whether what is left over is for a command that takes --gin.PATH=VALUE without a --gin_file."""
    return arguments.command in (_generate, _chain) and all(flag.startswith("--gin.") for flag in rest)


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

    from experiments.launch import HOSTS_EPILOG, add_flags

    train = add("train", _train, "train a recipe, or go on with it")
    train.epilog = f"{TRAIN_EPILOG}\n{HOSTS_EPILOG}"
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
    add_flags(train)

    train.add_argument("--compiled", type=Path, metavar="DIR", help="use steps that `emu2 plan --save DIR` compiled")

    plan = add("plan", _plan, "compile a recipe's step for a TPU slice, on any machine, and say what it takes")
    plan.epilog = PLAN_EPILOG
    plan.add_argument("recipe", help="a name that `emu2 recipes` lists")
    plan.add_argument("--topology", required=True, metavar="NAME", help="the slice: v4-512, v5p-128, v6e-256, ...")
    plan.add_argument("--slices", type=int, default=1, metavar="N", help="equal slices, joined by the network (1)")
    plan.add_argument("--source", metavar="NAME", help="whose batch, or `all` (the one with most to compute)")
    plan.add_argument("--json", type=Path, metavar="FILE", help="write the figures, too")
    plan.add_argument("--search", action="store_true", help="try remat policies, micro-batches and meshes")
    plan.add_argument("--save", type=Path, metavar="DIR", help="keep the compiled step, for `emu2 train --compiled`")
    plan.add_argument("--hlo", type=Path, metavar="DIR", help="keep the compiled step's text")
    plan.add_argument("--gin_file", type=Path, action="append", default=[], metavar="FILE", help="override file")

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
    encode.add_argument("--epochs", type=int, metavar="N", help="with --crops: crops of the first N epochs (1)")
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
        help="run directory: holds stage2/ and decoder/, gets evaluation/; or the work directory of an image or video "
        "decoder",
    )
    evaluate.add_argument("--shards", help="of a decoder: shards of pictures to redraw, in place of the run's own")
    evaluate.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="of a decoder, or of few_shot: where to write (RUN/evaluation, RUN/evaluation/few_shot/TASK)",
    )
    evaluate.add_argument(
        "--suite",
        choices=["heldout", "in_context", "few_shot"],
        default="heldout",
        help="captions and pictures of held-out pairs, accuracy on held-out episodes, or a benchmark after examples "
        "that are retrieved for each question (heldout)",
    )
    evaluate.add_argument("--part", metavar="I/N", help="of few_shot: this process's share of the questions (1/1)")
    evaluate.add_argument("--gin_file", type=Path, action="append", default=[], metavar="FILE", help="override file")

    generate = add("generate", _generate, "continue prompts of texts, images, videos and boxes")
    generate.epilog = GENERATE_EPILOG
    generate.add_argument(
        "run", type=Path, help="run directory (holds stage2/ and, to draw, decoder/) or a work directory"
    )
    given = generate.add_mutually_exclusive_group(required=True)
    given.add_argument(
        "--prompt", nargs="+", metavar="LINK", help="texts, image and video files, boxes, in their order"
    )
    given.add_argument("--prompts", type=Path, metavar="FILE", help="prompts of a .json or .jsonl file")
    generate.add_argument(
        "--values", type=Path, metavar="FILE", help="prompts are templates: one for each row of a .csv or .jsonl file"
    )
    generate.add_argument("--image", type=Path, metavar="FILE.png", help="draw an image after the prompt, into FILE")
    generate.add_argument("--images", type=int, default=0, metavar="N", help="images that the model may draw (0)")
    generate.add_argument(
        "--force_images", type=int, default=0, metavar="N", help="images that the answer begins with in any case (0)"
    )
    generate.add_argument("--out", type=Path, metavar="DIR", help="directory for the images and answers.jsonl")
    _add_decoding(generate)

    chain = add("chain", _chain, "replace one link of a prompt by each of several, and show the answers side by side")
    chain.epilog = CHAIN_EPILOG
    chain.add_argument("run", type=Path, help="as for `emu2 generate`")
    chain.add_argument("--prompt", nargs="+", required=True, metavar="LINK", help="as for `emu2 generate`")
    chain.add_argument("--replace", type=int, required=True, metavar="N", help="number of the link that varies, from 1")
    chain.add_argument("--by", nargs="+", required=True, metavar="LINK", help="what is put in its place, one at a time")
    chain.add_argument("--draw", action="store_true", help="answer with an image, not with text")
    chain.add_argument("--out", type=Path, required=True, metavar="FILE", help="picture or .html page to write")
    _add_decoding(chain)

    reconstruct = add("reconstruct", _reconstruct, "encode images or videos and draw them again from their embeddings")
    reconstruct.add_argument(
        "run", type=Path, help="run directory (holds decoder/, and for videos video/) or a work directory"
    )
    reconstruct.add_argument("images", nargs="+", type=Path, metavar="FILE", help="images, or videos")
    reconstruct.add_argument(
        "--out",
        type=Path,
        required=True,
        help="picture to write: originals above, redrawn below; or animation (.gif, .webp, .png, .mp4): side by side",
    )

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


def _add_decoding(command: argparse.ArgumentParser) -> None:
    """How an answer is chosen, and how the model is computed."""
    command.add_argument("--max_tokens", type=int, help="longest text, tokens (48; with --image 0)")
    command.add_argument("--min_tokens", type=int, default=0, help="shortest text, tokens (0)")
    command.add_argument("--beams", type=int, metavar="N", help="beam search (release: 5)")
    command.add_argument("--length_penalty", type=float, help="with --beams: above 0 long, below 0 short answers (1)")
    command.add_argument("--temperature", type=float, help="draw tokens at random; 1 = as likely as the model says")
    command.add_argument("--top_k", type=int, metavar="K", help="draw among the K likeliest tokens")
    command.add_argument("--top_p", type=float, metavar="P", help="draw among the likeliest that together reach P")
    command.add_argument("--seed", type=int, default=0, help="of random tokens and of the decoder's noise (0)")
    command.add_argument(
        "--truncate", choices=["first", "last"], help="leave out whole links of a prompt that is too long"
    )
    command.add_argument("--video_frames", type=int, default=8, metavar="N", help="frames of a video (8)")
    command.add_argument("--decoder", type=Path, metavar="WORKDIR", help="visual decoder (RUN/decoder)")
    command.add_argument("--dtype", choices=["float32", "bfloat16"], help="of products and cache (the run's)")


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
    openmoji.add_argument(
        "--preset", choices=["tiny", "small", "motion", "minimal", "full"], default="full", help="how much of it (full)"
    )

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
    from experiments.launch import launch_settings, split

    settings = None if arguments.dry_run else launch_settings(arguments, os.environ)
    if settings is not None:
        split("host {process_id} of {num_processes}".format(**settings) if "process_id" in settings else "this host")

    from emu2_jax.hosts import Launch, connected
    from emu2_jax.train import Stopped
    from experiments.describe import describe
    from experiments.runs import resolve, run_training

    if arguments.dry_run:
        print(describe(*resolve(arguments.recipe, arguments.gin_file, rest)))
        return
    if arguments.workdir is None:
        raise ConfigError("--workdir: needed to train; --dry_run does without")
    try:
        with connected(None if settings is None else Launch(**settings)):
            config, provenance = resolve(arguments.recipe, arguments.gin_file, rest)
            run_training(
                config,
                provenance,
                arguments.workdir,
                allowed_changes=arguments.allow_config_change,
                compiled=arguments.compiled,
            )
    except Stopped as stopped:
        print(f"emu2: {stopped}", file=sys.stderr)
        sys.exit(EXIT_STOPPED)


def _plan(arguments: argparse.Namespace, rest: list[str]) -> None:
    from emu2_jax.pods import topologies

    topology = topologies.find(arguments.topology, arguments.slices)
    topologies.compile_only()  # before anything imports jax

    from experiments import plan as plan_lib
    from experiments.runs import resolve

    files = arguments.gin_file
    settings = None if files or arguments.search else plan_lib.slice_settings(arguments.recipe, topology)
    if settings is not None:
        files = [settings]
        print(f"settings: {settings}, for `emu2 train --gin_file`, too", flush=True)
    config, _ = resolve(arguments.recipe, files, rest)
    if arguments.search:
        plan_lib.run_search(config, topology, source=arguments.source, json_file=arguments.json)
    else:
        plan_lib.run(
            config,
            topology,
            source=arguments.source,
            json_file=arguments.json,
            save=arguments.save,
            hlo_dir=arguments.hlo,
        )


def _encode(arguments: argparse.Namespace, rest: list[str]) -> None:
    from emu2_jax.errors import ConfigError
    from experiments.encode import Part, encode_crops, encode_pictures, encoder_workdir
    from experiments.runs import load_config, override, resolve

    workdir, part = encoder_workdir(arguments.run), Part.parse(arguments.part)
    if arguments.crops is not None:
        if arguments.source is None or arguments.shards is not None:
            raise ConfigError("--crops: takes --source, one of the recipe's, and no --shards")
        config, _ = resolve(arguments.crops, arguments.gin_file, rest)
        epochs = 1 if arguments.epochs is None else arguments.epochs
        encode_crops(config, workdir, arguments.source, arguments.out, epochs=epochs, batch=arguments.batch, part=part)
        return
    if arguments.epochs is not None:
        raise ConfigError("--epochs: is for --crops; whole pictures are the same in every epoch")
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
    from experiments.evaluate_clips import evaluate_clips, is_video_decoder
    from experiments.runs import CONFIG, load_config, load_params, override

    if arguments.suite == "few_shot":
        _evaluate_few_shot(arguments, rest)
        return
    if arguments.part is not None:
        raise ConfigError("--part: is for --suite few_shot")
    if arguments.suite == "in_context":
        _evaluate_in_context(arguments, rest)
        return
    if is_video_decoder(arguments.run):
        for split, rows in evaluate_clips(arguments.run).items():
            for who, row in rows.items():
                print(f"{split:<8} {who:<18} " + "  ".join(f"{name} {value:.3f}" for name, value in row.items()))
        return
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


def _evaluate_in_context(arguments: argparse.Namespace, rest: list[str]) -> None:
    from experiments.evaluate import model_workdir
    from experiments.in_context import evaluate_in_context
    from experiments.runs import load_config, override

    workdir = model_workdir(arguments.run)
    config = override(load_config(workdir), arguments.gin_file, rest)
    result = evaluate_in_context(config, workdir, arguments.run)
    shots = result["shots"]
    print(f"{'accuracy, %':<18} {'prompt':<10}" + "".join(f"{f'{count} shots':>20}" for count in shots))
    for task, by_condition in result["tasks"].items():
        nearest = {"nearest": result["nearest_picture"][task]} if task in result["nearest_picture"] else {}
        for condition, cells in (by_condition | nearest).items():
            row = (cells.get(str(count)) for count in shots)
            shown = (
                "-" if cell is None else f"{cell['accuracy']:.1%} [{cell['low']:.0%}, {cell['high']:.0%}]"
                for cell in row
            )
            print(f"{task:<18} {condition:<10}" + "".join(f"{cell:>20}" for cell in shown))
    print(f"{arguments.run}/evaluation/in_context.html has the curves and episodes to read")


def _evaluate_few_shot(arguments: argparse.Namespace, rest: list[str]) -> None:
    from emu2_jax.errors import ConfigError
    from experiments.encode import Part
    from experiments.evaluate import model_workdir
    from experiments.few_shot import evaluate_few_shot, table
    from experiments.runs import load_config, override

    if arguments.shards is not None:
        raise ConfigError("--shards: is for a decoder; here evaluation.few_shot.queries and .support name the data")
    workdir = model_workdir(arguments.run)
    config = override(load_config(workdir), arguments.gin_file, rest)
    part = Part.parse(arguments.part or "1/1")
    folder, result = evaluate_few_shot(config, workdir, arguments.out, part, run=arguments.run)
    if result is None:
        print(f"{folder}: the answers of part {arguments.part} are there; those of other parts are missing")
    else:
        print(table(result))
        print(f"{folder}/index.html has the scores and questions to read")


def _generate(arguments: argparse.Namespace, rest: list[str]) -> None:
    from emu2_jax.errors import ConfigError
    from experiments.prompts import prompts_of_arguments, prompts_of_file
    from experiments.use import generate, link_reader

    if arguments.image is not None and (arguments.images or arguments.force_images or arguments.out):
        raise ConfigError("--image: draws one image into FILE; for others take --images or --force_images with --out")
    wanted = _wanted(arguments, forced=1 if arguments.image else arguments.force_images, most=arguments.images)
    reader = link_reader(arguments.run, arguments.video_frames)
    if arguments.prompts is not None:
        prompts = prompts_of_file(arguments.prompts, reader, arguments.values)
    else:
        prompts = prompts_of_arguments(arguments.prompt, reader, arguments.values)
    generate(
        arguments.run,
        prompts,
        wanted,
        image_file=arguments.image,
        out=arguments.out,
        decoder=arguments.decoder,
        settings=rest,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )


def _chain(arguments: argparse.Namespace, rest: list[str]) -> None:
    from experiments.use import link_reader, vary

    wanted = _wanted(arguments, forced=int(arguments.draw), most=0)
    reader = link_reader(arguments.run, arguments.video_frames)
    vary(
        arguments.run,
        [reader.argument(link) for link in arguments.prompt],
        arguments.prompt,
        arguments.replace,
        [reader.argument(link) for link in arguments.by],
        arguments.by,
        wanted,
        out=arguments.out,
        decoder=arguments.decoder,
        settings=rest,
        dtype=arguments.dtype,
        seed=arguments.seed,
    )


def _wanted(arguments: argparse.Namespace, *, forced: int, most: int) -> "Wanted":
    from emu2_jax.errors import ConfigError
    from emu2_jax.generation.answer import Wanted
    from emu2_jax.generation.sampling import Beams, Decoding, Greedy, Sampling

    draws = {name: getattr(arguments, name) for name in ("temperature", "top_k", "top_p")}
    draws = {name: value for name, value in draws.items() if value is not None}
    decoding: Decoding = Greedy()
    if arguments.beams is not None:
        if draws:
            raise ConfigError(f"--beams: is no random drawing; leave out --{next(iter(draws))}")
        decoding = Beams(
            num_beams=arguments.beams,
            length_penalty=1.0 if arguments.length_penalty is None else arguments.length_penalty,
        )
    elif arguments.length_penalty is not None:
        raise ConfigError("--length_penalty: is for --beams")
    elif draws:
        decoding = Sampling(seed=arguments.seed, **draws)
    one_image = forced and not most and arguments.max_tokens is None
    max_tokens = arguments.max_tokens if arguments.max_tokens is not None else 0 if one_image else 48
    if max_tokens < (0 if forced else 1):
        raise ConfigError(f"--max_tokens: got {max_tokens}, wanted at least {0 if forced else 1}")
    return Wanted(
        max_tokens=max_tokens,
        min_tokens=arguments.min_tokens,
        forced_images=forced,
        max_images=max(most, forced),
        decoding=decoding,
        truncate=arguments.truncate,
    )


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
