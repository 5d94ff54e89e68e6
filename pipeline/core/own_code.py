"""Code of the user's own that a config names: `package.module:callable` or `path/to/file.py:callable`."""

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from pipeline.core.errors import (
    CodeError,
    ConfigError,
    PipelineError,
    explained,
    first_line,
    require_file,
    system_refusal,
)

# How the names of modules begin that are files of the user's own.
OWN = "_fgsm_own_"


def names_file(name: str) -> bool:
    """Whether a name is `path/to/file.py:callable` rather than a module's."""
    return name.rpartition(":")[0].endswith(".py")


def import_own(name: str, key: str) -> Callable[..., Any]:
    """Import the callable that a name names; `key`, of the config, is for messages. This runs the user's code.

    Raises:
        ConfigError: there is no such file or module, it fails on import, or it has no such callable.
    """
    where, _, attribute = name.rpartition(":")
    with explained(f"{key}: {where} cannot be imported", kind=ConfigError):  # the user's module runs on import
        if names_file(name):
            module = _import_file(Path(where).expanduser(), key)
        else:
            # As with `python -m`: a module in the working folder counts, which a console script's path lacks.
            if str(Path.cwd()) not in sys.path:
                sys.path.append(str(Path.cwd()))
            module = importlib.import_module(where)
    found: Callable[..., Any] | None = getattr(module, attribute, None)
    if not callable(found):
        raise ConfigError(f"{key}: {where} has no callable {attribute}.")
    return found


def _import_file(path: Path, key: str) -> ModuleType:
    require_file(path, key)  # though it was imported before
    name = f"{OWN}{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None  # as with any name that ends in .py
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def forget_files() -> None:
    """Import files of the user's own anew the next time, as they may be changed by then."""
    for name in [name for name in sys.modules if name.startswith(OWN)]:
        del sys.modules[name]


def own_files(name: str, found: Callable[..., Any]) -> list[Path]:
    """The file that `name` names, and the one that defines `found`, which `import_own` returned for it: one or two
    absolute paths, in the order of the files' names."""
    where = name.rpartition(":")[0]
    named = where if names_file(name) else sys.modules[where].__file__
    files = {Path(file).expanduser().resolve() for file in (named, source_file(found)) if file}
    return sorted(files, key=lambda file: file.name)


def source_file(found: Callable[..., Any]) -> str | None:
    """The file that a function or a class is written in; None of a partial or an instance, which is written nowhere."""
    try:
        return inspect.getsourcefile(inspect.unwrap(found))
    except TypeError:
        return None


@contextlib.contextmanager
def naming_failure(key: str, files: Collection[str | None]) -> Iterator[None]:
    """Turn what the code of a model or of an attack raises into one sentence that says where.

    Memory that is too small and what the system refuses pass: they have sentences of their own.

    Args:
        key: of the config, which the sentence begins with, such as `attack.kind`.
        files: of the code. The line that is named is the last one in them; where none of them is on the way, as in a
            model of a library, the line that raised.

    Raises:
        CodeError: "attack.kind: steps.py fails in line 3: RuntimeError: no such thing".
    """
    try:
        yield
    except Exception as error:
        import torch  # whoever runs such code has imported it

        if isinstance(error, PipelineError | torch.OutOfMemoryError) or system_refusal(error):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        frame = next((frame for frame in reversed(frames) if frame.filename in files), frames[-1])
        raise CodeError(
            f"{key}: {frame.filename} fails in line {frame.lineno}: {type(error).__name__}: {first_line(error)}"
        ) from error
