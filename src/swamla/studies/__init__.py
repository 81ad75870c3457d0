"""The studies shipped with the package: what `swamla compare` reads, TOML files, data only."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def study_names() -> list[str]:
    """Names of the shipped studies."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def study_path(name: str) -> Path:
    """The file of a shipped study."""
    return _FOLDER / f"{name}.toml"
