"""The files that travel with a job: the study file, and what it names relative to itself."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from peftsearch.spec import DataSpec, StudyError, StudyFile, model_location

SHIPPED_BYTES = 200 * 2**20
"""What may travel with a job: Ray keeps it in the memory of the cluster's head, and takes no more than 512 MB."""

_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)


def shipped_files(file: StudyFile) -> tuple[Path, list[str]]:
    """The study file, and the files and folders of files that it names relative to itself.

    Returns:
        A folder that holds them all, and their paths below it, the study file's first.

    Raises:
        StudyError: One of them is missing, or they are too large together.
    """
    folder = file.folder
    own = folder / file.where
    named = [own]
    for reference, loc in _references(file):
        path = Path(reference)
        if path.is_absolute() or reference.startswith("~"):
            continue
        path = Path(os.path.normpath(folder / path))
        if not os.path.exists(path):
            raise StudyError(
                file.explain(
                    StudyError(f"no file or folder {reference!r} (looked for {str(path)!r}): check the path", loc)
                )
            )
        named.append(path)
    root = Path(os.path.commonpath([str(path if path.is_dir() else path.parent) for path in named]))
    files: dict[str, int] = {}
    for path in named:
        for item in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if item.is_file():
                files.setdefault(item.relative_to(root).as_posix(), item.stat().st_size)
    total = sum(files.values())
    if total > SHIPPED_BYTES:
        largest = max(files, key=lambda name: files[name])
        raise StudyError(
            f"{file.where} names {total / 2**20:.0f} MiB of files relative to itself (the largest: {largest}), and at "
            f"most {SHIPPED_BYTES / 2**20:.0f} MiB travel with a job: put them where the cluster's machines read them, "
            "and name them by absolute path"
        )
    return root, list(files)


def pack(root: Path, names: Sequence[str], package: Path) -> None:
    """Write the files into an archive that depends on nothing but their names and contents, so that Ray, which knows
    archives by their digest, keeps one of each. Given a folder, Ray would leave out what a .gitignore in it names."""
    try:
        with zipfile.ZipFile(package, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            for name in names:
                # Readable for everybody: Ray restores what stands here.
                entry = zipfile.ZipInfo(name, _ZIP_EPOCH)
                entry.external_attr = 0o644 << 16
                entry.compress_type = zipfile.ZIP_DEFLATED
                with (root / name).open("rb") as source, archive.open(entry, "w", force_zip64=True) as target:
                    while block := source.read(2**20):
                        target.write(block)
    except OSError as error:
        raise StudyError(f"cannot read {error.filename or root}: {error.strerror or error}") from None


def _references(file: StudyFile) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    """Every path in a study that may be a local one, with its place."""
    for number, model in enumerate(file.spec.models):
        loc: tuple[str | int, ...] = ("models", number, "path") if ("models",) in file.lines else ("model",)
        try:
            location = model_location(model.path, file.folder)
        except StudyError as error:
            if Path(model.path).is_absolute() or model.path.startswith(("~", "package:")):
                continue
            raise StudyError(file.explain(StudyError(error.message, loc))) from None
        if Path(location).is_absolute() and not model.path.startswith("package:"):
            yield model.path, loc
    for name, domain in file.spec.domains.items():
        parts: list[tuple[DataSpec, tuple[str | int, ...]]] = [(domain.data, ("domains", name, "data"))]
        parts += [(part, ("domains", name, "data", "join", key)) for key, part in (domain.data.join or {}).items()]
        for data, place in parts:
            for key in ("source", "train", "validation", "test"):
                reference = getattr(data, key)
                if reference is not None and not _is_elsewhere(reference):
                    yield reference, (*place, key)
    if (forgetting := file.spec.forgetting) is not None and not _is_elsewhere(forgetting.source):
        yield forgetting.source, ("forgetting", "source")


def _is_elsewhere(reference: str) -> bool:
    return reference.startswith(("hub:", "recipe:", "package:")) or "://" in reference
