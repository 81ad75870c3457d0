"""From a recipe and flags to a `RunConfig`: defaults, then the recipe, then the command line."""

import copy
import shutil
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

from swamla import distributed
from swamla.checkpoint import read_run_config
from swamla.cli.flags import WIDEST, Flag
from swamla.cli.overrides import apply_flags, flags
from swamla.cli.reshape import fit_ranks, reshape
from swamla.cli.spelling import as_typed
from swamla.config import from_plain, load_file, to_plain, within
from swamla.data.config import MIXTURE, NAMES, TOKEN_IDS, DataConfig, parse_bpe
from swamla.data.sources import TOKENIZERS, is_path, located, split_kind
from swamla.data.task_rows import TaskDataset
from swamla.errors import ConfigError, UsageError, require
from swamla.interop.architecture import architecture_of
from swamla.model.block import BlockConfig
from swamla.model.language_model import LanguageModelConfig
from swamla.recipes import recipe_names, recipe_path
from swamla.tasks import PREFIX, parse
from swamla.train.config import RunConfig
from swamla.train.init_from import Origin, origin_of

# Names of tokenizers, which win over files of the same name; and (tokenizer, source) → vocabulary size.
_VOCABULARIES = {("byte", ""): 257, ("gpt2", ""): 50257, ("char", "shakespeare"): 66}


def read_recipe(recipe: str, given: Mapping[str, Any], *, new: bool = False) -> RunConfig:
    """The config of a run from a recipe (a shipped one's name, or a file) and flags `given` with their values.

    new: it is a new run, so `init_from` applies. Prints notes. Raises `UsageError` and `ConfigError`, which name the
    flag, or the file and line.
    """
    resolved = resolve(recipe, given, new=new)
    say_notes(resolved)
    return resolved.config


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A run's config, the origin of each dotted field (a flag, or a file and line), and notes to print."""

    config: RunConfig
    origin: Callable[[str], str]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Written:
    """A recipe as plain data. spare: blocks that only flags use.  begun: the origin of its initial weights, if any."""

    plain: dict[str, Any]
    place: Callable[[str], str]
    spare: dict[str, Any]
    begun: Origin | None

    @property
    def has_model(self) -> bool:
        """False for data too malformed to apply flags to; reading it as a config will report the error."""
        sections = all(isinstance(self.plain.get(name, {}), dict) for name in ("model", "data", "train"))
        blocks = self.plain.get("model", {}).get("blocks") if sections else None
        return isinstance(blocks, dict) and all(
            isinstance(b, dict) and isinstance(b.get("mixer"), dict) for b in blocks.values()
        )

    def apply(self, given: Mapping[str, Any]) -> dict[str, str]:
        """Apply flags to the plain data; returns dotted field -> flag.

        Raises `UsageError` for an unknown name in a pattern and for a flag of a kind that the model does not use.
        """
        tokenizer = self.plain.get("data", {}).get("tokenizer")
        model = self.plain["model"]
        origins = fit_ranks(model, given, self.spare) | reshape(model, given, self.spare)
        origins |= apply_flags(self.plain, given, flags())
        _fit_task(self.plain, given)
        if "vocab_size" not in given and self.plain.get("data", {}).get("tokenizer") != tokenizer:
            self.plain["model"]["vocab_size"] = 0  # the recipe's size belongs to its own tokenizer
        return origins


def _fit_task(plain: dict[str, Any], given: Mapping[str, Any]) -> None:
    """Give a run on a task the length of its rows, and names for its ids, unless flags say otherwise."""
    data, train = plain.setdefault("data", {}), plain.setdefault("train", {})
    source = data.get("source")
    if not isinstance(source, str) or not source.startswith(PREFIX):
        return
    task = parse(source)
    data["source"] = f"{PREFIX}{task}"  # every size, whatever the defaults of a later version
    if "tokenizer" not in given:
        data["tokenizer"] = NAMES
    if "block_size" not in given:
        train["block_size"] = task.length


def written(recipe: str, given: Mapping[str, Any], *, new: bool = False, unnamed: bool = False) -> Written:
    """Read a recipe as plain data. Of the flags, only those that replace its paths or its `init_from` apply here."""
    path = recipe_path(recipe)
    plain, place = load_file(path)
    if "model_type" in plain:
        return _of_transformers(plain, path, new)
    plain = copy.deepcopy(plain)
    plain.pop("format_version", None)  # a run's own config.json is a recipe too
    locate_beside(plain, path, place, given)
    begun = _begin_from(plain, path, given, unnamed) if new else None
    return Written(plain=plain, place=place, spare=_spare_blocks(plain, place), begun=begun)


def _of_transformers(plain: Mapping[str, Any], path: Path, new: bool) -> Written:
    """The model of a config.json of transformers as a recipe of token ids, to be looked at: a run has its weights."""
    if new:
        raise UsageError(f"{path}: a model of transformers: --init_from {path.parent} trains its weights on")
    model = architecture_of(plain, str(path)).language_model()
    train = {"steps": 1} | ({"block_size": model.learned_positions} if model.learned_positions else {})
    data = {"source": TOKEN_IDS, "tokenizer": f"ids:{model.vocab_size - 1}"}
    recipe = {"model": to_plain(model), "data": data, "train": train}
    return Written(plain=recipe, place=lambda field: str(path), spare={}, begun=None)


def resolve(recipe: str, given: Mapping[str, Any], *, new: bool = False, unnamed: bool = False) -> Resolved:
    """As `read_recipe`, without printing. unnamed: the user named no recipe, so the weights' model is taken."""
    said = written(recipe, given, new=new, unnamed=unnamed)
    plain, place, spare, origin_of_weights = said.plain, said.place, said.spare, said.begun
    by_flag = said.apply(given) if said.has_model else {}
    notes = []

    def origin(field: str) -> str:
        parts = field.split(".")
        of_block = field.startswith("model.blocks.")
        general = ".".join([*parts[:2], "*", *parts[3:]]) if of_block else field
        put_to_use = ".".join(["spare", *parts[2:]]) if of_block and parts[2] in spare else field
        names = (by_flag.get(name) for name in (field, general, f"{field}.kind", f"{general}.kind"))
        return next(filter(None, names), "") or place(field) or place(put_to_use)

    config = from_plain(RunConfig, plain, origin=origin)
    with within("", origin):
        _check_together(config)
    if origin_of_weights is not None:
        model = with_vocabulary(config.model, config.data, origin_of_weights.model.vocab_size)
        try:
            origin_of_weights.require_fit(model)
        except UsageError as error:
            if unnamed:
                raise
            raise UsageError(f"{error}; without a recipe the model is theirs") from None
        notes.append(f"model and tokenizer are those of {origin_of_weights.folder}, except where flags change them")
    if not _sees_order(config):
        notes.append("warning: no layer of this model sees the order of tokens: give it --learned_positions N")
    train = config.train
    if train.init_from:
        train = replace(train, init_from=str(Path(train.init_from).expanduser().resolve()))
    config = replace(config, data=located(config.data), train=train)
    return Resolved(config=config, origin=origin, notes=tuple(notes))


def begun_recipe(init_from: str) -> str:
    """The default recipe with `init_from`: the config of that run, or quickstart if it has never trained.

    Exported folders and imported runs have no settings of training: an imported run's config holds out all text.
    """
    origin = origin_of(init_from)
    if not origin.is_run or read_run_config(origin.folder)["data"].get("held_out_fraction") == 1:
        return "quickstart"
    return str(origin.folder / "config.json")


def explain_recipe(recipe: str) -> tuple[dict[str, Flag], str]:
    """For --help: all flags, with the recipe's or run's values as defaults, and the settings of its blocks."""
    recipe = recipe or "quickstart"
    run = Path(recipe) / "config.json"
    config = resolve(str(run) if run.is_file() else recipe, {}).config
    blocks = config.model.blocks.values()
    parts = [*(block.mixer for block in blocks), *(block.ffn for block in blocks), config.model.norm]
    known = flags()
    shown: dict[str, str] = {}
    for part in (*parts, config.train.optimizer):
        for field in fields(part):  # type: ignore[arg-type]
            name, value = f"{part.kind}_{field.name}", getattr(part, field.name)
            chosen = value != field.default or isinstance(value, int)  # the rest is at its default
            if name in known and (chosen or field.name == "backend"):
                shown[name] = _as_typed(value)
    width = min(WIDEST, shutil.get_terminal_size().columns - 2)
    lines = textwrap.wrap(
        "  ".join(f"--{name}\N{NO-BREAK SPACE}{value}" for name, value in shown.items()),
        width - 2,
        break_on_hyphens=False,
    )
    settings = "\n".join(f"  {line}" for line in lines).replace("\N{NO-BREAK SPACE}", " ")
    about = f"[…] is the value in {recipe}; its blocks, norm and optimizer have these (--help all explains them):"
    defaults = {name: replace(flag, default=_value_in(config, flag)) for name, flag in known.items()}
    recipes = textwrap.fill(f"Recipes: {', '.join(recipe_names())}", width, break_on_hyphens=False)
    return defaults, f"{textwrap.fill(about, width)}\n{settings}\n{recipes}"


def _value_in(config: RunConfig, flag: Flag) -> Any:
    """The config's value of a flag's field, if there is exactly one; the kind of a choice."""
    value: Any = config
    for name in flag.field.split("."):
        value = getattr(value, name, MISSING)  # MISSING: of another kind, or of several blocks
    return flag.default if value is MISSING else value


def _as_typed(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


def _begin_from(plain: dict[str, Any], recipe: Path, given: Mapping[str, Any], unnamed: bool) -> Origin | None:
    """The origin of a run's initial weights, if the recipe or a flag names one. Its tokenizer replaces the recipe's.

    Its model replaces the recipe's if that has none or is `unnamed`; otherwise the two will be compared.
    """
    train = plain.get("train")
    if not isinstance(train, dict):
        return None  # malformed: reading it as a config will report it
    said = {name: train.get(name) for name in ("init_from", "init_checkpoint") if train.get(name)}
    said |= {name: given[name] for name in ("init_from", "init_checkpoint") if name in given}
    if not said.get("init_from"):
        return None
    where, which = str(said["init_from"]), str(said.get("init_checkpoint", "best"))
    if "init_from" not in given:
        where = train["init_from"] = str(recipe.resolve().parent / Path(where).expanduser())
    origin = origin_of(where, which)
    if recipe.resolve() == origin.folder / "config.json":
        for name in ("init_from", "init_checkpoint", "hf_repo_id", "wandb_run_name"):  # belong to that run only
            train.pop(name, None)
    if unnamed or not plain.get("model"):
        plain["model"] = to_plain(origin.model)
    elif isinstance(plain["model"], dict):
        plain["model"]["vocab_size"] = plain["model"].get("vocab_size") or origin.model.vocab_size
    if origin.tokenizer is not None:
        plain.setdefault("data", {})["tokenizer"] = str(origin.tokenizer)
    return origin


def say_notes(resolved: Resolved) -> None:
    """Print the notes, one line each, on the main rank's stderr."""
    for note in resolved.notes if distributed.is_main() else ():
        print(f"swamla: {as_typed(note)}", file=sys.stderr)


def _sees_order(config: RunConfig) -> bool:
    """False for a model of order-blind attention alone, without learned positions."""
    return config.model.learned_positions > 0 or any(block.sees_order for block in config.model.blocks.values())


def with_vocabulary(model: LanguageModelConfig, data: DataConfig, otherwise: int = 0) -> LanguageModelConfig:
    """The model with its tokenizer's vocabulary, as far as that is known without reading data.

    otherwise: the size if it is not known; without it raises `UsageError`.
    """
    if model.vocab_size:
        return model
    if data.task is not None:
        return replace(model, vocab_size=TaskDataset(data.task).tokenizer.vocab_size)
    bpe = parse_bpe(data.tokenizer)
    known = _VOCABULARIES.get((data.tokenizer, ""), 0) or _VOCABULARIES.get((data.tokenizer, data.source), 0)
    size = bpe[0] if bpe else known or otherwise
    if not size:
        raise UsageError(f"the vocabulary of the tokenizer {data.tokenizer!r} depends on the data: add --vocab_size N")
    return replace(model, vocab_size=size)


def _spare_blocks(plain: dict[str, Any], place: Callable[[str], str]) -> dict[str, Any]:
    """Remove the tables [spare.NAME] from a recipe and check them: blocks that flags may add to the pattern."""
    spare = plain.pop("spare", {})
    if not isinstance(spare, dict):
        raise ConfigError("spare", spare, "must be a table of blocks, e.g. [spare.gdn.mixer]", place("spare"))
    for name, block in spare.items():
        from_plain(BlockConfig, block, path=f"spare.{name}", origin=place)
    return spare


def locate_beside(
    plain: dict[str, Any], recipe: Path, place: Callable[[str], str], given: Collection[str] = ()
) -> None:
    """Make the paths in a recipe absolute: they are relative to the recipe's folder, not to the working directory.

    given: flags, whose fields are left unchanged. Raises `UsageError` for a path that exists relative to the working
    directory only: the recipe means another file, or is older than this rule.
    """
    data = plain.get("data")
    if not isinstance(data, dict):
        return  # malformed: reading it as a config will report it
    mixture = data.get("mixture")
    parts = [part for part in mixture if isinstance(part, dict)] if isinstance(mixture, list) else []
    tables = [] if "data" in given or "source" in given else [(table, "source") for table in (data, *parts)]
    for table, name in (*tables, *((data, name) for name in ("tokenizer", "cache_dir") if name not in given)):
        value = table.get(name)
        if not isinstance(value, str) or "\0" in value or value in ("", MIXTURE, *TOKENIZERS):
            continue
        if name == "source" and not is_path(value):
            continue
        kind, path = split_kind(value, "gpt2:" if name == "tokenizer" else "files:")
        beside = recipe.resolve().parent / Path(path).expanduser()
        if beside.exists() or name == "cache_dir":
            table[name] = kind + str(beside.resolve())
        elif Path(path).exists():
            field = f"data.{name}" if table is data else "data.mixture.source"
            raise UsageError(
                f"{field} = {value!r} ({place(field) or recipe}): paths in a recipe are relative to it, and there is "
                f"no {beside}: write the path relative to the recipe"
            )


def _check_together(config: RunConfig) -> None:
    """Checks that involve several sections of the config."""
    positions, block_size = config.model.learned_positions, config.train.block_size
    fits = not positions or block_size <= positions
    require(fits, "train.block_size", block_size, f"must not exceed model.learned_positions = {positions}")
