"""Gin-style overrides: what is read, what is refused and how, who wins, and what a run writes down."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu2_jax import config as emu2_config
from emu2_jax import overrides
from emu2_jax.errors import ConfigError
from emu2_jax.overrides import ABSENT, Origin, Override


@dataclass(frozen=True, kw_only=True)
class Shard:
    name: str
    kind: Literal["pairs", "text"] = "pairs"
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Fit:
    rate: float = 0.5
    clip: float | None = 5.0
    steps: int = 10
    block: int | None = None
    fast: bool = False
    schedule: Literal["cosine", "none"] = "cosine"
    frozen: tuple[Literal["head", "body"], ...] = ()
    widths: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    title: str = "demo"
    start: str | None = None
    fit: Fit = field(default_factory=Fit)
    shards: tuple[Shard, ...] = (Shard(name="a-1"), Shard(name="b", weight=2.0))
    empty: tuple[Shard, ...] = ()


EXPERIMENT = emu2_config.ExperimentConfig(
    name="test",
    data=emu2_config.DataConfig(
        sources=(
            emu2_config.SourceConfig(name="pairs", kind="image_text", shards="data/pairs-{000000..000007}.tar"),
            emu2_config.SourceConfig(name="prose", kind="text", shards="data/prose-*.tar", weight=0.25),
        )
    ),
)


def after(line: str, recipe: Recipe | None = None) -> Recipe:
    """The recipe with one line in force."""
    return overrides.apply(recipe or Recipe(), overrides.parse_text(line, "x.gin"))[0]


def refusal(line: str) -> str:
    with pytest.raises(ConfigError) as caught:
        after(line)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# What is read ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "path", "value"),
    [
        ("fit.rate = 3e-5", "fit.rate", 3e-5),
        ("fit.rate=3", "fit.rate", 3.0),
        ("  fit.rate\t= 1_0.5  # why", "fit.rate", 10.5),
        ("fit.rate = -1", "fit.rate", -1.0),
        ("fit.clip = None", "fit.clip", None),
        ("fit.clip = 1", "fit.clip", 1.0),
        ("fit.steps = 1e3", "fit.steps", 1000),
        ("fit.steps = 7", "fit.steps", 7),
        ("fit.block = 2e3", "fit.block", 2000),
        ("fit.fast = True", "fit.fast", True),
        ("fit.schedule = none", "fit.schedule", "none"),
        ("fit.schedule = 'none'", "fit.schedule", "none"),
        ("fit.frozen = ('head', 'body')", "fit.frozen", ("head", "body")),
        ("fit.frozen = (head, body)", "fit.frozen", ("head", "body")),
        ("fit.frozen = [body]", "fit.frozen", ("body",)),
        ("fit.frozen = head,", "fit.frozen", ("head",)),
        ("fit.frozen = ()", "fit.frozen", ()),
        ("fit.widths = [4, 1e1]", "fit.widths", (4, 10)),
        ("title = a run", "title", "a run"),
        ("title = 3", "title", "3"),
        ("title = 3e-5", "title", "3e-5"),
        ("title = True", "title", "True"),
        ("title = (1, 2)", "title", "(1, 2)"),
        ("title = '3'", "title", "3"),
        ("title = 'None'", "title", "None"),
        ("title = ''", "title", ""),
        ("title = ﬁt", "title", "ﬁt"),  # Python would normalise this name
        ("title = data/x-{000000..000007}.tar", "title", "data/x-{000000..000007}.tar"),
        ("title = a=b  # c", "title", "a=b"),
        ("title = 'a # b'  # it's", "title", "a # b"),
        ('title = "it\'s # 1"', "title", "it's # 1"),
        (r"title = 'a\'# b' # c", "title", "a'# b"),
        ("start = None", "start", None),
        ("start = 'None'", "start", "None"),
        ("start = 7", "start", "7"),
        ("shards.a-1.weight = 4", "shards.a-1.weight", 4.0),
        ("shards.b.kind = text", "shards.b.kind", "text"),
    ],
)
def test_line_sets_exactly_one_leaf(line: str, path: str, value: object) -> None:
    before, now = overrides.leaves(Recipe()), overrides.leaves(after(line))
    assert now[path].value == value
    assert type(now[path].value) is type(value)
    assert {p for p in now if now[p].value != before[p].value} <= {path}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fit.rte = 1", "fit.rte (x.gin:1): unknown path; nearest: fit.rate; fields of fit: rate, clip, steps, block,"),
        (
            "ftt.rate = 1",
            "ftt.rate (x.gin:1): unknown path; nearest: fit.rate; fields of the config: title, start, fit",
        ),
        ("train/fit.rate = 1", "train/fit.rate (x.gin:1): unknown path; nearest: fit.rate; "),
        ("rate = 1", "rate (x.gin:1): unknown path; nearest: fit.rate; "),
        ("qqq = 1", "qqq (x.gin:1): unknown path; fields of the config: title, start, fit, shards, empty"),
        ("fit.rate.x = 1", "fit.rate.x (x.gin:1): unknown path; nearest: fit.rate; fields of fit: "),
        ("shards.c.kind = text", "unknown path; nearest: shards.b.kind or shards.a-1.kind; fields of shards: a-1, b"),
        (
            "shards.b.name = c",
            "shards.b.name (x.gin:1): unknown path; nearest: shards.b.kind; fields of shards.b: kind, ",
        ),
        ("empty.b.kind = text", "fields of empty: none"),
        ("fit = 1", "fit (x.gin:1): is a section and takes no value; fields of fit: rate, clip, "),
        ("shards = (b,)", "shards (x.gin:1): is a section and takes no value; fields of shards: a-1, b"),
        ("empty = ()", "empty (x.gin:1): is a section and takes no value; fields of empty: none"),
        ("fit.rate = '3e-5'", "fit.rate (x.gin:1): wanted a number, got '3e-5'"),
        ("fit.rate = adam", "fit.rate (x.gin:1): wanted a number, got adam"),
        ("fit.rate = None", "fit.rate (x.gin:1): wanted a number, got None"),
        ("fit.rate = True", "fit.rate (x.gin:1): wanted a number, got True"),
        ("fit.rate = nan", "fit.rate (x.gin:1): wanted a number, got nan"),
        ("fit.rate = 1e999", "fit.rate (x.gin:1): wanted a finite number, got 1e999"),
        (f"fit.rate = 1{400 * '0'}", "fit.rate (x.gin:1): wanted a number, got 1000"),
        ("fit.rate = 1 + 1", "fit.rate (x.gin:1): wanted a number, got 1 + 1"),
        ("fit.clip = off", "fit.clip (x.gin:1): wanted a number, or None, got off"),
        ("fit.steps = 10.5", "fit.steps (x.gin:1): wanted an integer, got 10.5"),
        ("fit.steps = '10'", "fit.steps (x.gin:1): wanted an integer, got '10'"),
        ("fit.steps = True", "fit.steps (x.gin:1): wanted an integer, got True"),
        ("fit.block = 10.5", "fit.block (x.gin:1): wanted an integer, or None, got 10.5"),
        ("fit.fast = 1", "fit.fast (x.gin:1): wanted True or False, got 1"),
        ("fit.fast = true", "fit.fast (x.gin:1): wanted True or False, got true"),
        ("fit.schedule = cosin", "fit.schedule (x.gin:1): wanted 'cosine' or 'none', got cosin"),
        ("fit.schedule = None", "fit.schedule (x.gin:1): wanted 'cosine' or 'none', got None"),
        ("fit.frozen = head", "fit.frozen (x.gin:1): wanted a tuple, such as (a, b) or (a,), got head"),
        ("fit.frozen = (head, tail)", "fit.frozen (x.gin:1): index 1: wanted 'head' or 'body', got (head, tail)"),
        ("fit.widths = (1, 2.5)", "fit.widths (x.gin:1): index 1: wanted an integer, got (1, 2.5)"),
        ("fit.widths = (1, 2", "fit.widths (x.gin:1): wanted a tuple, such as (a, b) or (a,), got (1, 2"),
        ("title = None", "title (x.gin:1): wanted a string, got None"),
        ("title = 'a # b", "title (x.gin:1): 'a # b is not a Python literal; quote the whole string, or nothing of it"),
        ("title = it's", "title (x.gin:1): it's is not a Python literal"),
        (r"title = '\d'", r"title (x.gin:1): '\d' is not a Python literal"),
        ("title =  # nothing", "title (x.gin:1): no value; an empty string is written ''"),
        ("= 3", "x.gin:1: no path before the equals sign; wanted `path = value`"),
        ("fit.rate 3", "x.gin:1: 'fit.rate 3': wanted `path = value` or `include \"file.gin\"`"),
        ("include base.gin", "x.gin:1: 'include base.gin': wanted `path = value` or `include \"file.gin\"`"),
        ("include 'base.gin'", "x.gin:1: include: only a file can include another"),
        (
            "fit.rate = 1\n\nfit.rate = 2",
            "fit.rate (x.gin:3): set twice in one source: first to 1 (x.gin:1), then to 2",
        ),
    ],
)
def test_line_is_refused_in_one_line_naming_path_origin_and_what_was_wanted(line: str, message: str) -> None:
    assert message in refusal(line)


def test_an_override_that_loses_is_checked_too() -> None:
    lines = [Override("fit.steps", "10.5", "a.gin:1"), Override("fit.steps", "10", "b.gin:1")]
    with pytest.raises(ConfigError, match=re.escape("fit.steps (a.gin:1): wanted an integer, got 10.5")):
        overrides.apply(Recipe(), lines)


def test_the_recipe_itself_is_left_as_it_was() -> None:
    recipe = Recipe()
    assert after("shards.b.weight = 9", recipe).shards == (Shard(name="a-1"), Shard(name="b", weight=9.0))
    assert recipe == Recipe()


@pytest.mark.parametrize(
    ("names", "message"),
    [(("a", "a"), "shards: two members are named 'a'"), (("a.b",), "shards: name 'a.b': wanted letters, digits")],
)
def test_members_must_have_names_that_a_path_can_hold(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        overrides.leaves(Recipe(shards=tuple(Shard(name=name) for name in names)))


# Sources and who wins -------------------------------------------------------------------------------------------------


def test_flags_win_over_later_files_over_earlier_files_over_the_recipe(tmp_path: Path) -> None:
    first = write(tmp_path / "first.gin", "fit.rate = 1\nfit.steps = 1\nfit.clip = 1\n")
    second = write(tmp_path / "second.gin", "# ablation\n\nfit.steps = 2\nfit.clip = 2\n")
    config, provenance = overrides.apply(Recipe(), overrides.read_sources([first, second], ["--gin.fit.clip=3"]))
    assert config.fit == Fit(rate=1.0, steps=2, clip=3.0)
    assert provenance == {
        "fit.rate": Origin(f"{first}:1", 0.5),
        "fit.steps": Origin(f"{second}:3", 10),
        "fit.clip": Origin("--gin flag", 5.0),
    }


def test_included_file_comes_before_the_file_that_includes_it(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    write(tmp_path / "base" / "deep.gin", "fit.rate = 1\nfit.steps = 1\nfit.clip = 1")
    write(tmp_path / "base" / "base.gin", "include 'deep.gin'\nfit.steps = 2\nfit.clip = 2")
    top = write(tmp_path / "top.gin", '# first\ninclude "base/base.gin"  # relative to this file\nfit.clip = 3')
    config, provenance = overrides.apply(Recipe(), overrides.parse_file(top))
    assert config.fit == Fit(rate=1.0, steps=2, clip=3.0)
    assert provenance["fit.rate"].source == f"{tmp_path}/base/deep.gin:1"


def test_a_file_included_twice_is_read_once(tmp_path: Path) -> None:
    write(tmp_path / "base.gin", "fit.rate = 1")
    write(tmp_path / "left.gin", "include 'base.gin'\nfit.rate = 2")
    write(tmp_path / "right.gin", "include 'base.gin'\nfit.steps = 3")
    top = write(tmp_path / "top.gin", "include 'left.gin'\ninclude 'right.gin'")
    assert [o.text for o in overrides.parse_file(top)] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("include 'x.gin'", "x.gin (included at {x}:1): include cycle: x.gin -> x.gin"),
        ("\ninclude 'y.gin'", "x.gin (included at {y}:1): include cycle: x.gin -> y.gin -> x.gin"),
        ("include 'no.gin'", "no.gin (included at {x}:1): cannot be read: No such file or directory"),
        ("fit.rate = 1\ninclude 'y.gin'", "{x}:2: include must come before the first `path = value` line"),
    ],
)
def test_include_is_refused(tmp_path: Path, text: str, message: str) -> None:
    y = write(tmp_path / "y.gin", "include 'x.gin'")
    x = write(tmp_path / "x.gin", text)
    with pytest.raises(ConfigError, match=re.escape(message.format(x=x, y=y))):
        overrides.parse_file(x)


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gin").write_bytes(b"title = \xff")
    with pytest.raises(ConfigError, match=r"x\.gin: cannot be read: 'utf-8' codec"):
        overrides.parse_file(tmp_path / "x.gin")


def test_flags_are_one_source_and_keep_their_text() -> None:
    flags = ["--gin.title=a#b=c", "--gin.fit.frozen=head,body"]
    assert overrides.parse_flags(flags) == [
        Override("title", "a#b=c", "--gin flag"),
        Override("fit.frozen", "head,body", "--gin flag"),
    ]
    with pytest.raises(ConfigError, match=re.escape("title (--gin flag): set twice in one source: first to a")):
        overrides.parse_flags(["--gin.title=a", "--gin.title=a"])


@pytest.mark.parametrize("flag", ["--gin.title", "--gn.title=3", "title=3", "--gin_title=3", "3"])
def test_what_is_no_override_flag_is_refused(flag: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(flag)}: unknown flag; wanted --gin.PATH=VALUE$"):
        overrides.parse_flags([flag])


# The operative config -------------------------------------------------------------------------------------------------


def test_operative_config_says_who_set_what() -> None:
    lines = "fit.rate = 0.25\nfit.steps = 10\ntitle = 'a # \"b\"'"
    text = overrides.dump(*overrides.apply(Recipe(), overrides.parse_text(lines, "x.gin")))
    header, versions, *body = text.splitlines()
    assert re.fullmatch(r"# Operative config of emu2_jax \S+, python \d+\.\d+\.\d+", header)
    assert re.fullmatch(r"# jax \S+, flax \S+, optax \S+, orbax-checkpoint \S+, grain \S+, numpy \S+", versions)
    assert body == [
        "",
        "title = 'a # \"b\"'  # x.gin:3 (recipe: 'demo')",
        "",
        "start = None  # recipe",
        "",
        "fit.rate = 0.25  # x.gin:1 (recipe: 0.5)",
        "fit.clip = 5.0  # recipe",
        "fit.steps = 10  # x.gin:2",
        "fit.block = None  # recipe",
        "fit.fast = False  # recipe",
        "fit.schedule = 'cosine'  # recipe",
        "fit.frozen = ()  # recipe",
        "fit.widths = (1, 2)  # recipe",
        "",
        "shards.a-1.kind = 'pairs'  # recipe",
        "shards.a-1.weight = 1.0  # recipe",
        "shards.b.kind = 'pairs'  # recipe",
        "shards.b.weight = 2.0  # recipe",
    ]


@settings(deadline=None, derandomize=True, database=None)
@given(title=st.text(), start=st.none() | st.text(), rate=st.floats(allow_nan=False, allow_infinity=False))
def test_operative_config_is_read_back_exactly(title: str, start: str | None, rate: float) -> None:
    config = Recipe(title=title, start=start, fit=Fit(rate=rate, frozen=("body",), widths=(7,)))
    text = overrides.dump(config, {})
    assert overrides.apply(Recipe(), overrides.parse_text(text, "saved"))[0] == config
    assert overrides.load(text) == {path: leaf.value for path, leaf in overrides.leaves(config).items()}


def test_operative_config_of_an_experiment_is_read_back() -> None:
    flags = [
        "--gin.data.sources.pairs.weight=3",
        "--gin.optimizer.frozen=visual_encoder,unet",
        "--gin.train.init_from=runs/stage1",
        "--gin.objective.vocab_block_positions=None",
        "--gin.decoder.unet.num_attention_heads=(1, 2, 4)",
    ]
    config, provenance = overrides.apply(EXPERIMENT, overrides.parse_flags(flags))
    again, _ = overrides.apply(EXPERIMENT, overrides.parse_text(overrides.dump(config, provenance), "saved"))
    assert again == config != EXPERIMENT
    assert {path for path, *_ in overrides.diff(EXPERIMENT, again)} == {flag[6:].split("=")[0] for flag in flags}


def test_every_leaf_of_the_experiment_is_addressed_once_and_set_by_its_own_value() -> None:
    for path, leaf in overrides.leaves(EXPERIMENT).items():
        config, _ = overrides.apply(EXPERIMENT, [Override(path, repr(leaf.value), "x.gin:1")])
        assert config == EXPERIMENT


def test_diff_names_leaves_members_and_their_order() -> None:
    one, other, third = Shard(name="one"), Shard(name="other"), Shard(name="third", kind="text")
    left, right = Recipe(shards=(one, other)), Recipe(shards=(one, third), start="x")
    assert overrides.diff(left, left) == []
    assert overrides.diff(left, right) == [
        ("start", None, "x"),
        ("shards.third.kind", ABSENT, "text"),
        ("shards.third.weight", ABSENT, 1.0),
        ("shards.other.kind", "pairs", ABSENT),
        ("shards.other.weight", 1.0, ABSENT),
    ]
    swapped = Recipe(shards=(other, one))
    assert overrides.diff(left, swapped) == [("shards", ("one", "other"), ("other", "one"))]


def test_format_diff_shows_what_differs_from_the_recipe() -> None:
    lines = "fit.rate = 0.25\nfit.steps = 10\nshards.b.kind = text"
    table = overrides.format_diff(*overrides.apply(Recipe(), overrides.parse_text(lines, "x.gin")))
    assert table.splitlines() == [
        "path           recipe   now     set by",
        "fit.rate       0.5      0.25    x.gin:1",
        "shards.b.kind  'pairs'  'text'  x.gin:3",
    ]
    assert overrides.format_diff(Recipe(), {}) == "no differences from the recipe\n"


# Comparison with what an earlier run saved ----------------------------------------------------------------------------


def saved(directory: Path, config: Recipe) -> Path:
    return write(directory / "config.gin", overrides.dump(config, {}))


def test_equal_config_goes_on(tmp_path: Path) -> None:
    overrides.compare_with_saved(Recipe(), saved(tmp_path, Recipe()))


def test_differing_leaf_stops_the_run_with_the_next_step(tmp_path: Path) -> None:
    path = saved(tmp_path, Recipe())
    with pytest.raises(ConfigError) as caught:
        overrides.compare_with_saved(after("fit.rate = 1"), path)
    assert str(caught.value) == (
        f"{path}: saved by a run of another config (saved -> now): fit.rate: 0.5 -> 1.0. "
        "Take another work directory, or go on regardless with --allow_config_change=fit.rate"
    )


@pytest.mark.parametrize("allowed", [["fit.rate", "fit.steps"], ["fit"], ["fit", "title"]])
def test_differences_allowed_by_leaf_or_section_go_on(tmp_path: Path, allowed: list[str]) -> None:
    overrides.compare_with_saved(after("fit.rate = 1\nfit.steps = 2"), saved(tmp_path, Recipe()), allowed)


@pytest.mark.parametrize("allowed", [["fit.steps"], ["shards"], []])
def test_difference_that_is_not_allowed_stops_the_run(tmp_path: Path, allowed: list[str]) -> None:
    with pytest.raises(ConfigError, match=re.escape("fit.rate: 0.5 -> 1.0")):
        overrides.compare_with_saved(after("fit.rate = 1\nfit.steps = 2"), saved(tmp_path, Recipe()), allowed)


def test_mistyped_permission_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("fit.rte (--allow_config_change): unknown path; nearest: fit.ra")):
        overrides.compare_with_saved(Recipe(), saved(tmp_path, Recipe()), ["fit.rte"])


def test_saved_config_of_another_version_is_a_difference(tmp_path: Path) -> None:
    path = saved(tmp_path, Recipe())
    text = path.read_text().replace("fit.rate = 0.5", "fit.pace = 0.5")
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        overrides.compare_with_saved(Recipe(), path)
    assert "fit.rate: not in the saved config -> 0.5; fit.pace: 0.5 -> no such leaf in this config. " in str(
        caught.value
    )
    overrides.compare_with_saved(Recipe(), path, ["fit.pace", "fit.rate"])


def test_many_differences_are_counted(tmp_path: Path) -> None:
    now = Recipe(title="x", fit=Fit(rate=1, clip=1, steps=1, block=1, fast=True, schedule="none", frozen=("head",)))
    with pytest.raises(ConfigError) as caught:
        overrides.compare_with_saved(now, saved(tmp_path, Recipe()))
    assert "fit.fast: False -> True; and 2 more. " in str(caught.value)
    assert str(caught.value).endswith("--allow_config_change=PATH for each (leaf or section)")


def test_members_in_another_order_are_a_difference(tmp_path: Path) -> None:
    now = dataclasses.replace(Recipe(), shards=Recipe().shards[::-1])
    with pytest.raises(ConfigError, match=re.escape("shards: ('a-1', 'b') -> ('b', 'a-1')")):
        overrides.compare_with_saved(now, saved(tmp_path, Recipe()))
    overrides.compare_with_saved(now, saved(tmp_path, Recipe()), ["shards"])


def test_missing_saved_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.gin: cannot be read: No such file"):
        overrides.compare_with_saved(Recipe(), tmp_path / "config.gin")
