"""Addresses: where a dataset lies, in an object store or in a folder, as a text."""

import re
from pathlib import Path


def is_address(path: str | Path) -> bool:
    """Whether an output lies in an object store, such as s3://bucket/prefix, rather than in a folder."""
    return "://" in str(path)


def check_address(address: str) -> None:
    """Refuse an address in an object store that can be none, without quoting what may be a secret.

    Raises:
        ValueError: it holds credentials, names no bucket, holds what would not be taken for a name by all who read from
            there, or is of a protocol that is no object store's.
    """
    protocol, _, path = address.partition("://")
    bucket = path.partition("/")[0]
    # A secret key may hold a slash, so that its address seems to have a host and a port.
    if ":" in bucket or ("@" in bucket and not protocol.startswith("abfs")) or "?" in path or "#" in path:
        raise ValueError(
            "the address holds more than a bucket and a prefix; write it as s3://bucket/prefix, and give credentials "
            "in the environment only, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )
    if strange := re.search(r"[\s\"'`<>\\{}*\[\]]", path):
        raise ValueError(f"the address holds {strange[0]!r}; use letters, digits and . _ - / in it")
    if protocol in ("file", "local", "memory", "http", "https", "hf"):
        fix = "fgsm publish uploads a dataset to the Hub" if protocol == "hf" else "write a folder without a protocol"
        raise ValueError(f"{protocol}:// is no object store; {fix}")
    if not bucket:
        raise ValueError(f"{address} names no bucket; write it as {protocol}://bucket/prefix")
