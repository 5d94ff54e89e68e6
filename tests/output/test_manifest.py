"""The manifest as a value: what follows from it follows from what it says now."""

import math
from pathlib import Path

from pipeline.output.folder import OutputFolder
from pipeline.output.manifest import ON_RAY, published, require_manifest


def test_the_config_of_a_published_manifest_names_no_folder_of_this_machine(finished: Path) -> None:
    manifest = require_manifest(OutputFolder(finished))
    assert manifest.resolved.output.path == manifest.config["output"]["path"] == str(finished)
    assert published(manifest).resolved.output.path == finished.name
    assert manifest.model_copy(update={"complete": False}).resolved is manifest.resolved


def test_a_gradient_is_blamed_for_what_is_not_moved_only_along_one_direction(finished: Path) -> None:
    manifest = require_manifest(OutputFolder(finished))
    assert manifest.zero_gradient_warning is None
    values = math.prod(manifest.shape)
    still = manifest.model_copy(
        update={"subsets": [one.model_copy(update={"zero_signs": one.rows * values}) for one in manifest.subsets]}
    )
    off_ray = still.model_copy(update={"identity": {**still.identity, f"attacks.fgsm.{ON_RAY}": False}})
    assert "gradient" in (still.zero_gradient_warning or "")
    assert "100.0%" in (off_ray.zero_gradient_warning or "")
    assert "gradient" not in (off_ray.zero_gradient_warning or "")
