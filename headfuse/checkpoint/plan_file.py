"""plan.json on disk: read, written with checksums, verified."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

from headfuse.checkpoint.background import together
from headfuse.checkpoint.checksums import file_sha256
from headfuse.checkpoint.interrupted import RESUME, STATE
from headfuse.errors import CheckpointError, HeadfuseError
from headfuse.plan import FusionPlan


def read_plan(path: Path) -> FusionPlan:
    """The plan in a file or in a folder's plan.json."""
    path = path / "plan.json" if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise HeadfuseError(
            reason, where=path, fix="`headfuse analyze --output` writes plans; so does `headfuse fuse`"
        ) from None
    return FusionPlan.from_json(text, str(path))


def plan_in(folder: Path) -> FusionPlan | None:
    """The plan of a model folder; None for one without plan.json."""
    return read_plan(folder) if (folder / "plan.json").exists() else None


def write_plan(folder: Path, plan: FusionPlan, known: Mapping[str, str] | None = None) -> FusionPlan:
    """Write plan.json with the checksums of the files that are in the folder now; `known` ones are not read again."""
    known = known or {}
    names = sorted(name for name in _visible_files(folder) if name != RESUME and not name.startswith(f"{STATE}/"))
    missing = [name for name in names if name not in known]
    files = {**known, **dict(zip(missing, together(file_sha256, [folder / name for name in missing]), strict=True))}
    plan = plan.model_copy(update={"files": {name: files[name] for name in names}}).sealed()
    (folder / "plan.json").write_text(plan.to_json())
    return plan


def _visible_files(folder: Path) -> set[str]:
    """Paths in the folder of what plan.json holds checksums of: every file but itself and hidden ones."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file() or path.is_symlink())
    return {name.as_posix() for name in names if not any(p.startswith(".") for p in name.parts)} - {"plan.json"}


def verify(folder: Path, apart_from: Collection[str] = ()) -> FusionPlan:
    """Compare every file of a folder that headfuse wrote, but those named, with the checksums in its plan.json.

    Raises:
        HeadfuseError: when there is no plan.json, or one of another kind.
        CheckpointError: naming every file that has changed, is missing, or was not written with the others.
    """
    plan = read_plan(folder)
    fix = "copy or download the folder again; if that does not help, write it once more"
    if not plan.files:
        raise CheckpointError("holds no checksums: this is a plan alone", where=folder / "plan.json", fix=fix)
    try:
        present = _visible_files(folder)
        text = (folder / "plan.json").read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=folder, fix="check its permissions") from None
    bad = [] if text == plan.to_json() and plan == plan.sealed() else ["plan.json has changed"]
    for name in sorted((present | plan.files.keys()).difference(apart_from)):
        if name not in present:
            bad.append(f"{name} is missing")
        elif name not in plan.files:
            bad.append(f"{name} was not written with the others")
        elif file_sha256(folder / name) != plan.files[name]:
            bad.append(f"{name} has changed")
    if bad:
        raise CheckpointError("; ".join(bad), where=folder, fix=fix)
    return plan
