"""The recipes shipped with the package: TOML files, data only."""

from pathlib import Path

from swamla.config import did_you_mean
from swamla.errors import UsageError

_FOLDER = Path(__file__).parent
ALIASES = {"medium": "base"}


def recipe_names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def is_recipe(word: str) -> bool:
    """Whether a word of a command line names a recipe or a run's folder: a shipped recipe, or a path."""
    return word in (*recipe_names(), *ALIASES) or word.endswith((".toml", ".json")) or Path(word).exists()


def recipe_path(recipe: str) -> Path:
    """The file of a shipped recipe, or the user's .toml or .json file. Raises `UsageError` for anything else."""
    recipe = ALIASES.get(recipe, recipe)
    shipped = _FOLDER / f"{recipe}.toml"
    if recipe in recipe_names():
        return shipped
    path = Path(recipe)
    if path.suffix in (".toml", ".json") and path.is_file():
        return path
    missing = "no such file" if path.suffix or len(path.parts) > 1 else "no recipe of that name"
    raise UsageError(
        f"{recipe}: {missing}; {did_you_mean(recipe, [*recipe_names(), *ALIASES])} (or give a .toml or .json file)"
    )
