"""The manifest as a value: what follows from it follows from what it says now."""

from pathlib import Path

from pipeline.output.folder import OutputFolder
from pipeline.output.manifest import published, require_manifest


def test_the_config_of_a_published_manifest_names_no_folder_of_this_machine(finished: Path) -> None:
    manifest = require_manifest(OutputFolder(finished))
    assert manifest.resolved.output.path == manifest.config["output"]["path"] == str(finished)
    assert published(manifest).resolved.output.path == finished.name
    assert manifest.model_copy(update={"complete": False}).resolved is manifest.resolved
