"""A dataset on the Hub, as far as its manifest says more than its rows."""

from pathlib import Path

from pipeline.core.errors import ConfigError, explained, first_line


def manifest_folder(repo: str) -> Path:
    """The local folder of a Hub dataset at its newest commit, in which manifest.json is.

    Raises:
        ConfigError: there is no such dataset, it has no manifest.json, or the Hub cannot be reached.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

    with explained(f"{repo} cannot be read from the Hub", kind=ConfigError):
        try:
            return Path(hf_hub_download(repo, "manifest.json", repo_type="dataset")).parent
        except RepositoryNotFoundError:
            raise ConfigError(
                f"There is no folder {repo}, and the Hub shows no such dataset; a private one needs `hf auth login`."
            ) from None
        except LocalEntryNotFoundError as error:
            raise ConfigError(
                f"There is no folder {repo}, and the Hub cannot be reached: {first_line(error)}"
            ) from error
        except EntryNotFoundError:
            raise ConfigError(f"{repo} is no dataset of fgsm-pipeline: it has no manifest.json.") from None
