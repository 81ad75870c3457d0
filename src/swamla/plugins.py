"""Plugins: Python files outside the package that register mixers, FFNs, norms, optimizers or sources."""

import hashlib
import sys
import traceback
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from swamla.errors import UsageError

_PREFIX = "swamla_plugin_"


def load_plugin(path: str | Path) -> ModuleType:
    """The module of a Python file, imported at most once per process, whichever path names it.

    The file runs with all permissions of this process: load only files that you would run. Raises `UsageError`, with
    file and line, for a file that is missing, is not Python, or raises.
    """
    path = Path(path)
    try:
        source, resolved = path.read_text(encoding="utf-8"), path.resolve()
    except (OSError, ValueError) as error:  # ValueError: NUL in the path, or bytes that are not UTF-8
        raise UsageError(f"plugin {path}: cannot be read: {_reason(error)}") from error
    if path.suffix != ".py":
        raise UsageError(f"plugin {path}: must be a Python file, e.g. toy_mixer.py")
    name = f"{_PREFIX}{hashlib.sha256(str(resolved).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    try:
        code = compile(source, str(resolved), "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise UsageError(
            f"plugin {path}:{getattr(error, 'lineno', None) or 1}: not Python: {_reason(error)}"
        ) from error
    spec = spec_from_file_location(name, resolved)
    assert spec is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # before it runs, because dataclasses look up their module
    try:
        exec(code, vars(module))  # not by the loader, which would write a __pycache__ beside the file
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        frames = traceback.extract_tb(error.__traceback__)
        line = next((frame.lineno for frame in reversed(frames) if frame.filename == str(resolved)), 1)
        message = f"{type(error).__name__}: {_reason(error)}"
        raise UsageError(f"plugin {path}:{line}: {message}") from error
    except BaseException:
        del sys.modules[name]
        raise
    return module


def plugin_file(cls: type) -> Path | None:
    """The file from which `load_plugin` imported a class; None for classes of importable modules.

    A process that unpickles an object of the class has to load this file first.
    """
    return Path(vars(sys.modules[cls.__module__])["__file__"]) if cls.__module__.startswith(_PREFIX) else None


def _reason(error: BaseException) -> str:
    """The error's message on one line."""
    message = error.strerror if isinstance(error, OSError) else error.msg if isinstance(error, SyntaxError) else None
    return " ".join((message or str(error)).split()) or type(error).__name__
